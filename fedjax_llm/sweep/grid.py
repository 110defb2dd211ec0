"""What is compared: fields of a config and their values, times seeds."""

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
  """One place of the grid."""

  values: Mapping[str, Any]  # by field, as a config has them
  words: Mapping[str, str]  # by field, as they are read
  conf: dict[str, Any]  # checked; its seed is the file's
  notes: tuple[str, ...] = ()  # fields of the file that its names set aside


class Run(NamedTuple):
  """A setting with a seed, and the folder that it leaves."""

  setting: int  # its place among the settings
  seed: int
  name: str
  conf: dict[str, Any]
  resolved: dict[str, Any]  # every default filled in, as JSON


# ------------------------------------------------------------ command line --


def parse(words: Iterable[str], flag: str = '--grid') -> dict[str, list[Any]]:
  """Fields and values, as they stand behind a flag.

  Commas inside brackets and quotes belong to a value.

  >>> parse(['aggregator.name=mean,median', 'widths=(32, 64),()'])
  {'aggregator.name': ['mean', 'median'], 'widths': [(32, 64), ()]}

  Raises:
    Error: a word that is no FIELD=VALUE,VALUE, or a field that stands twice.
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
  """At the commas that no bracket or quote holds."""
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


def seeds(given: str | int | Sequence[int], first: int = 0) -> list[int]:
  """N seeds from `first` on, or those of a list.

  >>> seeds(3), seeds('2', first=7), seeds('3,5,8'), seeds([4])
  ([0, 1, 2], [7, 8], [3, 5, 8], [4])

  Raises:
    Error: no such number or list, a negative seed or one that stands twice.
  """
  found: Any = given
  if isinstance(given, str):
    found = config.value(given)
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
  if whole(found) and found > 0:
    return list(range(first, first + found))
  if whole(found) or not isinstance(found, Sequence) or not found:
    raise Error(f'--seeds is {given!r}: a number above 0, or a list of seeds.')
  if not all(whole(x) and x >= 0 for x in found):
    raise Error(f'--seeds is {given!r}: seeds are whole numbers from 0.')
  if len(set(found)) < len(found):
    raise Error(f'--seeds is {given!r}: a seed stands there twice.')
  return list(found)


# ---------------------------------------------------------------- settings --


def listed(grid: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
  """The values of every field as a list.

  Raises:
    Error: a field without a list of values, or with an empty one.
  """
  found = {}
  for field, given in grid.items():
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
      raise Error(f'--grid {field} is {given!r}: it takes a list of values.')
    found[field] = list(given)
    if not found[field]:
      raise Error(f'--grid {field} has no value.')
  return found


def settings(
  conf: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> list[Setting]:
  """The cartesian product of the values, the last field running fastest.

  Args:
    conf: a checked config.
    grid: by field (`aggregator.name`; a whole section, `aggregator`), the
      values. A builder may be given itself instead of its name.

  Raises:
    Error: what a config would be refused for; a value that stands twice, seeds
      (they are not of the grid).
  """
  known: dict[str, list[tuple[Any, str]]] = {}
  for field, given in grid.items():
    if field == 'seed':
      raise Error('--grid seed: seeds are given by --seeds.')
    values = [named(field, value) for value in given]
    words = [word(value) for value in values]
    if twice := [w for i, w in enumerate(words) if w in words[:i]]:
      raise Error(f'--grid {field}: {twice[0]} stands there twice.')
    known[field] = list(zip(values, words))
  found = []
  for chosen in itertools.product(*known.values()):
    values = {f: value for f, (value, _) in zip(known, chosen)}
    try:
      made, notes = config.override(conf, list(values.items()), SPEC)
    except Error as error:
      raise Error(str(error).replace('--config.', '--grid ')) from error
    words = {f: text for f, (_, text) in zip(known, chosen)}
    found.append(Setting(values, words, made, notes))
  return found


def named(field: str, value: Any) -> Any:
  """A value of a field, a builder of the house by its name, at every depth."""
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
  """A value as it is read.

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
  """Names of fields as short as they may be.

  >>> short(['aggregator.name', 'local.learning_rate', 'server.momentum'])
  {'aggregator.name': 'aggregator', 'local.learning_rate': 'learning_rate', \
'server.momentum': 'momentum'}
  """
  last = {f: f.removesuffix('.name').rpartition('.')[2] for f in fields}
  alone = lambda f: list(last.values()).count(last[f]) == 1
  return {f: last[f] if alone(f) else f for f in fields}


def runs(found: Sequence[Setting], seeds: Sequence[int]) -> list[Run]:
  """Every setting with every seed, and a folder's name for each."""
  made = []
  for place, setting in enumerate(found):
    names = short(list(setting.words))
    said = [f'{names[f]}={text}' for f, text in setting.words.items()]
    resolved = config.resolved(setting.conf, SPEC)
    for seed in seeds:
      name = _folder(','.join([*said, f'seed={seed}']))
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
  found: Sequence[Setting], wanted: Mapping[str, Any] | None
) -> list[int]:
  """For each setting the one that it is compared with.

  That is the one which has the values of `wanted` and otherwise its own; by
  default the first of all.

  Raises:
    Error: a field or a value that is not in the grid.
  """
  if not wanted:
    return [0] * len(found)
  words = [dict(setting.words) for setting in found]
  asked = {}
  for field, value in wanted.items():
    if field not in words[0]:
      near = builders.nearest(field, words[0])
      raise Error(f'--baseline {field}: it is no field of the grid {near}.')
    asked[field] = word(named(field, value))
    there = list(dict.fromkeys(one[field] for one in words))
    if asked[field] not in there:
      near = builders.nearest(asked[field], there)
      raise Error(
        f'--baseline {field}={asked[field]}: the grid has no such value {near}.'
      )
  return [words.index(one | asked) for one in words]
