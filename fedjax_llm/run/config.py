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
import importlib.util
import inspect
import os
import pathlib
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run.builders import build as build
from fedjax_llm.run.builders import check as check
from fedjax_llm.run.builders import (
  check_field,
  fields,
  keywords_of,
  names,
  nearest,
  parameters,
  plain_dicts,
)
from fedjax_llm.run.builders import onward as onward
from fedjax_llm.run.builders import resolve_builder as resolve_builder
from fedjax_llm.run.plain import as_json, flatten
from fedjax_llm.run.plain import same as same
from fedjax_llm.run.spec import Spec as Spec
from fedjax_llm.run.spec import (
  builder_of,
  check_moved,
  get,
  is_part,
  section_of,
  unknown,
  validate,
)
from fedjax_llm.types import Error

_WORDS = {'true': True, 'false': False, 'none': None}
_USAGE = (
  'usage: --config FILE.py[:arg] --workdir DIR [--config.section.field=value]'
)


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
    filled = flatten(resolved(config, spec))
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
      section_of(result, parent, spec, label)[last] = plain_dicts(new)
    elif section is None:
      if path not in parameters(spec.settings):
        raise unknown(result, path, spec, label)
      result[path] = new
    elif field == 'name' and not callable(spec.sections[section]):
      notes += _rename(result, section, new, spec, label)
    else:
      values = section_of(result, section, spec, label)
      builder = builder_of(values, section, spec, label)
      top, *inner = field.split('.')
      check_moved(section, top, builder, label)
      check_field(top, builder, spec.injected.get(section, ()), label, path)
      for part in inner:
        values[top] = copy.copy(values.get(top) or {})
        if not isinstance(values[top], dict):
          raise Error(f'{label(path)}: {top} is {values[top]!r}, not a dict.')
        values, top = values[top], part
      values[top] = new
  result = spec.implied(result, plain_dicts(config))
  validate(result, spec, label)
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
  outer = section_of(config, parent, spec, label)
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


# ------------------------------------------------------------------ records --


def resolved(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
  """Returns the config with all defaults of all builders, as JSON values."""
  config = plain_dicts(config)
  result = _filled(
    {k: v for k, v in config.items() if not is_part(k, spec)}, spec.settings
  )
  for path in sorted(spec.sections, key=lambda p: p.count('.')):
    namespace = spec.sections[path]
    parent, _, last = path.rpartition('.')
    inside = get(result, parent) if parent else result
    if parent in spec.sections:
      if not isinstance(inside, dict) or last not in inside:
        continue  # the outer section is absent, or takes no such field
      values = inside[last]
    else:
      inside = result
      for part in filter(None, parent.split('.')):
        inside = inside.setdefault(part, {})
      values = get(config, path)
      if values is None and path in spec.unrecorded:
        continue
      if values is None and callable(namespace) and path not in spec.optional:
        values = {}
    if isinstance(values, dict):
      builder = builder_of(values, path, spec, str)
      name = {} if callable(namespace) else {'name': values['name']}
      injected = spec.injected.get(path, ())
      values = name | _filled(keywords_of(values, namespace), builder, injected)
    inside[last] = values
  return {k: as_json(v) for k, v in result.items()}


def _filled(section, builder, injected: Collection[str] = ()) -> dict[str, Any]:
  defaults = {
    k: plain_dicts(p.default)
    for k, p in parameters(builder).items()
    if p.default is not p.empty and k not in injected
  }
  return defaults | section
