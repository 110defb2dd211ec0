"""Layers that take part in the network, and layers that are left out.

The leaf 'layers/gate' [L] says so to the forward pass of a model: a layer whose
gate is 0 passes its input on.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_llm.types import Error, Params

NAME = 'gate'


def added(params: Params) -> Params:
  """The tree with an open gate a layer.

  Raises:
    Error: nothing in it is stacked over layers.

  >>> added({'layers': {'q': jnp.zeros((2, 3))}})['layers']['gate']
  Array([1., 1.], dtype=float32)
  """
  stacked = jax.tree.leaves(params.get('layers', ()))
  if not stacked:
    raise Error('there is no adapter in the layers, so none can be left out.')
  gate = jnp.ones(stacked[0].shape[:1], jnp.float32)
  return {**params, 'layers': {**params['layers'], NAME: gate}}


def without(params: Params) -> Params:
  """The tree without its gates."""
  inner = params.get('layers') if isinstance(params, Mapping) else None
  if inner is None or NAME not in inner:
    return params
  return {**params, 'layers': {n: x for n, x in inner.items() if n != NAME}}
