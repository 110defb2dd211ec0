"""The node of FedAMoLE: a shared low-rank expert and routed ones.

    y = x W + s x A B + sum_{e in top 2} g_e s x A_e B_e
    p = softmax over the experts held of <x A_e, x P> / sqrt(R)
    g_e = p_e / (p_i + p_j)   over the two largest, i and j

Zhang et al. 2024, arXiv 2411.19128: A, B are the expert that every token uses,
and P projects a token x to be compared with its projection x A_e of each
expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank
from fedjax_llm.types import Error

TOP = 2  # experts of the pool that a token uses


class Routing(NamedTuple):
  """The statistics of an `Experts` node on a batch, stacked over L layers.

      balance = E_k <mean over tokens of p, mean over tokens of c / 2>

  with E_k the number of experts held and c = 1 for the experts of a token. The
  balance is 1 if the tokens use all experts equally.

  >>> Routing(1.0, experts=0.0, tokens=0.0, count=8).count
  8
  """

  balance: Any  # [L]
  experts: Any  # [L, E, R] sum over the tokens of A_e x
  tokens: Any  # [L, R] sum over the tokens of P x
  count: Any  # [L] tokens


class Experts(NamedTuple):
  """A shared expert for every token, and for each token two of a pool of E.

  The change depends on the token, so it cannot be written into a weight. A
  client uses only the experts that it holds: the others have no influence,
  whatever their values, and if fewer than two are held, a token uses those.

  >>> one = jnp.ones((1, 1))
  >>> node = Experts(
  ...   shared=LowRank(one, one, jnp.float32(1)),
  ...   pool=LowRank(*jnp.float32([[[[1]], [[2]], [[9]]]] * 2), jnp.ones(3)),
  ...   router=one, held=jnp.array([1, 0, 0], jnp.uint8))
  >>> x = jnp.full((1,), 2.0)
  >>> node.act(x, jnp.zeros(1)).tolist()  # 2 + 2: one expert is held
  [4.0]
  """

  shared: LowRank  # the expert of every token
  pool: LowRank  # [L, E, ...]
  router: Any  # [L, D, R]
  held: Any  # [L, E] uint8, 1 for the experts that the client holds

  def act(self, x, y, weight=None) -> jax.Array:
    return self.act_with_statistics(x, y, weight, None)[0]

  def act_with_statistics(self, x, y, weight, real) -> tuple[jax.Array, Any]:
    """Returns y with the change of every token, and a `Routing`.

    `real` is True for tokens that count, in the leading shape of x; None skips
    the statistics. All E experts are computed, as factors of rank E R, with
    gates of zero for those that a token does not use.
    """
    del weight
    dtype = x.dtype
    cast = lambda factor: factor.astype(dtype)
    shared, pool = self.shared, self.pool
    scale = jnp.asarray(shared.scale, dtype)
    change = ((x @ cast(shared.a)) * scale) @ cast(shared.b)
    if shared.residual is not None:
      change = change + x @ cast(shared.residual)

    inner = jnp.einsum('...d,edr->...er', x, cast(pool.a))
    token = x @ cast(self.router)
    num, rank = inner.shape[-2:]
    alike = jnp.einsum(
      '...er,...r->...e', inner, token, preferred_element_type=jnp.float32
    )
    mine = self.held > 0
    p, used = _routed(alike / rank**0.5, mine)
    gate = jnp.where(used, p, 0)
    total = jnp.sum(gate, -1, keepdims=True)
    gate = gate / jnp.where(total > 0, total, 1)
    gate = (gate * pool.scale).astype(dtype)
    wide = (inner * gate[..., None]).reshape(*x.shape[:-1], num * rank)
    change = change + wide @ cast(pool.b).reshape(num * rank, -1)
    y = y + change.astype(y.dtype)
    if real is None:
      return y, None

    flat = lambda z: z.reshape(-1, *z.shape[real.ndim :]).astype(jnp.float32)
    weights = real.reshape(-1).astype(jnp.float32)
    over = lambda z: jnp.tensordot(weights, flat(z), 1)
    count = jnp.sum(weights)
    some = jnp.maximum(count, 1)
    each = over(p) / some, over(used) / (TOP * some)
    balance = jnp.sum(mine) * jnp.dot(*each)
    return y, Routing(balance, over(inner), over(token), count)

  def no_statistics(self) -> Routing:
    """Returns the statistics of zero tokens: zeros, in float32."""
    *lead, num, _, rank = self.pool.a.shape
    zeros = lambda *shape: jnp.zeros((*lead, *shape), jnp.float32)
    return Routing(zeros(), zeros(num, rank), zeros(rank), zeros())

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'which experts act depends on the token, so they cannot be written '
      'into a weight: write the shared expert alone.'
    )

  def fold(self, weight: Any) -> tuple[Any, 'Experts']:
    weight, shared = self.shared.fold(weight)
    return weight, self._replace(shared=shared)

  def weight_shape(self) -> tuple[int, ...]:
    return self.shared.weight_shape()

  def peft(self) -> Any:
    raise Error(
      'which experts act depends on the token, and PEFT has no such adapter: '
      'save the shared expert alone (`adapters.experts.shared`).'
    )


def _routed(alike: jax.Array, mine: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns probabilities over the held experts and the mask of those used."""
  low = jnp.finfo(alike.dtype).min
  alike = jnp.where(mine, alike, low)
  p = jnp.where(mine, jax.nn.softmax(alike, -1), 0)
  used = jnp.zeros(alike.shape, bool)
  for _ in range(TOP):
    left = jax.lax.stop_gradient(jnp.where(used, -jnp.inf, alike))
    best = jnp.argmax(left, -1)
    used = used | jax.nn.one_hot(best, alike.shape[-1], dtype=bool)
  return p, used & mine
