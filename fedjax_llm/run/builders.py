"""Builders by name, checked against their own signatures.

A section of a config is `dict(name=..., **keywords)`: the name is looked up in
a namespace (a module's `__all__`, or a mapping), and the keywords are those of
that builder.
"""

import contextlib
import contextvars
import difflib
import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from fedjax_llm.run import annotations
from fedjax_llm.types import Error

Builder = Callable[..., Any]
Label = Callable[[str], str]  # a dotted field -> its name in messages

# The source of names that may only resolve to the project's own builders, and
# the flag that lifts this restriction.
_confined: contextvars.ContextVar[tuple[str, str] | None] = (
  contextvars.ContextVar('confined', default=None)
)

_DEPTH = 64  # the most levels of a config: far fewer are of use

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@contextlib.contextmanager
def confined(source: str, flag: str, trusted: bool = False) -> Iterator[None]:
  """Restricts `resolve_builder` to the project's own builders, as a context.

  It guards against import paths in untrusted files, since an import path runs
  code.

  Args:
    source: the file, for messages.
    flag: the command line flag that allows import paths, for messages.
    trusted: True if the user has passed that flag: nothing is restricted.

  >>> with confined('config.json', '--trust'):
  ...   resolve_builder('norm', 'os:system', {})
  Traceback (most recent call last):
  fedjax_llm.types.Error: norm.name: config.json names the function os:system, \
which is none of the project's; if you know and trust it, pass --trust.
  """
  token = _confined.set(None if trusted else (source, flag))
  try:
    yield
  finally:
    _confined.reset(token)


def _refuse_foreign(label: str, name: str) -> None:
  if (where := _confined.get()) is not None:
    source, flag = where
    raise Error(
      f'{label}: {source} names the function {name}, which is none of the '
      f"project's; if you know and trust it, pass {flag}."
    )


def resolve_builder(
  section: str, name: Any, namespace: Any, label: str = ''
) -> Builder:
  """Returns the builder `name` of a module, a mapping, or an import path.

  A name that is itself a function (in a notebook) is returned as it is.

  >>> resolve_builder('norm', 'largest', {'largest': max})(3, 4)
  4
  >>> resolve_builder('norm', 'math:hypot', {})(3, 4)
  5.0

  Raises:
    Error: there is no such builder; the message lists the names, the nearest
      first.
  """
  if callable(name):
    return name
  label = label or f'{section}.name'
  known = names(namespace)
  if isinstance(name, str) and name in known:
    return known[name]
  if isinstance(name, str) and ':' in name:
    _refuse_foreign(label, name)
    module_name, _, attribute = name.partition(':')
    try:
      module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
      raise Error(f'{label}: cannot import {module_name}: {error}.') from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
      near = nearest(attribute, names(module))
      raise Error(f'{label}: {module_name} has no {attribute!r} {near}.')
    return builder
  if name is None:
    what = f'{label} is missing'
  else:
    what = f'{label}: there is no {name!r}'
  near = nearest(name, known)
  raise Error(f"{what} {near}; one's own is named 'package.module:function'.")


def check(
  section: Mapping[str, Any],
  builder: Builder,
  injected: Collection[str] = (),
  label: Label = str,
) -> None:
  """Checks the keywords of a section (without `name`) against a signature.

  Keywords in `injected` come from the program and may not be set; `label`
  returns a field's name in messages. Types are checked for plain annotations:
  numbers, strings, booleans, Literal, and unions and sequences of these.

  Raises:
    Error: the builder does not take a keyword (the message names the nearest),
      a required keyword is missing, or a value has another type.
  """
  known = parameters(builder)
  for field, setting in section.items():
    check_field(field, builder, injected, label, field)
    parameter = known.get(field)
    if parameter is not None and setting is parameter.default:
      continue
    if field != 'seed':  # which may have 64 bits
      check_numbers(setting, label(field))
    if parameter is None or annotations.fits(setting, parameter):
      continue
    allowed = annotations.spell(parameter.annotation)
    raise Error(f'{label(field)} must be {allowed}, not {setting!r}.')
  for field, parameter in known.items():
    if parameter.default is parameter.empty and (
      field not in section and field not in injected
    ):
      what = annotations.spell(parameter.annotation)
      of = f', {what}' if what else ''
      # The settings of a run have no builder that a user could know.
      who = 'a config' if isinstance(builder, type) else _title(builder)
      raise Error(f'{label(field)} is missing: {who} needs it{of}.')


_LARGEST = 2**31 - 1  # the largest whole number on devices


def check_numbers(value: Any, name: str) -> None:
  """Raises an `Error` for a number that is not finite or exceeds 32 bits.

  The 32 bits hold whole numbers only. Mappings, lists and tuples are checked at
  every depth.

  >>> check_numbers({'b1': float('nan')}, 'local')
  Traceback (most recent call last):
  fedjax_llm.types.Error: local.b1 is nan, but must be a finite number.
  """
  if isinstance(value, Mapping):
    for key, inner in value.items():
      check_numbers(inner, f'{name}.{key}')
  elif isinstance(value, list | tuple):
    for inner in value:
      check_numbers(inner, name)
  elif isinstance(value, float) and not math.isfinite(value):
    raise Error(f'{name} is {value}, but must be a finite number.')
  elif isinstance(value, int) and abs(value) > _LARGEST:
    raise Error(
      f'{name} is {value:,}, but must be a whole number from -{_LARGEST:,} to '
      f'{_LARGEST:,}.'
    )


def build(
  section: Mapping[str, Any], namespace: Any, /, **injected: Any
) -> Any:
  """Calls a section's builder with its keywords and those of `injected`.

  Of `injected` the builder gets the keywords that its signature names.

  >>> scale = lambda x, *, factor=2: x * factor
  >>> build({'name': 'scale', 'factor': 3}, {'scale': scale}, x=5, y=6)
  15
  """
  section = plain_dicts(section)
  builder = namespace
  if not callable(namespace):
    builder = resolve_builder('', section.get('name'), namespace, 'name')
  keywords = keywords_of(section, namespace)
  check(keywords, builder, injected)
  taken = parameters(builder)
  return builder(
    **keywords, **{k: v for k, v in injected.items() if k in taken}
  )


def onward(builder: Builder, *receivers: Builder) -> Builder:
  """Returns the builder with its **keywords named: those of `receivers`.

  The keywords that a builder passes on are then checked, and their defaults
  recorded, as if the builder named them itself.

  >>> def inner(*, size=1): return size
  >>> def outer(*, factor=2, **keywords): return factor * inner(**keywords)
  >>> fields(onward(outer, inner))
  ['factor', 'size']
  """
  known = parameters(builder)
  for receiver in receivers:
    known = parameters(receiver) | known
  order = [*parameters(builder), *known]
  keyword = inspect.Parameter.KEYWORD_ONLY
  merged = [known[k].replace(kind=keyword) for k in dict.fromkeys(order)]

  @functools.wraps(builder)
  def built(**keywords):
    return builder(**keywords)

  if not hasattr(builder, '__name__'):  # a functools.partial
    built.__name__ = _title(receivers[0])
  built.__signature__ = inspect.Signature(merged)  # type: ignore
  return built


def check_field(
  field: str,
  builder: Builder,
  injected: Collection[str],
  label: Label,
  path: str,
) -> None:
  """Raises an `Error` unless a config may set this keyword of the builder."""
  if field in injected:
    raise Error(f'{label(path)} is filled in by the program; leave it out.')
  if field not in parameters(builder) and not open_ended(builder):
    near = nearest(field, fields(builder, injected))
    raise Error(f'{label(path)}: {_title(builder)} takes no {field!r} {near}.')


def keywords_of(section: Mapping[str, Any], namespace: Any) -> dict[str, Any]:
  """Returns a section without its `name`, if its namespace needs one."""
  if callable(namespace):
    return dict(section)
  return {k: v for k, v in section.items() if k != 'name'}


def named(section: Any) -> Any:
  """Returns the name of a section; None of anything else.

  >>> named({'name': 'iid'}), named(None)
  ('iid', None)
  """
  return section.get('name') if isinstance(section, Mapping) else None


def plain_dicts(x: Any, path: tuple[str, ...] = ()) -> Any:
  """Returns a copy with ConfigDicts and mappings as dicts, at every depth.

  Raises:
    Error: a value is nested more than 64 deep; `path` is the field of x.

  >>> plain_dicts({'a': {'b': [1, {'c': 2}]}})
  {'a': {'b': [1, {'c': 2}]}}
  """
  if len(path) > _DEPTH:
    # Numbers are places in lists; the field is what stands before them.
    keys = itertools.takewhile(lambda key: not key.isdecimal(), path[:4])
    raise Error(
      f'config: {".".join(keys)} is nested more than {_DEPTH} levels deep.'
    )
  if hasattr(x, 'to_dict'):
    x = x.to_dict()
  if isinstance(x, Mapping):
    return {k: plain_dicts(v, (*path, str(k))) for k, v in x.items()}
  if type(x) is not list:
    return x
  return [plain_dicts(v, (*path, str(i))) for i, v in enumerate(x)]


def names(namespace: Any) -> dict[str, Builder]:
  """Returns the builders of a mapping, or the public functions of a module."""
  if isinstance(namespace, Mapping):
    return dict(namespace)
  public = getattr(namespace, '__all__', None) or [
    name for name in dir(namespace) if not name.startswith('_')
  ]
  builders = {name: getattr(namespace, name) for name in public}
  return {
    k: v for k, v in builders.items() if callable(v) and not isinstance(v, type)
  }


def _signature(builder: Builder) -> inspect.Signature:
  try:
    return inspect.signature(builder, eval_str=True)
  except Exception:  # an annotation that only a type checker can see
    return inspect.signature(builder)


def parameters(builder: Builder) -> dict[str, inspect.Parameter]:
  """Returns the parameters of the signature without *args and **keywords."""
  declared = _signature(builder).parameters
  return {k: p for k, p in declared.items() if p.kind not in _VARIADIC}


def open_ended(builder: Builder) -> bool:
  """Returns True for a builder that takes **keywords.

  >>> open_ended(lambda **more: more), open_ended(lambda x: x)
  (True, False)
  """
  kinds = [p.kind for p in _signature(builder).parameters.values()]
  return inspect.Parameter.VAR_KEYWORD in kinds


def fields(builder: Builder, injected: Collection[str] = ()) -> list[str]:
  """Returns the keywords that a config may set."""
  return [k for k in parameters(builder) if k not in injected]


def _title(builder: Builder) -> str:
  return getattr(builder, '__name__', type(builder).__name__)


def nearest(name: Any, names: Iterable[str]) -> str:
  """Returns '(the nearest is ...; there are ...)', the end of a message."""
  known = list(names)
  if not known:
    return '(there are none)'
  near = difflib.get_close_matches(str(name), known, 1, 0.4)
  start = f'the nearest is {near[0]!r}; ' if near else ''
  return f'({start}there are {", ".join(known)})'
