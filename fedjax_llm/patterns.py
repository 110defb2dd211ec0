"""Matches regular expressions from files and configs within limits.

Python's own `re` may run without end on a short expression. `matcher` limits
the length of an expression and the time of a match.
"""

import re
from collections.abc import Callable

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
  if not isinstance(pattern, str):
    raise Error(f'{label}: {pattern!r} is no regular expression.')
  if len(pattern) > MAX_LENGTH:
    raise Error(
      f'{label}: {pattern[:40]!r}... has {len(pattern):,} characters, and a '
      f'regular expression may have {MAX_LENGTH:,}.'
    )
  whole = within.replace('{}', pattern)
  if _LITERAL.fullmatch(pattern):  # nothing in it is repeated
    return lambda name: re.fullmatch(whole, name) is not None
  import regex

  try:
    re.compile(pattern)  # valid by itself, without `within`
    program = regex.compile(whole)
  except (re.error, regex.error, RecursionError, OverflowError) as error:
    reason = str(error) or type(error).__name__
    raise Error(
      f'{label}: {pattern!r} is no regular expression ({reason}).'
    ) from error

  def matches(name: str) -> bool:
    try:
      return program.fullmatch(name, timeout=MAX_SECONDS) is not None
    except TimeoutError as error:
      raise Error(
        f'{label}: {pattern[:40]!r} does not come to an end on {name!r} within '
        f'{MAX_SECONDS:g} seconds.'
      ) from error

  return matches
