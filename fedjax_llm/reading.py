"""Reads JSON files that other tools wrote and checks them against a schema.

A schema maps the name of a field to a `Rule`; absent fields are not checked.
Every problem with a file raises one `Error` that names the file, the field, its
value and the allowed values. The functions at the end return rules.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_llm.types import Error


class Rule(NamedTuple):
  """The allowed values of a field: the test `fits`, and `allowed` in words.

  >>> integer(1).fits(0), integer(1).allowed
  (False, 'an integer of at least 1')
  """

  fits: Callable[[Any], bool]
  allowed: str


Schema = Mapping[str, Rule]


def read(path: str | os.PathLike, schema: Schema | None = None) -> dict:
  """Reads a file that holds one JSON object, and checks its fields.

  Raises:
    Error: the file cannot be read, is not UTF-8, is no JSON object or is nested
      too deeply, or a field does not follow its rule.

  >>> read('./nowhere.json')
  Traceback (most recent call last):
  fedjax_llm.types.Error: nowhere.json cannot be read: No such file or \
directory.
  """
  path = pathlib.Path(path)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise Error(f'{path} cannot be read: {error.strerror}.') from error
  value = parse(content, str(path))
  if not isinstance(value, dict):
    raise Error(f'{path} holds {short(value)}, but must hold a JSON object.')
  check(value, schema or {}, str(path))
  return value


def parse(content: bytes | str, where: str) -> Any:
  """Parses a JSON text and returns its value; `where` names it in errors.

  >>> parse('[' * 100_000, 'deep.json')
  Traceback (most recent call last):
  fedjax_llm.types.Error: deep.json is nested too deeply to be read.
  """
  try:
    if isinstance(content, bytes):
      content = content.decode('utf-8-sig')
    return json.loads(content)
  except UnicodeDecodeError as error:
    raise Error(f'{where} is not UTF-8 text ({error}).') from None
  except RecursionError:
    raise Error(f'{where} is nested too deeply to be read.') from None
  except ValueError as error:
    raise Error(f'{where} is not valid JSON ({error}).') from None


def check(values: Mapping[str, Any], schema: Schema, where: str) -> None:
  """Raises an `Error` for the first field that does not follow its rule.

  >>> check({'r': -1}, {'r': integer(1)}, 'adapter_config.json')
  Traceback (most recent call last):
  fedjax_llm.types.Error: adapter_config.json: r is -1, but must be an integer \
of at least 1.
  """
  for field, rule in schema.items():
    if field in values and not rule.fits(values[field]):
      raise Error(
        f'{where}: {field} is {short(values[field])}, but must be '
        f'{rule.allowed}.'
      )


def short(value: Any, limit: int = 60) -> str:
  """Returns the value's `repr`, cut to `limit` characters."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # deep, or an integer of many digits
    text = f'a {type(value).__name__}'
  return text if len(text) <= limit else f'{text[: limit - 3]}...'


# The script that fetches each folder or file, by its name.
_FETCHED = {
  'SmolLM2-135M-Instruct': 'fetch_smollm2',
  'all-MiniLM-L6-v2': 'fetch_minilm',
  'chitchat.jsonl.gz': 'fetch_chitchat',
  'bbcnews.jsonl.gz': 'fetch_bbcnews',
  'recommendation.jsonl': 'make_application_data',
  **{
    f'{name}.jsonl.gz': 'fetch_tasks'
    for name in ('newsgroups', 'reuters_r8', 'reuters_r52', 'doc2dial')
  },
}


def fetched_by(path: str | os.PathLike) -> str:
  """Returns a sentence with the script that fetches a missing path, or ''.

  >>> fetched_by('~/.cache/fedjax_llm/SmolLM2-135M-Instruct')
  ' scripts/fetch_smollm2 fetches it.'
  """
  script = _FETCHED.get(pathlib.Path(path).name)
  return f' scripts/{script} fetches it.' if script else ''


# ------------------------------------------------------------------- rules --


def integer(low: int | None = None, high: int | None = None) -> Rule:
  """Returns the rule of integers from `low` to `high`, without booleans."""

  def fits(value):
    if isinstance(value, bool) or not isinstance(value, int):
      return False
    return (low is None or value >= low) and (high is None or value <= high)

  return Rule(fits, f'an integer{_bounds(low, high)}')


def number(
  low: float | None = None,
  high: float | None = None,
  *,
  above: float | None = None,
) -> Rule:
  """Returns the rule of finite numbers from `low` to `high`, above `above`.

  >>> number(above=0).fits(float('nan')), number(above=0).allowed
  (False, 'a finite number above 0')
  """

  def fits(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
      return False
    try:
      finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
      return False
    return (
      finite
      and (low is None or value >= low)
      and (high is None or value <= high)
      and (above is None or value > above)
    )

  more = '' if above is None else f' above {above:g}'
  return Rule(fits, f'a finite number{more}{_bounds(low, high)}')


def text(limit: int | None = None) -> Rule:
  """Returns the rule of Unicode strings of at most `limit` characters."""

  def fits(value):
    if not isinstance(value, str) or (limit and len(value) > limit):
      return False
    return is_unicode(value)

  most = '' if limit is None else f' of at most {limit:,} characters'
  return Rule(fits, f'a string{most}')


def is_unicode(value: str) -> bool:
  """Returns True for a string without lone surrogates (half characters)."""
  try:
    return value.isascii() or bool(value.encode())
  except UnicodeEncodeError:
    return False


def boolean() -> Rule:
  """Returns the rule of True and False."""
  return Rule(lambda value: isinstance(value, bool), 'true or false')


def one_of(*values: Any) -> Rule:
  """Returns the rule of these values, compared with their type."""

  def fits(value):
    return any(type(value) is type(x) and value == x for x in values)

  return Rule(fits, f'one of {", ".join(map(repr, values))}')


def listed(rule: Rule, *, least: int = 0, most: int | None = None) -> Rule:
  """Returns the rule of lists with `least` to `most` values of a rule."""

  def fits(value):
    return (
      isinstance(value, list | tuple)
      and len(value) >= least
      and (most is None or len(value) <= most)
      and all(map(rule.fits, value))
    )

  size = _bounds(least or None, most, '{} or more', 'at most {}')
  return Rule(fits, f'a list{size}, each {rule.allowed}')


def mapped(rule: Rule) -> Rule:
  """Returns the rule of objects with values that each follow a rule."""

  def fits(value):
    return isinstance(value, Mapping) and all(map(rule.fits, value.values()))

  return Rule(fits, f'an object whose values are each {rule.allowed}')


def either(*rules: Rule) -> Rule:
  """Returns the rule of values that follow at least one of the rules."""
  return Rule(
    lambda value: any(rule.fits(value) for rule in rules),
    ' or '.join(dict.fromkeys(rule.allowed for rule in rules)),
  )


def optional(*rules: Rule) -> Rule:
  """Returns the rule of null and of values that follow one of the rules."""
  return either(*rules, Rule(lambda value: value is None, 'null'))


def anything() -> Rule:
  """Returns the rule of all values."""
  return Rule(lambda value: True, 'anything')


def _bounds(low, high, least='at least {}', most='at most {}') -> str:
  if low is not None and high is not None:
    return f' from {low:g} to {high:g}'
  if low is not None:
    return f' of {least.format(f"{low:g}")}'
  return '' if high is None else f' of {most.format(f"{high:g}")}'
