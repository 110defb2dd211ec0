"""Compares values of a config with the annotations of a builder."""

import inspect
import numbers
import types as python_types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedjax_llm.types import known


def fits(value: Any, parameter: inspect.Parameter) -> bool:
  """Returns False only if a value clearly is none of a parameter's type."""
  if value is parameter.default:
    return True
  if isinstance(value, bool) and type(parameter.default) in (int, float):
    return False  # where the annotation is that of arrays, as in optax
  return _accepts(parameter.annotation, value)


def _accepts(annotation: Any, value: Any) -> bool:
  """Returns False only if a value clearly has another type."""
  if annotation is None or annotation is type(None):
    return value is None
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, python_types.UnionType):
    return any(_accepts(a, value) for a in args)
  if origin is typing.Literal:
    return any(type(a) is type(value) and a == value for a in args)
  if origin is typing.Annotated:
    return _accepts(args[0], value)
  of = origin or annotation
  if not isinstance(of, type) or of in (object, inspect.Parameter.empty):
    return True
  if of is bool:
    return isinstance(value, bool)
  if of is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if of is float:
    # `sweep` traces the numbers in which the runs of a population differ.
    real = isinstance(value, numbers.Real) or not known(value)
    return real and not isinstance(value, bool)
  if of is str:
    return isinstance(value, str)
  if issubclass(of, Mapping):
    return isinstance(value, Mapping)
  if issubclass(of, Collection):
    if isinstance(value, str | bytes | Mapping):
      return False  # the keys of a mapping are no sequence of values
    if not isinstance(value, Collection):
      return False
    inner = [a for a in args if a is not ...]
    return len(inner) != 1 or all(_accepts(inner[0], v) for v in value)
  # Other objects are built from a section of their own, so a dict is accepted;
  # a bare number or string is not.
  if isinstance(value, Mapping) or callable(value):
    return True
  try:
    return isinstance(value, of)
  except TypeError:
    return True


def _from_file(annotation: Any) -> bool:
  """Returns False for functions and arrays, which only Python code has."""
  if typing.get_origin(annotation) is Callable:
    return False
  library = getattr(annotation, '__module__', '').split('.')[0]
  return library not in ('jax', 'jaxlib', 'numpy')


def spell(annotation: Any) -> str:
  if annotation is inspect.Parameter.empty:
    return ''
  if isinstance(annotation, str):
    return annotation
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Literal:
    return ' or '.join(map(repr, args))
  if origin in (typing.Union, python_types.UnionType):
    simple = [a for a in args if _from_file(a)]  # those that a config may hold
    return ' or '.join(dict.fromkeys(map(spell, simple or args)))
  if annotation is None or annotation is type(None):
    return 'none'
  if isinstance(annotation, type) and not origin:
    return annotation.__name__
  return inspect.formatannotation(annotation).removeprefix('collections.abc.')
