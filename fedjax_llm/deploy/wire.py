"""Trees as named arrays, as they travel: factors have the names of PEFT.

`pack` returns a mapping of names to arrays, `unpack` the tree again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.models import families
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error

_FACTORS = {'a': 'lora_A', 'b': 'lora_B'}


class _Part(NamedTuple):
  """One array of a message, and its place in the tree."""

  name: str
  leaf: int  # its number among the leaves
  layer: int | None  # a row of a leaf that is stacked over layers
  transposed: bool


def _parts(template: Any, network: Any) -> list[_Part]:
  parts: list[_Part] = []
  flat, _ = jax.tree_util.tree_flatten_with_path(template)
  nodes = _nodes(template)
  for number, (path, leaf) in enumerate(flat):
    keys = [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
    at = keys.index('layers') if 'layers' in keys else 0
    front, module = ''.join(f'{key}/' for key in keys[:at]), keys[at:-1]
    field = keys[-1] if keys else ''
    node = nodes.get('/'.join(keys[:-1]))
    found = node is not None and field in _FACTORS
    layers = range(leaf.shape[0]) if found and leaf.ndim == 3 else (None,)
    try:
      names = [
        families.hf_module_name('/'.join(module), layer, network, part=True)
        for layer in layers
      ]
    except Error:  # a module that Hugging Face's model does not have
      found = False
    if not found:
      parts.append(_Part('/'.join(keys), number, None, False))
      continue
    for layer, name in zip(layers, names):
      name = f'{front}base_model.model.{name}.{_FACTORS[field]}.weight'
      parts.append(_Part(name, number, layer, True))
  return parts


def _nodes(tree: Any) -> dict[str, LowRank]:
  """Returns the `LowRank` nodes of a tree by path."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: isinstance(x, LowRank)
  )
  word = lambda k: str(getattr(k, 'key', getattr(k, 'name', k)))
  return {
    '/'.join(map(word, path)): x for path, x in flat if isinstance(x, LowRank)
  }


def pack(tree: Any, network: Any) -> dict[str, np.ndarray]:
  """Returns the leaves of a tree by name, as NumPy arrays.

  Factors of `LowRank` nodes are named and laid out as in PEFT, a layer each
  (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, [R, D]).
  Other leaves have their path in the tree as a name, and what stands above
  'layers' in the path stands before PEFT's name.

  >>> from fedjax_llm import models
  >>> node = LowRank(np.ones((2, 4, 1)), np.ones((2, 1, 3)), None)
  >>> tree = {'layers': {'self_attn': {'q_proj': node}}}
  >>> arrays = pack(tree, models.random().config)
  >>> sorted(arrays)[0], sorted(arrays.values(), key=np.size)[0].shape
  ('base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', (3, 1))
  """
  leaves = jax.device_get(jax.tree.leaves(tree))
  arrays = {}
  for part in _parts(tree, network):
    x = np.asarray(leaves[part.leaf])
    x = x if part.layer is None else x[part.layer]
    arrays[part.name] = np.array(x.T if part.transposed else x, order='C')
  return arrays


def unpack(arrays: Mapping[str, np.ndarray], template: Any, network: Any):
  """Returns the tree of packed arrays; `template` has its shapes and dtypes.

  Raises:
    Error: an array is missing, unknown, or of another shape.

  >>> from fedjax_llm import models
  >>> tree, network = {'w': np.arange(3.0)}, models.random().config
  >>> unpack(pack(tree, network), tree, network)['w'].tolist()
  [0.0, 1.0, 2.0]
  """
  leaves, structure = jax.tree.flatten(template)
  parts = _parts(template, network)
  known = {part.name for part in parts}
  if unknown := sorted(set(arrays) - known):
    raise Error(f'the message has {unknown[0]}, which this method does not.')
  rows: dict[int, list[np.ndarray]] = {}
  for part in parts:
    if part.name not in arrays:
      raise Error(f'the message lacks {part.name}.')
    leaf = leaves[part.leaf]
    x = np.asarray(arrays[part.name])
    x = x.T if part.transposed else x
    wanted = leaf.shape if part.layer is None else leaf.shape[1:]
    if x.shape != tuple(wanted):
      raise Error(
        f'the message has {part.name} of shape {x.shape}; it must be '
        f'{tuple(wanted)}.'
      )
    rows.setdefault(part.leaf, []).append(x.astype(leaf.dtype))
  joined = [
    np.stack(rows[i]) if leaves[i].ndim > rows[i][0].ndim else rows[i][0]
    for i in range(len(leaves))
  ]
  return jax.tree.unflatten(structure, joined)
