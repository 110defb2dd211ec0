"""Gates that leave layers of a model out.

The forward pass reads the leaf 'layers/gate' [L]: a layer with gate 0 returns
its input, a layer with gate 1 is computed.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import picked
from fedjax_llm.types import Error, Params

NAME = 'gate'


def added(params: Params) -> Params:
  """Returns the tree with a gate of 1 for each layer.

  Raises:
    Error: no leaf of the tree is stacked over layers, or only over some.

  >>> added({'layers': {'q': jnp.zeros((2, 3))}})['layers']['gate']
  Array([1., 1.], dtype=float32)
  """
  if picked.of(params) is not None:
    raise Error(
      'adapter.layers: this method leaves layers out by itself; leave '
      'adapter.layers out.'
    )
  stacked = jax.tree.leaves(params.get('layers', ()))
  if not stacked:
    raise Error('there is no adapter in the layers, so none can be left out.')
  gate = jnp.ones(stacked[0].shape[:1], jnp.float32)
  return {**params, 'layers': {**params['layers'], NAME: gate}}


def without(params: Params) -> Params:
  """Returns the tree without its gates."""
  inner = params.get('layers') if isinstance(params, Mapping) else None
  if inner is None or NAME not in inner:
    return params
  return {**params, 'layers': {n: x for n, x in inner.items() if n != NAME}}
