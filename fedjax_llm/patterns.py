"""Matches regular expressions from files and configs within limits.

Python's own `re` may run without end on a short expression. `matcher` limits
the length of an expression and the time of a match; `searcher` does so for
expressions that may match anywhere in a name.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_llm.types import Error

MAX_LENGTH = 10_000  # characters
MAX_SECONDS = 5.0  # of one match

_LITERAL = re.compile(r'[\w./-]*')


def matcher(
  pattern: str, label: str, *, within: str = '{}'
) -> Callable[[str], bool]:
  """Returns a function that tests whether an expression matches a whole name.

  Args:
    pattern: the regular expression.
    label: the file or config field of the expression, for messages.
    within: an outer expression, with {} in the place of `pattern`.

  Raises:
    Error: `pattern` is no regular expression or too long; from the returned
      function, a match takes too long.

  >>> ends = matcher('[qv]_proj', 'targets', within='(.*/)?({})')
  >>> ends('layers/self_attn/q_proj'), ends('layers/mlp/up_proj')
  (True, False)
  """
  whole = _checked(pattern, label, within)
  if _LITERAL.fullmatch(pattern):  # nothing in it is repeated
    return lambda name: re.fullmatch(whole, name) is not None
  program = _compiled(pattern, whole, label)
  run = program.fullmatch
  return lambda name: _limited(run, pattern, label, name) is not None


class Search(NamedTuple):
  """A pattern that may match anywhere in a name: see `searcher`."""

  pattern: str
  groups: int  # in it
  search: Callable[[str], Any]  # name -> match or None


def searcher(pattern: str, label: str) -> Search:
  """Returns a `Search`, within the same limits as `matcher`.

  Raises:
    Error: as in `matcher`.

  >>> found = searcher('cores/([0-9]+)$', 'the pattern')
  >>> found.groups, found.search('up/cores/12')[1], found.search('up/a')
  (1, '12', None)
  """
  program = _compiled(pattern, _checked(pattern, label, '{}'), label)
  return Search(
    pattern,
    program.groups,
    lambda name: _limited(program.search, pattern, label, name),
  )


def _checked(pattern: Any, label: str, within: str) -> str:
  """Returns `pattern` inside of `within`, checked for type and length."""
  if not isinstance(pattern, str):
    raise Error(f'{label}: {pattern!r} is no regular expression.')
  if len(pattern) > MAX_LENGTH:
    raise Error(
      f'{label}: {pattern[:40]!r}... has {len(pattern):,} characters, and a '
      f'regular expression may have {MAX_LENGTH:,}.'
    )
  return within.replace('{}', pattern)


def _compiled(pattern: str, whole: str, label: str) -> Any:
  import regex

  try:
    re.compile(pattern)  # valid by itself, without `within`
    return regex.compile(whole)
  except (re.error, regex.error, RecursionError, OverflowError) as error:
    reason = str(error) or type(error).__name__
    raise Error(
      f'{label}: {pattern!r} is no regular expression ({reason}).'
    ) from error


def _limited(
  run: Callable[..., Any], pattern: str, label: str, name: str
) -> Any:
  try:
    return run(name, timeout=MAX_SECONDS)
  except TimeoutError as error:
    raise Error(
      f'{label}: {pattern[:40]!r} does not come to an end on {name!r} within '
      f'{MAX_SECONDS:g} seconds.'
    ) from error
