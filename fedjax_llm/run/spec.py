"""The sections that a config may have, and the checks of a config.

`Spec` maps a dotted path to the namespace of its builder; `validate` raises the
error of a field that no builder knows.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from fedjax_llm.run import versions
from fedjax_llm.run.builders import (
  Label,
  check,
  check_field,
  fields,
  keywords_of,
  names,
  nearest,
  open_ended,
  parameters,
  plain_dicts,
  resolve_builder,
)
from fedjax_llm.types import Error


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


def section_of(config, path, spec, label) -> dict[str, Any]:
  """Returns the dict at `path` that an override writes into, made if absent."""
  if not path:
    return config
  parent, _, last = path.rpartition('.')
  outer = section_of(config, parent, spec, label)
  inner = outer.get(last)
  if inner is None and parent in spec.sections:
    # An inner section that the file leaves at the outer builder's default.
    builder = builder_of(outer, parent, spec, label)
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


def validate(config: dict[str, Any], spec: Spec, label: Label) -> None:
  """Checks every setting and section of a config; fills in absent sections.

  Raises:
    Error: a field is unknown or of a wrong type, or a section is missing.
  """
  scalars = {k: v for k, v in config.items() if not is_part(k, spec)}
  for key in scalars:
    if key not in parameters(spec.settings):
      raise unknown(config, key, spec, label)
  check(scalars, spec.settings, label=label)
  for path, namespace in spec.sections.items():
    parent = path.rpartition('.')[0]
    part = get(config, path)
    outer = get(config, parent) if parent else config
    if parent and parent not in spec.sections and outer is not None:
      if not isinstance(outer, dict):
        raise Error(f'{label(parent)} must be a dict, not {outer!r}.')
      for key in outer:
        if not is_part(f'{parent}.{key}', spec):
          raise unknown(config, f'{parent}.{key}', spec, label)
    if parent in spec.sections and not isinstance(part, dict):
      continue  # absent or a plain value: the outer builder checks it
    if part is None and path in spec.optional:
      continue
    if part is None and callable(namespace):
      part = section_of(config, path, spec, label)  # everything at its default
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
      builder_of(part, path, spec, label),
      keywords_of(part, namespace),
    )
    for field in keywords:
      check_moved(path, field, builder, label)
    check(
      keywords,
      builder,
      spec.injected.get(path, ()),
      lambda field, path=path: label(f'{path}.{field}'),
    )


def check_moved(section: str, field: str, builder, label: Label) -> None:
  """Raises an `Error` for a field that has moved to another section."""
  to = versions.MOVED.get((section, field))
  if to and field not in parameters(builder) and not open_ended(builder):
    place = '.'.join(to)
    raise Error(
      f'{label(f"{section}.{field}")}: this field has moved to {place}: set '
      f'--config.{place}, or {place} in the file.'
    )


def unknown(config, path: str, spec: Spec, label: Label) -> Error:
  """Returns the error of a field that does not exist, with a near one."""
  parts = path.split('.')
  depth = 0
  while is_part('.'.join(parts[: depth + 1]), spec):
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
    builder = builder_of(get(config, section) or {}, section, spec, str)
  except Error:
    return []
  return fields(builder, spec.injected.get(section, ()))


def builder_of(section, path: str, spec: Spec, label: Label):
  """Returns the builder that a section names; `path` is its place."""
  namespace = spec.sections[path]
  if callable(namespace):
    return namespace
  return resolve_builder(
    path, section.get('name'), namespace, label(f'{path}.name')
  )


def get(config: Mapping[str, Any], path: str) -> Any:
  """Returns the value of a dotted field; None where there is none."""
  value: Any = config
  for part in path.split('.'):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value


def is_part(path: str, spec: Spec) -> bool:
  """Returns True for a section and for a dict that only holds sections."""
  return any(p == path or p.startswith(f'{path}.') for p in spec.sections)
