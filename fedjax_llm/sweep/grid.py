"""The grid of a sweep: fields of a config with their values, times seeds."""

import itertools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run import builders, config
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error

_LONGEST = 120  # characters of a folder's name


class Setting(NamedTuple):
  """One combination of the values of a grid."""

  values: Mapping[str, Any]  # by field, as in a config
  words: Mapping[str, str]  # by field, as text
  conf: dict[str, Any]  # checked; its seed is the file's
  notes: tuple[str, ...] = ()  # fields of the file dropped by its names


class Run(NamedTuple):
  """A setting with a seed, and the name of its folder."""

  setting: int  # the index of its setting
  seed: int
  name: str
  conf: dict[str, Any]
  resolved: dict[str, Any]  # every default filled in, as JSON


# ------------------------------------------------------------ command line --


def parse(words: Iterable[str], flag: str = '--grid') -> dict[str, list[Any]]:
  """Parses the fields and values of a flag.

  Commas inside brackets and quotes belong to a value.

  >>> parse(['aggregator.name=mean,median', 'widths=(32, 64),()'])
  {'aggregator.name': ['mean', 'median'], 'widths': [(32, 64), ()]}

  Raises:
    Error: a word is not of the form FIELD=VALUE,VALUE, or a field is repeated.
  """
  grid: dict[str, list[Any]] = {}
  for word in words:
    field, equals, text = word.partition('=')
    if not equals or not field or not text:
      raise Error(f'{flag} {word!r} is no FIELD=VALUE,VALUE.')
    if field in grid:
      raise Error(f'{flag} {field} stands there twice.')
    grid[field] = [config.value(part.strip()) for part in _split(text)]
  return grid


def _split(text: str) -> list[str]:
  """Splits a text at the commas outside of brackets and quotes."""
  parts, depth, quote = [''], 0, ''
  for c in text:
    if quote:
      quote = '' if c == quote else quote
    elif c in '\'"':
      quote = c
    elif c in '([{':
      depth += 1
    elif c in ')]}':
      depth -= 1
    if c == ',' and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += c
  return parts


def seeds(value: str | int | Sequence[int], first: int = 0) -> list[int]:
  """Returns N seeds from `first` on, or those of a list.

  >>> seeds(3), seeds('2', first=7), seeds('3,5,8'), seeds([4])
  ([0, 1, 2], [7, 8], [3, 5, 8], [4])

  Raises:
    Error: the value is no positive number and no list, or a seed is negative or
      repeated.
  """
  parsed: Any = value
  if isinstance(value, str):
    parsed = config.value(value)
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
  if whole(parsed) and parsed > 0:
    return list(range(first, first + parsed))
  if whole(parsed) or not isinstance(parsed, Sequence) or not parsed:
    raise Error(f'--seeds is {value!r}: a number above 0, or a list of seeds.')
  if not all(whole(x) and x >= 0 for x in parsed):
    raise Error(f'--seeds is {value!r}: seeds are whole numbers from 0.')
  if len(set(parsed)) < len(parsed):
    raise Error(f'--seeds is {value!r}: a seed stands there twice.')
  return list(parsed)


# ---------------------------------------------------------------- settings --


def listed(grid: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
  """Returns the values of every field as a list.

  Raises:
    Error: a field has no list of values, or an empty one.
  """
  lists = {}
  for field, values in grid.items():
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
      raise Error(f'--grid {field} is {values!r}: it takes a list of values.')
    lists[field] = list(values)
    if not lists[field]:
      raise Error(f'--grid {field} has no value.')
  return lists


def settings(
  conf: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> list[Setting]:
  """Returns the cartesian product of the values; the last field runs fastest.

  Args:
    conf: a checked config.
    grid: the values by field (`aggregator.name`, or a whole section,
      `aggregator`). A builder may stand for its name.

  Raises:
    Error: a resulting config is refused, a value is repeated, or the grid has
      the field `seed` (use --seeds).
  """
  known: dict[str, list[tuple[Any, str]]] = {}
  for field, choices in grid.items():
    if field == 'seed':
      raise Error('--grid seed: seeds are given by --seeds.')
    values = [named(field, value) for value in choices]
    words = [word(value) for value in values]
    if twice := [w for i, w in enumerate(words) if w in words[:i]]:
      raise Error(f'--grid {field}: {twice[0]} stands there twice.')
    known[field] = list(zip(values, words))
  result = []
  for chosen in itertools.product(*known.values()):
    values = {f: value for f, (value, _) in zip(known, chosen)}
    try:
      made, notes = config.override(conf, list(values.items()), SPEC)
    except Error as error:
      raise Error(str(error).replace('--config.', '--grid ')) from error
    words = {f: text for f, (_, text) in zip(known, chosen)}
    result.append(Setting(values, words, made, notes))
  return result


def named(field: str, value: Any) -> Any:
  """Returns a value with the project's builders as names, at every depth."""
  section = field.removesuffix('.name')
  if isinstance(value, Mapping):
    inner = lambda k, v: named(f'{section}.{k}', v)
    return {k: inner(k, v) for k, v in value.items()}
  namespace = SPEC.sections.get(section)
  if callable(value) and namespace is not None and not callable(namespace):
    for name, builder in builders.names(namespace).items():
      if builder is value:
        return name
  return value


def word(value: Any) -> str:
  """Returns a value as short text.

  >>> word('mean'), word(1e-4), word(None), word(len)
  ('mean', '0.0001', 'none', 'len')
  >>> word({'name': 'krum', 'num_byzantine': 2})
  'krum(num_byzantine=2)'
  """
  if value is None:
    return 'none'
  if isinstance(value, str):
    return value
  if isinstance(value, Mapping):
    rest = [f'{k}={word(v)}' for k, v in value.items() if k != 'name']
    return f'{word(value.get("name", ""))}({", ".join(rest)})'
  if callable(value):
    return getattr(value, '__name__', type(value).__name__)
  return str(value).lower() if isinstance(value, bool) else repr(value)


def short(fields: Sequence[str]) -> dict[str, str]:
  """Returns the shortest unique names of fields.

  >>> short(['aggregator.name', 'local.learning_rate', 'server.momentum'])
  {'aggregator.name': 'aggregator', 'local.learning_rate': 'learning_rate', \
'server.momentum': 'momentum'}
  """
  last = {f: f.removesuffix('.name').rpartition('.')[2] for f in fields}
  alone = lambda f: list(last.values()).count(last[f]) == 1
  return {f: last[f] if alone(f) else f for f in fields}


def runs(settings: Sequence[Setting], seeds: Sequence[int]) -> list[Run]:
  """Returns every setting with every seed, each with the name of its folder."""
  made = []
  for place, setting in enumerate(settings):
    names = short(list(setting.words))
    parts = [f'{names[f]}={text}' for f, text in setting.words.items()]
    resolved = config.resolved(setting.conf, SPEC)
    for seed in seeds:
      name = _folder(','.join([*parts, f'seed={seed}']))
      confs = ({**conf, 'seed': seed} for conf in (setting.conf, resolved))
      made.append(Run(place, seed, name, *confs))
  several = [run.name for run in made]
  if len(set(several)) < len(several):
    twice = next(n for n in several if several.count(n) > 1)
    raise Error(f'--grid: two runs would share the folder {twice}.')
  return made


def _folder(text: str) -> str:
  plain = re.sub(r'[^\w.,=+-]+', '_', text)
  if len(plain) <= _LONGEST:
    return plain
  return f'{plain[: _LONGEST - 9]}-{zlib.crc32(text.encode()):08x}'


# ---------------------------------------------------------------- baseline --


def baseline(
  settings: Sequence[Setting], wanted: Mapping[str, Any] | None
) -> list[int]:
  """Returns, for each setting, the index of the setting it is compared with.

  That setting has the values of `wanted` and is equal in all other fields; by
  default it is the first of all.

  Raises:
    Error: a field or a value is not in the grid.
  """
  if not wanted:
    return [0] * len(settings)
  words = [dict(setting.words) for setting in settings]
  chosen = {}
  for field, value in wanted.items():
    if field not in words[0]:
      near = builders.nearest(field, words[0])
      raise Error(f'--baseline {field}: it is no field of the grid {near}.')
    chosen[field] = word(named(field, value))
    there = list(dict.fromkeys(one[field] for one in words))
    if chosen[field] not in there:
      near = builders.nearest(chosen[field], there)
      raise Error(
        f'--baseline {field}={chosen[field]}: the grid has no such value '
        f'{near}.'
      )
  return [words.index(one | chosen) for one in words]
