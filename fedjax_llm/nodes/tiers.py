"""The node of HiLoRA: factors of all clients, of a cluster, of one client."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank


class Tiers(NamedTuple):
  """A change in three tiers: W' = W + s (a_r b_r + a_c b_c + a_l b_l).

  r is the root, c the client's cluster of a pool of C, l its own leaf. All have
  one scale. Without a cluster the tier in the middle is zero.

  >>> one = LowRank(*jnp.ones((2, 1, 1)), jnp.float32(2))
  >>> pool = LowRank(jnp.float32([[[1]], [[5]]]), jnp.ones((2, 1, 1)), None)
  >>> node = Tiers(one, pool, one, cluster=jnp.array([0.0, 1.0]))
  >>> node.factors().change().tolist()  # 2 (1 + 5 + 1)
  [[14.0]]
  """

  root: LowRank
  middle: LowRank  # [L, C, ...]
  leaf: LowRank
  cluster: Any  # [L, C] float32, 1 at the client's own

  FROZEN = ('cluster',)

  def chosen(self) -> LowRank:
    """Returns the factors of the client's own cluster."""
    pick = lambda x: jnp.einsum(
      '...c,...cij->...ij', self.cluster, x, precision=jax.lax.Precision.HIGHEST
    )
    return LowRank(pick(self.middle.a), pick(self.middle.b), self.root.scale)

  def factors(self) -> LowRank:
    parts = self.root, self.chosen(), self.leaf
    return LowRank(
      jnp.concatenate([x.a for x in parts], -1),
      jnp.concatenate([x.b for x in parts], -2),
      self.root.scale,
    )

  def weight_shape(self) -> tuple[int, ...]:
    return self.root.weight_shape()
