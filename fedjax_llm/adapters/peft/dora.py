"""The magnitudes of DoRA in a PEFT directory.

PEFT writes one vector a module beside its factors, `NAME.lora_magnitude_vector`
[F], and says `use_dora` of the whole adapter.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.nodes import Dora, LowRank, is_node, protocol
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
SUFFIX = 'lora_magnitude_vector'


def split(params: Params) -> tuple[Params, dict[Path, Any]]:
  """The tree with directions in the place of `Dora` nodes, and magnitudes.

  Raises:
    Error: some nodes have a magnitude and some have none; a node that has no
      form in PEFT, with its path and reason.

  >>> split({'q': Dora(LowRank(1, 2, 3), 4)})
  ({'q': LowRank(a=1, b=2, scale=3, residual=None)}, {('q',): 4})
  """
  found: dict[Path, Any] = {}
  bare: list[Path] = []

  def take(path, leaf):
    path = tuple(getattr(key, 'key', key) for key in path)
    if protocol.replacement(leaf)[0]:  # a weight that is written whole
      return leaf
    try:
      form = protocol.peft(leaf)
    except Error as error:
      raise Error(f'{"/".join(path)}: {error}') from error
    if form is None:
      return leaf
    if form.magnitude is None:
      bare.append(path)
    else:
      found[path] = form.magnitude
    return form.factors

  rest = jax.tree_util.tree_map_with_path(take, params, is_leaf=is_node)
  if found and bare:
    raise Error(
      f'{"/".join(min(bare))} has no magnitude, and {"/".join(min(found))} '
      'has one: a PEFT adapter is DoRA everywhere or nowhere.'
    )
  return rest, found


def put(params: Any, magnitudes: Mapping[Path, Any], path: Path = ()) -> Params:
  """The inverse of `split`."""
  if isinstance(params, LowRank) and path in magnitudes:
    return Dora(params, jnp.asarray(magnitudes[path], jnp.float32))
  if not isinstance(params, Mapping):
    return params
  return {n: put(x, magnitudes, (*path, n)) for n, x in params.items()}


def named(
  magnitudes: Mapping[Path, Any],
  module_name: Callable[[Path, int | None], str],
  fused: Callable[[Path], tuple[np.ndarray, int] | None],
) -> dict[str, np.ndarray]:
  """The vector of every module, by the names of the tensors.

  Raises:
    Error: a module of which only some parts have a magnitude: what the others
      have is in the base.
  """
  vectors: dict[str, np.ndarray] = {}
  for path, value in magnitudes.items():
    value = np.asarray(value, np.float32)
    place = fused(path)
    for layer in range(len(value)) if value.ndim == 2 else [None]:
      one = value if layer is None else value[layer]
      name = f'{module_name(path, layer)}.{SUFFIX}'
      if place is None:
        vectors[name] = one
        continue
      rows, total = place
      whole = vectors.setdefault(name, np.full(total, np.nan, np.float32))
      whole[rows] = one
  for name, whole in vectors.items():
    if np.isnan(whole).any():
      raise Error(
        f'{name}: only a part of this module is adapted, and PEFT wants the '
        'magnitude of all of it: name its other parts in adapter.targets too.'
      )
  return vectors


def stacked(
  vectors: Mapping[str, np.ndarray],
  path_of: Callable[[str], tuple[Any, int | None]],
  fused: Callable[[Path], tuple[np.ndarray, int] | None],
) -> dict[Path, np.ndarray]:
  """Magnitudes by the paths of our tree, [L, F], from vectors by module."""
  layers: dict[Path, dict[int | None, np.ndarray]] = {}
  for name, vector in vectors.items():
    paths, layer = path_of(name)
    paths = paths if isinstance(paths[0], tuple) else (paths,)
    for path in paths:
      place = fused(path) if len(paths) > 1 else None
      one = vector if place is None else vector[place[0]]
      layers.setdefault(path, {})[layer] = one
  return {
    path: found[None]
    if None in found
    else np.stack([found[layer] for layer in range(len(found))])
    for path, found in layers.items()
  }
