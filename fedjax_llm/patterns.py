"""Regular expressions that come from files and configs, matched within limits.

Python's own `re` may compute for ever on a short expression. Here an expression
has a greatest length, and a match a greatest time.
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
  """A function that says whether an expression matches all of a name.

  Args:
    pattern: the expression.
    label: where it stands, for messages.
    within: an expression around it, with {} in its place.

  Raises:
    Error: it is no regular expression or too long. From the function: a match
      takes too long.

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
    re.compile(pattern)  # closes its brackets itself
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
