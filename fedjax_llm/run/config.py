"""Configurations: Python files, checked against the signatures of builders.

A config file has `get_config(arg='')` that returns an `ml_collections`
`ConfigDict` (or a plain dict): settings of the run, and sections in flow order,
each `dict(name=..., **keywords of that builder)`. Defaults live in the
builders' signatures and nowhere else, so a command line may name a keyword
that the file leaves alone, and every name is checked against the signature:

    --config FILE.py[:arg] --workdir DIR --config.section.field=value

An override of a section's `name` replaces the section: of the file's fields
only those that the new builder also takes are kept (`Arguments.notes` lists
the others), then the other overrides apply, in any order. `none` removes an
optional section.
"""

import ast
import copy
import enum
import importlib.util
import inspect
import os
import pathlib
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run import versions
from fedjax_llm.run.builders import (
  Label,
  check_field,
  fields,
  keywords_of,
  names,
  nearest,
  open_ended,
  parameters,
  plain_dicts,
)
from fedjax_llm.run.builders import build as build
from fedjax_llm.run.builders import check as check
from fedjax_llm.run.builders import onward as onward
from fedjax_llm.run.builders import resolve_builder as resolve_builder
from fedjax_llm.types import Error

_WORDS = {'true': True, 'false': False, 'none': None}
_USAGE = (
  'usage: --config FILE.py[:arg] --workdir DIR [--config.section.field=value]'
)


class Spec(NamedTuple):
  """The settings and sections that a program's configs may have.

  `settings` is a NamedTuple class: its fields are the scalars of the top
  level. `sections` maps a dotted path ('aggregator', 'local.optimizer') to the
  namespace of its builder: a module (the names in its `__all__`), a mapping
  from names to builders, or one builder; that section then has no `name`.
  `injected` maps a section to the keywords that the program fills in itself.
  Sections in `optional` may be absent or None; those in `unrecorded` are then
  left out of the resolved config. `implied(config, before)`
  returns the config with what its names imply, where `before` is the config
  without the overrides.
  """

  settings: Callable[..., Any]
  sections: Mapping[str, Any]
  injected: Mapping[str, Collection[str]] = {}
  optional: Collection[str] = ()
  unrecorded: Collection[str] = ()
  implied: Callable[[Any, Any], dict[str, Any]] = lambda config, before: config


class Arguments(NamedTuple):
  """A parsed command line."""

  config: dict[str, Any]  # overrides applied, checked; plain dicts throughout
  workdir: str
  config_path: str  # the value of --config, ':arg' included
  notes: tuple[str, ...] = ()  # fields of the file dropped by a new name


# ------------------------------------------------------------ command line --


def parse(argv: Sequence[str], spec: Spec) -> Arguments:
  """Returns the checked `Arguments` of a command line without its program.

  Values are Python literals, true/false/none, or else strings. `--help` prints
  the usage, with the fields of the config if there is a --config, and exits
  with 0.

  Raises:
    Error: an argument is wrong; the message names the flag or the file's field,
      its value and the values allowed.
  """
  flags: dict[str, str] = {}
  overrides: list[tuple[str, Any]] = []
  words = list(argv)
  if any(word in ('--help', '-h') for word in words):
    flags['help'] = ''
  while words:
    word = words.pop(0)
    flag, equals, text = word.partition('=')
    if word in ('--help', '-h'):
      continue
    if flag in ('--config', '--workdir') or flag.startswith('--config.'):
      if not equals:
        if not words or words[0].startswith('--'):
          raise Error(f'{flag} needs a value: {flag}=VALUE.')
        text = words.pop(0)
      if flag.startswith('--config.'):
        overrides.append((flag.removeprefix('--config.'), value(text)))
      else:
        flags[flag.removeprefix('--')] = text
    else:
      known = ['--config', '--workdir', '--help']
      raise Error(f'{word!r} is no argument {nearest(flag, known)}.')
  if 'help' in flags and 'config' not in flags:
    print(usage(spec))
    raise SystemExit(0)
  for name in ('config', 'workdir'):
    if not flags.get(name) and 'help' not in flags:
      raise Error(f'--{name} is missing ({_USAGE}).')
  config, notes = override(
    load(flags['config']), overrides, spec, flags['config']
  )
  if 'help' in flags:
    print(usage(spec, config))
    raise SystemExit(0)
  return Arguments(config, flags['workdir'], flags['config'], notes)


def value(text: str) -> Any:
  """Returns the value of an override: a Python literal, or the text itself.

  >>> value('1e-3'), value('(1, 2)'), value('True'), value('none'), value('a b')
  (0.001, (1, 2), True, None, 'a b')
  """
  if text.lower() in _WORDS:
    return _WORDS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def usage(spec: Spec, config: Mapping[str, Any] | None = None) -> str:
  """Returns the help text: the names of builders, or a config's fields."""
  lines = [_USAGE, '']
  if config is not None:
    filled = _flatten(resolved(config, spec))
    return '\n'.join(lines + [f'  --config.{k}={v!r}' for k, v in filled])
  for name, parameter in parameters(spec.settings).items():
    lines.append(f'  --config.{parameter.replace(name=name)}')
  for path, namespace in spec.sections.items():
    if callable(namespace):
      known = ', '.join(fields(namespace, spec.injected.get(path, ())))
      lines.append(f'  --config.{path}.FIELD: {known}')
    else:
      known = ', '.join(names(namespace))
      lines.append(f'  --config.{path}.name: {known}')
  return '\n'.join(lines)


def located(path: str) -> str:
  """Returns the file that a --config names: a path, or one of the project's.

  `configs/tiny.py`, `tiny.py` and `tiny` name the project's own config in every
  folder, unless a file has that path.

  Raises:
    Error: there is neither; the message lists the project's configs.

  >>> located('tiny').endswith('tiny.py')
  True
  """
  if os.path.isfile(path):
    return path
  folder, file = os.path.split(path)
  name = file.removesuffix('.py')
  package = pathlib.Path(__file__).resolve().parents[1]
  # Installed, they lie in the package; in a checkout beside it.
  folders = (package / 'configs', package.parent / 'configs')
  shipped = {
    config.stem: config
    for one in folders
    for config in sorted(one.glob('*.py'))
    if config.stem != '__init__'
  }
  if os.path.isdir(path) and (folder or name not in shipped):
    raise Error(f'--config {path} is a folder; name a config, NAME.py.')
  if folder in ('', 'configs') and name in shipped:
    return str(shipped[name])
  raise Error(
    f'--config {path}: there is no such file, and no config of the project of '
    f'that name {nearest(name, sorted(shipped))}.'
  )


def load(config_path: str) -> dict[str, Any]:
  """Runs `get_config` of FILE.py[:arg] and returns plain nested dicts.

  The project's own configs need no path: see `located`.

  Raises:
    Error: there is no such file, its code raises, or `get_config` returns
      another type.
  """
  path, colon, arg = config_path.partition('.py:')
  path = path + '.py' if colon else path
  if not colon and not os.path.isfile(path) and '/' not in path:
    path, _, arg = path.partition(':')  # tiny:smoke
  path = located(path)
  spec = importlib.util.spec_from_file_location('_fedjax_llm_config', path)
  if spec is None or spec.loader is None:
    raise Error(f'--config {path}: a config is a Python file, NAME.py.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
      raise Error(f'{path} defines no get_config().')
    if arg and not inspect.signature(module.get_config).parameters:
      raise Error(f'{path}: get_config() takes no argument, {arg!r} was given.')
    config = module.get_config(arg) if arg else module.get_config()
  except Error:
    raise
  except SystemExit as error:
    raise Error(f'{path}: the config ends the program ({error}).') from error
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    line = [f.lineno for f in frames if f.filename == spec.origin]
    at = f'{path}:{line[-1]}' if line else path
    raise Error(f'{at}: {type(error).__name__}: {error}') from error
  config = plain_dicts(config)
  if not isinstance(config, dict):
    raise Error(f'{path}: get_config() must return a ConfigDict or a dict.')
  return config


# ---------------------------------------------------------------- overrides --


def override(
  config: Mapping[str, Any],
  overrides: Iterable[tuple[str, Any]],
  spec: Spec,
  source: str = 'config',
) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Applies (dotted field, value) pairs; returns the checked config and notes.

  `source` is the file's name in messages. The module's docstring describes the
  effect of a new `name`.
  """
  overrides = list(overrides)
  named = {path for path, _ in overrides}
  result: dict[str, Any] = plain_dicts(config)
  notes: list[str] = []

  def label(path: str) -> str:
    if any(g == path or g.startswith(f'{path}.') for g in named):
      return f'--config.{path}'
    return f'{source}: {path}'

  # Whole sections before their names, names before fields, outer before inner.
  def order(pair):
    return pair[0].count('.'), not pair[0].endswith('.name')

  for path, new in sorted(overrides, key=order):
    section, field = _owner(path, spec)
    if path in spec.sections:
      parent, _, last = path.rpartition('.')
      _section(result, parent, spec, label)[last] = plain_dicts(new)
    elif section is None:
      if path not in parameters(spec.settings):
        raise _unknown_path(result, path, spec, label)
      result[path] = new
    elif field == 'name' and not callable(spec.sections[section]):
      notes += _rename(result, section, new, spec, label)
    else:
      values = _section(result, section, spec, label)
      builder = _builder(values, section, spec, label)
      top, *inner = field.split('.')
      _check_moved(section, top, builder, label)
      check_field(top, builder, spec.injected.get(section, ()), label, path)
      for part in inner:
        values[top] = copy.copy(values.get(top) or {})
        if not isinstance(values[top], dict):
          raise Error(f'{label(path)}: {top} is {values[top]!r}, not a dict.')
        values, top = values[top], part
      values[top] = new
  result = spec.implied(result, plain_dicts(config))
  _validate(result, spec, label)
  return result, tuple(notes)


def _owner(path: str, spec: Spec) -> tuple[str | None, str]:
  """Returns the innermost section of a dotted field, and the rest of it."""
  parts = path.split('.')
  for i in range(len(parts) - 1, 0, -1):
    if '.'.join(parts[:i]) in spec.sections:
      return '.'.join(parts[:i]), '.'.join(parts[i:])
  return None, path


def _rename(config, section, name, spec, label) -> list[str]:
  builder = resolve_builder(
    section, name, spec.sections[section], label(f'{section}.name')
  )
  parent, _, last = section.rpartition('.')
  outer = _section(config, parent, spec, label)
  old = outer.get(last)
  if not isinstance(old, dict):
    outer[last] = {'name': name}
    return []
  if old.get('name') == name:
    return []
  known = fields(builder, spec.injected.get(section, ()))
  outer[last] = {'name': name} | {k: v for k, v in old.items() if k in known}
  lost = [k for k in old if k != 'name' and k not in known]
  note = f'{section}.name={name}: set aside {", ".join(lost)} of the file'
  return [note] if lost else []


def _section(config, path, spec, label) -> dict[str, Any]:
  """Returns the dict at `path` that an override writes into, made if absent."""
  if not path:
    return config
  parent, _, last = path.rpartition('.')
  outer = _section(config, parent, spec, label)
  inner = outer.get(last)
  if inner is None and parent in spec.sections:
    # An inner section that the file leaves at the outer builder's default.
    builder = _builder(outer, parent, spec, label)
    check_field(last, builder, spec.injected.get(parent, ()), label, path)
    parameter = parameters(builder).get(last)
    default = None if parameter is None else parameter.default
    inner = plain_dicts(default) if isinstance(default, Mapping) else None
  if inner is None:
    namespace = spec.sections.get(path)
    if namespace is not None and not callable(namespace):
      raise Error(
        f'{label(path)} has no name yet: give --config.{path}.name, one of'
        f' {", ".join(names(namespace))}.'
      )
    inner = {}
  if not isinstance(inner, dict):
    raise Error(f'{label(path)} must be a section, a dict, not {inner!r}.')
  outer[last] = inner
  return inner


# ------------------------------------------------------------------- checks --


def settings(config: Mapping[str, Any], spec: Spec) -> Any:
  """Returns the run's settings, an instance of `spec.settings`."""
  known = parameters(spec.settings)
  return spec.settings(**{k: v for k, v in config.items() if k in known})


def at_least(values: Any, prefix: str = '', /, **least: int) -> None:
  """Raises an `Error` for a field of a NamedTuple below its bound.

  None and strings are not compared.

  >>> import collections
  >>> at_least(collections.namedtuple('Run', 'num_rounds')(0), num_rounds=1)
  Traceback (most recent call last):
  fedjax_llm.types.Error: num_rounds is 0; it must be at least 1.
  """
  for field, bound in least.items():
    value = getattr(values, field)
    if isinstance(value, str):  # such as 'auto'
      continue
    if value is not None and value < bound:
      raise Error(f'{prefix}{field} is {value}; it must be at least {bound}.')


def _validate(config: dict[str, Any], spec: Spec, label: Label) -> None:
  scalars = {k: v for k, v in config.items() if not _is_part(k, spec)}
  for key in scalars:
    if key not in parameters(spec.settings):
      raise _unknown_path(config, key, spec, label)
  check(scalars, spec.settings, label=label)
  for path, namespace in spec.sections.items():
    parent = path.rpartition('.')[0]
    part = _get(config, path)
    outer = _get(config, parent) if parent else config
    if parent and parent not in spec.sections and outer is not None:
      if not isinstance(outer, dict):
        raise Error(f'{label(parent)} must be a dict, not {outer!r}.')
      for key in outer:
        if not _is_part(f'{parent}.{key}', spec):
          raise _unknown_path(config, f'{parent}.{key}', spec, label)
    if parent in spec.sections and not isinstance(part, dict):
      continue  # absent or a plain value: the outer builder checks it
    if part is None and path in spec.optional:
      continue
    if part is None and callable(namespace):
      part = _section(config, path, spec, label)  # everything at its default
    if part is None:
      known = ', '.join(names(namespace))
      raise Error(
        f'{label(path)} is missing: a section dict(name=...), one of {known}.'
      )
    if not isinstance(part, dict):
      raise Error(
        f'{label(path)} must be a section, dict(name=...), not {part!r}.'
      )
    builder, keywords = (
      _builder(part, path, spec, label),
      keywords_of(part, namespace),
    )
    for field in keywords:
      _check_moved(path, field, builder, label)
    check(
      keywords,
      builder,
      spec.injected.get(path, ()),
      lambda field, path=path: label(f'{path}.{field}'),
    )


def _check_moved(section: str, field: str, builder, label: Label) -> None:
  """Raises an `Error` for a field that has moved to another section."""
  to = versions.MOVED.get((section, field))
  if to and field not in parameters(builder) and not open_ended(builder):
    place = '.'.join(to)
    raise Error(
      f'{label(f"{section}.{field}")}: this field has moved to {place}: set '
      f'--config.{place}, or {place} in the file.'
    )


def _unknown_path(config, path: str, spec: Spec, label: Label) -> Error:
  parts = path.split('.')
  depth = 0
  while _is_part('.'.join(parts[: depth + 1]), spec):
    depth += 1
  prefix = ''.join(f'{part}.' for part in parts[:depth])
  known = [*parameters(spec.settings), *spec.sections]
  inside = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
  near = nearest(parts[depth], dict.fromkeys(k.split('.')[0] for k in inside))
  # A field named without its section: the message names the section.
  for section in spec.sections:
    if parts[-1] in _present_fields(config, section, spec):
      near = f"(there is '{section}.{parts[-1]}'; {near[1:]}"
      break
  name = '.'.join(parts[depth:])
  return Error(f'{label(path)}: there is no {name!r} {near}.')


def _present_fields(config, section: str, spec: Spec) -> list[str]:
  try:
    builder = _builder(_get(config, section) or {}, section, spec, str)
  except Error:
    return []
  return fields(builder, spec.injected.get(section, ()))


def _builder(section, path: str, spec: Spec, label: Label):
  namespace = spec.sections[path]
  if callable(namespace):
    return namespace
  return resolve_builder(
    path, section.get('name'), namespace, label(f'{path}.name')
  )


# ------------------------------------------------------------------ records --


def resolved(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
  """Returns the config with all defaults of all builders, as JSON values."""
  config = plain_dicts(config)
  result = _filled(
    {k: v for k, v in config.items() if not _is_part(k, spec)}, spec.settings
  )
  for path in sorted(spec.sections, key=lambda p: p.count('.')):
    namespace = spec.sections[path]
    parent, _, last = path.rpartition('.')
    inside = _get(result, parent) if parent else result
    if parent in spec.sections:
      if not isinstance(inside, dict) or last not in inside:
        continue  # the outer section is absent, or takes no such field
      values = inside[last]
    else:
      inside = result
      for part in filter(None, parent.split('.')):
        inside = inside.setdefault(part, {})
      values = _get(config, path)
      if values is None and path in spec.unrecorded:
        continue
      if values is None and callable(namespace) and path not in spec.optional:
        values = {}
    if isinstance(values, dict):
      builder = _builder(values, path, spec, str)
      name = {} if callable(namespace) else {'name': values['name']}
      injected = spec.injected.get(path, ())
      values = name | _filled(keywords_of(values, namespace), builder, injected)
    inside[last] = values
  return {k: _plain(v) for k, v in result.items()}


def _filled(section, builder, injected: Collection[str] = ()) -> dict[str, Any]:
  defaults = {
    k: plain_dicts(p.default)
    for k, p in parameters(builder).items()
    if p.default is not p.empty and k not in injected
  }
  return defaults | section


def same(
  a: Mapping[str, Any], b: Mapping[str, Any], ignore: Collection[str] = ()
) -> list[str]:
  """Returns the dotted fields in which two resolved configs differ.

  `ignore` lists fields, or sections, that may differ.

  >>> same({'a': {'b': 1, 'c': [2]}}, {'a': {'b': 1.5, 'c': (2,)}, 'd': 0})
  ['a.b', 'd']
  >>> same({'a': {'b': 1}}, {'a': {'b': 2}}, ignore=('a',))
  []
  """
  left, right = (dict(_flatten(_plain(plain_dicts(x)))) for x in (a, b))
  absent = object()
  return [
    path
    for path in sorted(left.keys() | right.keys())
    if not any(path == i or path.startswith(f'{i}.') for i in ignore)
    # repr, so that NaN equals NaN and 1 is not True.
    and repr(left.get(path, absent)) != repr(right.get(path, absent))
  ]


# ------------------------------------------------------------------ helpers --


def _plain(x: Any) -> Any:
  """Returns a value that JSON can hold; functions become import paths."""
  if isinstance(x, Mapping):
    return {str(k): _plain(v) for k, v in x.items()}
  if isinstance(x, enum.Enum):
    return _plain(x.value)
  if x is None or isinstance(x, bool | int | float | str):
    return x
  if isinstance(x, list | tuple):
    return [_plain(v) for v in x]
  if isinstance(x, set | frozenset):
    return sorted(map(_plain, x), key=repr)
  if isinstance(x, os.PathLike):
    return os.fspath(x)
  if hasattr(x, 'tolist'):  # NumPy and JAX arrays and scalars
    return x.tolist()
  of = x if hasattr(x, '__qualname__') else type(x)
  return f'{of.__module__}:{of.__qualname__}'


def _flatten(x: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
  leaves = []
  for key, item in x.items():
    if isinstance(item, Mapping) and item:
      leaves += _flatten(item, f'{prefix}{key}.')
    else:
      leaves.append((f'{prefix}{key}', item))
  return leaves


def _get(config: Mapping[str, Any], path: str) -> Any:
  value: Any = config
  for part in path.split('.'):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value


def _is_part(path: str, spec: Spec) -> bool:
  """Returns True for a section and for a dict that only holds sections."""
  return any(p == path or p.startswith(f'{path}.') for p in spec.sections)
