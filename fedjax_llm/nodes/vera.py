"""The node of VeRA: two vectors between random matrices."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank


class Vera(NamedTuple):
  """Trained vectors: W' = W + p diag(d) q diag(b), with p and q frozen.

  Kopiczko et al. 2024, arXiv 2310.11454.

  >>> ones = jnp.ones((2, 2))
  >>> node = Vera(jnp.ones(2), jnp.array([1.0, 3.0]), p=ones, q=ones)
  >>> node.factors().change().tolist()
  [[2.0, 6.0], [2.0, 6.0]]
  """

  d: Any  # [L, R]
  b: Any  # [L, F]
  p: Any  # [L, D, R]
  q: Any  # [L, R, F]

  FROZEN = ('p', 'q')

  def factors(self) -> LowRank:
    return LowRank(
      a=self.p * self.d[..., None, :],
      b=self.q * self.b[..., None, :],
      scale=jnp.ones(self.d.shape[:-1], self.d.dtype),
    )

  def weight_shape(self) -> tuple[int, ...]:
    return (*jnp.shape(self.p)[:-1], jnp.shape(self.q)[-1])
