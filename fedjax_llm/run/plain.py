"""Values of a config as JSON has them, and the fields in which two differ."""

import enum
import os
from collections.abc import Collection, Mapping
from typing import Any

from fedjax_llm.run.builders import (
  plain_dicts,
)


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
  left, right = (dict(flatten(as_json(plain_dicts(x)))) for x in (a, b))
  absent = object()
  return [
    path
    for path in sorted(left.keys() | right.keys())
    if not any(path == i or path.startswith(f'{i}.') for i in ignore)
    # repr, so that NaN equals NaN and 1 is not True.
    and repr(left.get(path, absent)) != repr(right.get(path, absent))
  ]


def as_json(x: Any) -> Any:
  """Returns a value that JSON can hold; functions become import paths."""
  if isinstance(x, Mapping):
    return {str(k): as_json(v) for k, v in x.items()}
  if isinstance(x, enum.Enum):
    return as_json(x.value)
  if x is None or isinstance(x, bool | int | float | str):
    return x
  if isinstance(x, list | tuple):
    return [as_json(v) for v in x]
  if isinstance(x, set | frozenset):
    return sorted(map(as_json, x), key=repr)
  if isinstance(x, os.PathLike):
    return os.fspath(x)
  if hasattr(x, 'tolist'):  # NumPy and JAX arrays and scalars
    return x.tolist()
  of = x if hasattr(x, '__qualname__') else type(x)
  return f'{of.__module__}:{of.__qualname__}'


def flatten(x: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
  leaves = []
  for key, item in x.items():
    if isinstance(item, Mapping) and item:
      leaves += flatten(item, f'{prefix}{key}.')
    else:
      leaves.append((f'{prefix}{key}', item))
  return leaves
