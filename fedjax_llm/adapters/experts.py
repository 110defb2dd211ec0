"""A pool of low-rank experts, of which every token uses a few.

    y = x W + s x A B + sum_{e in top 2} g_e s x A_e B_e
    p = softmax over the experts held of <x A_e, x P> / sqrt(R)
    g_e = p_e / (p_i + p_j)   over the two largest, i and j

The layer of FedAMoLE (Zhang et al. 2024, arXiv 2411.19128): A, B belong to an
expert for every token, and P projects a token for its comparison with what each
expert's own A makes of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import asides
from fedjax_llm.adapters import multi
from fedjax_llm.types import Error, Experts, Key, LowRank, Params, Routing

TOP = 2  # experts of the pool that a token uses


def added(x: jax.Array, node: Experts) -> jax.Array:
  """What the experts add to x @ W, [..., D] -> [..., F].

  `node` is that of one layer. An expert that is not held has no influence,
  whatever is in it; where fewer than two are held, a token uses those. All E
  experts are computed, as factors of rank E R, and the gates of those that a
  token does not use are zero.

  To who listens it tells a `Routing` of the tokens that are real:

      balance = E_k <mean over tokens of p, mean over tokens of c / 2>

  with E_k the experts held and c = 1 for the experts of a token.

  >>> one = jnp.ones((1, 1))
  >>> node = Experts(
  ...   shared=LowRank(one, one, jnp.float32(1)),
  ...   pool=LowRank(*jnp.float32([[[[1]], [[2]], [[9]]]] * 2), jnp.ones(3)),
  ...   router=one, held=jnp.array([1, 0, 0], jnp.uint8))
  >>> added(jnp.full((1,), 2.0), node).tolist()  # 2 + 2: one expert is held
  [4.0]
  """
  dtype = x.dtype
  cast = lambda factor: factor.astype(dtype)
  shared, pool = node.shared, node.pool
  scale = jnp.asarray(shared.scale, dtype)
  y = ((x @ cast(shared.a)) * scale) @ cast(shared.b)
  if shared.residual is not None:
    y = y + x @ cast(shared.residual)

  inner = jnp.einsum('...d,edr->...er', x, cast(pool.a))
  token = x @ cast(node.router)
  num, rank = inner.shape[-2:]
  alike = jnp.einsum(
    '...er,...r->...e', inner, token, preferred_element_type=jnp.float32
  )
  mine = node.held > 0
  p, used = _routed(alike / rank**0.5, mine)
  gate = jnp.where(used, p, 0)
  total = jnp.sum(gate, -1, keepdims=True)
  gate = gate / jnp.where(total > 0, total, 1)
  gate = (gate * pool.scale).astype(dtype)
  wide = (inner * gate[..., None]).reshape(*x.shape[:-1], num * rank)
  y = y + wide @ cast(pool.b).reshape(num * rank, -1)

  def routing(where) -> Routing:
    flat = lambda z: z.reshape(-1, *z.shape[where.ndim :]).astype(jnp.float32)
    real = where.reshape(-1).astype(jnp.float32)
    over = lambda z: jnp.tensordot(real, flat(z), 1)
    count = jnp.sum(real)
    some = jnp.maximum(count, 1)
    each = over(p) / some, over(used) / (TOP * some)
    return Routing(
      balance=jnp.sum(mine) * jnp.dot(*each),
      experts=over(inner),
      tokens=over(token),
      count=count,
    )

  asides.tell(node, routing)
  return y


def _routed(alike: jax.Array, mine: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Probabilities over the experts held, and which ones a token uses."""
  low = jnp.finfo(alike.dtype).min
  alike = jnp.where(mine, alike, low)
  p = jnp.where(mine, jax.nn.softmax(alike, -1), 0)
  used = jnp.zeros(alike.shape, bool)
  for _ in range(TOP):
    left = jax.lax.stop_gradient(jnp.where(used, -jnp.inf, alike))
    best = jnp.argmax(left, -1)
    used = used | jax.nn.one_hot(best, alike.shape[-1], dtype=bool)
  return p, used & mine


def pooled(key: Key, params: Params, num_experts: int) -> Params:
  """Every low-rank node as the shared expert beside a pool of new ones.

  All A_e and P are uniform in +-1/sqrt(D), all B_e zero: what is computed does
  not change. Nobody holds an expert.

  Raises:
    Error: no low-rank node; one that is not in the layers.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> wide = pooled(jax.random.key(0), {'layers': {'q': node}}, num_experts=6)
  >>> wide['layers']['q'].pool.a.shape, wide['layers']['q'].router.shape
  ((2, 6, 5, 4), (2, 5, 4))
  """
  inner = params.get('layers', {})
  is_node = lambda x: isinstance(x, LowRank)
  within, everywhere = (
    sum(map(is_node, jax.tree.leaves(x, is_leaf=is_node)))
    for x in (inner, params)
  )
  if not within or within < everywhere:
    raise Error(
      'experts stand beside low-rank factors in the layers, and only there: '
      'adapter.name=lora with targets in the layers.'
    )
  keys = jax.random.split(key, num_experts + 1)
  nodes = jax.tree.map(
    lambda x: x if is_node(x) else None, inner, is_leaf=is_node
  )
  drawn = jax.vmap(lambda one: multi.fresh(one, nodes))(keys)

  def node(x: Any, new: Any) -> Any:
    if not is_node(x):
      return x
    each = lambda z: jnp.moveaxis(z[:-1], 0, 1)
    pool = LowRank(each(new.a), each(new.b), each(new.scale))
    held = jnp.zeros(pool.scale.shape, jnp.uint8)
    return Experts(x, pool, new.a[-1], held)

  return {
    **params,
    'layers': jax.tree.map(node, inner, drawn, is_leaf=is_node),
  }


def untold(params: Params) -> Params:
  """What a network tells of no token: zeros in the place of every pool.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> wide = pooled(jax.random.key(0), {'layers': {'q': node}}, num_experts=6)
  >>> untold(wide)['layers']['q'].experts.shape
  (2, 6, 4)
  """

  def node(x: Any) -> Routing | None:
    if not isinstance(x, Experts):
      return None
    *lead, num, _, rank = x.pool.a.shape
    zeros = lambda *shape: jnp.zeros((*lead, *shape), jnp.float32)
    return Routing(zeros(), zeros(num, rank), zeros(rank), zeros())

  return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, Experts))


def shared(params: Params) -> Params:
  """The tree with the shared expert alone: an ordinary low-rank adapter.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> params = {'layers': {'q': node}}
  >>> wide = pooled(jax.random.key(0), params, num_experts=6)
  >>> shared(wide)['layers']['q'] is wide['layers']['q'].shared
  True
  """
  is_node = lambda x: isinstance(x, Experts)
  return jax.tree.map(
    lambda x: x.shared if is_node(x) else x, params, is_leaf=is_node
  )
