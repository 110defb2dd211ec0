"""The node of FedLEASE: a client's own factors, then experts of clusters.

    warm-up:  y = x W + s x A B
    then:     y = x W + s sum_{i in top M} g_i x A_e(i) B_e(i),
              e(i) = i for i < E, the client's own expert for i >= E

with g the softmax of x's router over 2 M - 1 outputs, made to sum to one over
the M largest. The outputs i >= E are copies of the client's own expert, so a
token uses one to M experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank
from fedjax_llm.types import Error


class Leased(NamedTuple):
  """A client's own factors, and a pool of E experts with a router each.

  Without an expert in use (`live` is zero) the own factors act, otherwise the
  experts. M is the number of experts in use, at most E. Which experts act
  depends on the token, so the change cannot be written into a weight.

  >>> one = LowRank(*jnp.ones((2, 1, 1)), jnp.float32(1))
  >>> node = Leased(
  ...   own=one, pool=LowRank(jnp.float32([[[2]], [[5]]]), jnp.ones((2, 1, 1)),
  ...   jnp.ones(2)), router=jnp.zeros((2, 1, 3)), cluster=jnp.array([1.0, 0]),
  ...   live=jnp.array([1.0, 0]))
  >>> x = jnp.full((1,), 3.0)
  >>> node.act(x, jnp.zeros(1)).tolist()  # one expert
  [6.0]
  >>> node._replace(live=jnp.zeros(2)).act(x, jnp.zeros(1)).tolist()
  [3.0]
  """

  own: LowRank  # of the warm-up
  pool: LowRank  # [L, E, ...]
  router: Any  # [L, E, D, 2E - 1], of each cluster
  cluster: Any  # [L, E] float32, 1 at the client's own expert
  live: Any  # [L, E] float32, 1 for the experts in use, which are the first

  def act(self, x, y, weight=None) -> jax.Array:
    alone = self.own.act(x, jnp.zeros_like(y), weight)
    gate = self.gates(x).astype(x.dtype)  # [..., E]
    pool = self.pool
    inner = jnp.einsum('...d,edr->...er', x, pool.a.astype(x.dtype))
    gate = gate * pool.scale.astype(x.dtype)
    wide = inner * gate[..., None]
    wide = wide.reshape(*x.shape[:-1], -1)
    mixed = wide @ pool.b.astype(x.dtype).reshape(wide.shape[-1], -1)
    some = jnp.any(self.live > 0)
    return y + jnp.where(some, mixed.astype(y.dtype), alone)

  def gates(self, x) -> jax.Array:
    """Returns the weight of each expert for tokens x [..., D], [..., E]."""
    num = self.live.shape[-1]
    router = jnp.einsum('e,edo->do', self.cluster, self.router)
    score = (x @ router.astype(x.dtype)).astype(jnp.float32)
    used = jnp.sum(self.live)  # M
    copies = jnp.arange(num - 1) < used - 1
    valid = jnp.concatenate([self.live > 0, copies])
    low = jnp.finfo(jnp.float32).min
    p = jnp.where(valid, jax.nn.softmax(jnp.where(valid, score, low), -1), 0.0)
    order = jnp.where(valid, -jax.lax.stop_gradient(score), jnp.inf)
    place = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
    p = jnp.where(place < used, p, 0.0)
    total = jnp.sum(p, -1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    mine = jnp.sum(p[..., num:], -1, keepdims=True)
    return p[..., :num] + mine * self.cluster

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'which experts act depends on the token, so they cannot be written into '
      'a weight.'
    )

  def weight_shape(self) -> tuple[int, ...]:
    return self.own.weight_shape()

  def peft(self) -> Any:
    raise Error(
      'which experts act depends on the token, and PEFT has no such adapter.'
    )
