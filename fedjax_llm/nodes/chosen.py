"""The node of a weight that is trained in some layers only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chosen(NamedTuple):
  """Adds to a stacked weight in some layers: W_l' = W_l + delta_i, l = l_i.

  Only the C chosen layers are trained and sent.

  >>> node = Chosen(jnp.ones((1, 2)), jnp.array([2]), jnp.zeros(3))
  >>> node.plain().tolist()
  [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
  """

  delta: Any  # [C, ...]
  layers: Any  # [C] int32
  like: Any  # [L] int8 zeros, so that the number of layers is a shape

  PLACES = ('kernel', 'bias', 'scale')
  FROZEN = ('layers', 'like')

  def plain(self) -> jax.Array:
    size = (self.like.shape[0], *self.delta.shape[1:])
    zeros = jnp.zeros(size, self.delta.dtype)
    return zeros.at[self.layers].set(self.delta)
