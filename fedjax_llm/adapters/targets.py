"""Selects the weights of the base that an adapter acts on.

`find` returns the paths that the config's targets match, `grow` a tree with a
node at each of them.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedjax_llm import patterns
from fedjax_llm.types import Base, Error, Key, Params

Path = tuple[str, ...]

ALL_LINEAR = 'all-linear'


def linear_paths(base: Base) -> list[Path]:
  """Returns the path of every linear map of the base: dicts with a 'kernel'.

  >>> linear_paths({'layers': {'mlp': {'up_proj': {'kernel': 0}}}})
  [('layers', 'mlp', 'up_proj')]
  """
  paths: list[Path] = []

  def walk(node: Any, path: Path) -> None:
    if isinstance(node, dict):
      if 'kernel' in node:
        paths.append(path)
      else:
        for name in sorted(node):
          walk(node[name], (*path, name))

  walk(base, ())
  return paths


def find(
  base: Base, targets: str | Sequence[str], field: str = 'adapter.targets'
) -> list[Path]:
  """Returns the paths of the linear maps that match `targets`, sorted.

  A target is 'all-linear' (every linear map of the layers, so not the output
  head, as in PEFT) or a regular expression that matches one or more whole names
  at the end of a path: 'q_proj', 'mlp/.*', '(q|v)_proj'. A target that begins
  with '!' excludes its matches: ('all-linear', '!o_proj'). `field` names the
  targets in errors.

  Raises:
    Error: a target matches no weight (the message lists the weights), or no
      weight is left.

  >>> base = {'layers': {'q_proj': {'kernel': 0}, 'o_proj': {'kernel': 0}}}
  >>> find(base, ['q_proj'])
  [('layers', 'q_proj')]
  >>> len(find(base, 'all-linear'))
  2
  """
  paths = linear_paths(base)
  chosen: set[Path] = set()
  left_out: set[Path] = set()
  for target in (targets,) if isinstance(targets, str) else tuple(targets):
    without = isinstance(target, str) and target.startswith('!')
    name = target[1:] if without else target
    if name == ALL_LINEAR:
      hits = {p for p in paths if 'layers' in p}
    else:
      matches = patterns.matcher(name, field, within='(.*/)?({})')
      hits = {p for p in paths if matches('/'.join(p))}
    if not hits:
      names = ', '.join('/'.join(p) for p in paths) or 'none'
      raise Error(
        f'{field}: {target!r} matches no weight of the model; there are: '
        f"{names} (or 'all-linear')."
      )
    (left_out if without else chosen).update(hits)
  if left_out and not chosen - left_out:
    raise Error(f'{field}: what is left out leaves nothing of {targets!r}.')
  if not chosen:
    raise Error(f'{field} is empty: name at least one weight.')
  return sorted(chosen - left_out)


def grow(
  base: Base,
  targets: str | Sequence[str],
  key: Key,
  node: Callable[[Key, Any], Any],
) -> Params:
  """Returns a tree with `node(key, kernel)` at every target: see `find`.

  A key depends on its target's path only: adding a target changes no other
  node.
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
