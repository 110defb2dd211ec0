"""Which weights of the base an adapter acts on."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedjax_llm import patterns
from fedjax_llm.types import Base, Error, Key, Params

Path = tuple[str, ...]

ALL_LINEAR = 'all-linear'


def linear_paths(base: Base) -> list[Path]:
  """Paths of every linear map of the base: nodes that hold a 'kernel'.

  >>> linear_paths({'layers': {'mlp': {'up_proj': {'kernel': 0}}}})
  [('layers', 'mlp', 'up_proj')]
  """
  found: list[Path] = []

  def walk(node: Any, path: Path) -> None:
    if isinstance(node, dict):
      if 'kernel' in node:
        found.append(path)
      else:
        for name in sorted(node):
          walk(node[name], (*path, name))

  walk(base, ())
  return found


def find(base: Base, targets: str | Sequence[str]) -> list[Path]:
  """Paths of the linear maps that `targets` names, sorted.

  A target is 'all-linear' (every linear map of the layers, so not the output
  head, as in PEFT) or a regular expression that matches the end of a path,
  from one name on: 'q_proj', 'mlp/.*', '(q|v)_proj'.

  Raises:
    Error: a target matches nothing; the message lists what there is.

  >>> base = {'layers': {'q_proj': {'kernel': 0}, 'o_proj': {'kernel': 0}}}
  >>> find(base, ['q_proj'])
  [('layers', 'q_proj')]
  >>> len(find(base, 'all-linear'))
  2
  """
  paths = linear_paths(base)
  chosen: set[Path] = set()
  for target in (targets,) if isinstance(targets, str) else tuple(targets):
    if target == ALL_LINEAR:
      hits = {p for p in paths if p[0] == 'layers'}
    else:
      matches = patterns.matcher(
        target, 'adapter.targets', within=r'(.*/)?({})'
      )
      hits = {p for p in paths if matches('/'.join(p))}
    if not hits:
      names = ', '.join('/'.join(p) for p in paths) or 'none'
      raise Error(
        f'adapter.targets: {target!r} matches no weight of the model; there '
        f"are: {names} (or 'all-linear')."
      )
    chosen |= hits
  if not chosen:
    raise Error('adapter.targets is empty: name at least one weight.')
  return sorted(chosen)


def grow(
  base: Base,
  targets: str | Sequence[str],
  key: Key,
  node: Callable[[Key, Any], Any],
) -> Params:
  """The tree that has `node(key, kernel)` at every target: see `find`.

  Keys follow from the names of the targets: adding one changes no other.
  """
  params: dict[str, Any] = {}
  for path in find(base, targets):
    name_key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
    module, parent = base, params
    for name in path:
      module = module[name]
    for name in path[:-1]:
      parent = parent.setdefault(name, {})
    parent[path[-1]] = node(name_key, module['kernel'])
  return params
