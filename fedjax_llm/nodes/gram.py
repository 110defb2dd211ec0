"""The node of FLoRG: the Gram matrix of one factor between frozen frames."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank


class Gram(NamedTuple):
  """A change by one trained factor: W' = W + scale * p g' g q.

  p has orthonormal columns and q orthonormal rows. The change is zero, and so
  is its gradient, where g is zero. arXiv 2602.17095.

  >>> node = Gram(jnp.ones((1, 2)), jnp.eye(2), jnp.eye(2), jnp.float32(3))
  >>> node.factors().change().tolist()
  [[3.0, 3.0], [3.0, 3.0]]
  """

  g: Any  # [L, R, k], k the smaller of D and F
  p: Any  # [L, D, k]
  q: Any  # [L, k, F]
  scale: Any  # [L]

  FROZEN = ('p', 'q', 'scale')

  def factors(self) -> LowRank:
    a = jnp.matmul(self.p, jnp.swapaxes(self.g, -1, -2))
    return LowRank(a, jnp.matmul(self.g, self.q), self.scale)

  def weight_shape(self) -> tuple[int, ...]:
    return (*jnp.shape(self.p)[:-1], jnp.shape(self.q)[-1])
