"""Cuts the parameters of an adapter at a layer, and joins them again.

`at_layer` and `around_layers` return `Halves`, `joined` the whole tree.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import picked
from fedjax_llm.nodes import Halves
from fedjax_llm.types import Error, Params

# The modules that a network applies before its first layer.
FRONT = (
  *('inputs', 'embed_tokens', 'embed_positions', 'embed_types', 'embed_norm'),
)


def at_layer(params: Params, cut: int, who: str = 'the cut') -> Halves:
  """Returns an adapter as embeddings and layers below `cut`, and all above.

  A half has no entry 'layers' where it has no layer.

  Args:
    params: leaves under 'layers' are stacked over the L layers.
    cut: from 0 to L, the number of layers below the cut.
    who: the first words of error messages, such as the method.

  Raises:
    Error: a cut out of range; leaves that are not stacked over all layers.

  >>> params = {'layers': {'q': jnp.arange(3)}, 'lm_head': jnp.ones(2)}
  >>> below, above = at_layer(params, 1)
  >>> below, above['layers'], sorted(above)
  ({'layers': {'q': Array([0], dtype=int32)}}, \
{'q': Array([1, 2], dtype=int32)}, ['layers', 'lm_head'])
  """
  num = num_layers(params, who)
  if not 0 <= cut <= num:
    raise Error(
      f'{who}: cut is {cut}; it must be from 0 to {num}, the number of layers.'
    )
  front = {name: x for name, x in params.items() if name in FRONT}
  back = {
    name: x for name, x in params.items() if name not in (*FRONT, 'layers')
  }
  if cut:
    front['layers'] = rows(params['layers'], slice(None, cut))
  if cut < num:
    back['layers'] = rows(params['layers'], slice(cut, None))
  return Halves(front, back)


def around_layers(params: Params) -> Halves:
  """Returns an adapter as embeddings and head, and its layers.

  >>> both = around_layers({'layers': {'q': 1}, 'lm_head': 2, 'inputs': 3})
  >>> both.client, both.server
  ({'lm_head': 2, 'inputs': 3}, {'layers': {'q': 1}})
  """
  outside = {name: x for name, x in params.items() if name != 'layers'}
  layers = {name: x for name, x in params.items() if name == 'layers'}
  return Halves(outside, layers)


def joined(parts: Halves) -> Params:
  """Returns the adapter of both halves.

  >>> params = {'layers': {'q': jnp.arange(3)}, 'lm_head': jnp.ones(2)}
  >>> joined(at_layer(params, 2))['layers']['q'].tolist()
  [0, 1, 2]
  """
  client, server = parts
  whole = {**client, **server}
  if 'layers' in client and 'layers' in server:
    whole['layers'] = stacked(client['layers'], server['layers'])
  return whole


def stacked(below: Any, above: Any) -> Any:
  """Returns leaves [M, ...] and [N, ...] as [M + N, ...].

  >>> stacked({'q': jnp.ones(1)}, {'q': jnp.ones(2)})['q'].shape
  (3,)
  """
  both = lambda x, y: jnp.concatenate([x, y])
  return jax.tree.map(both, below, above)


def rows(layers: Any, index: Any) -> Any:
  """Returns rows of leaves that are stacked over layers, [L, ...].

  >>> rows({'q': jnp.arange(4)}, jnp.array([0, 3]))['q'].tolist()
  [0, 3]
  """
  return jax.tree.map(lambda x: x[index], layers)


def num_layers(params: Params, who: str) -> int:
  """Returns L, over which all leaves under 'layers' are stacked.

  Raises:
    Error: there is no such leaf, or leaves differ in L.

  >>> num_layers({'layers': {'q': jnp.ones((3, 2))}}, 'the cut')
  3
  """
  below = params.get('layers') if isinstance(params, Mapping) else None
  if picked.of(params) is not None:
    raise Error(
      f'{who} needs an adapter in all layers: leave adapter.layers out.'
    )
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(below)}
  if len(sizes) != 1 or sizes == {()}:
    raise Error(f'{who} needs an adapter whose leaves are stacked over layers.')
  return sizes.pop()[0]
