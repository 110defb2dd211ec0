"""Aggregators from a rule on one low-rank node.

`by_node` returns an `Aggregator`. The rule takes the factors as the clients
hold them (`tree.whole`): a client of a smaller rank holds zeros beyond it.
Leaves outside of `LowRank` nodes (norms, heads) get the weighted mean of their
updates. The server optimizer does not change values that a rule assigns.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.weights import by_weight, counted, equal
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Aggregate, Aggregator, Error, Key, Traits

NOTHING = LowRank(None, None, None)


class Seen(NamedTuple):
  """The argument of a rule on one node."""

  nodes: LowRank  # [K, ...] whole factors
  weight: jax.Array  # [K], sums to one
  server: LowRank  # the server's node before the round
  update: LowRank  # weighted mean of the updates; None where nothing travels
  held: jax.Array  # [K, ..., R] bool: the columns of each client that counts
  key: Key

  def served(self) -> LowRank:
    """Returns the server's node plus the mean update."""
    now = LowRank(self.server.a, self.server.b, self.server.scale)
    return tree.add(now, self.update)


class Added(NamedTuple):
  """Rank and bytes of all residuals added to the base at one node, int32."""

  rank: Any  # [...] of all rounds so far
  factors: Any  # [] bytes of a rank
  dense: Any  # [] bytes of the whole matrix

  @classmethod
  def none(cls, node: LowRank) -> 'Added':
    d, f = node.a.shape[-2], node.b.shape[-1]
    size = node.a.dtype.itemsize
    rank = jnp.zeros(node.a.shape[:-2], jnp.int32)
    return cls(rank, jnp.int32(size * (d + f)), jnp.int32(size * d * f))

  def plus(self, rank: jax.Array) -> 'Added':
    # Far above any rank that is cheaper than the matrix, and below overflow.
    return self._replace(rank=jnp.minimum(self.rank + rank, 2**30))


def _missed(state: Any, seen: Any) -> tuple[Any, Any]:
  """Returns the bytes added since a client's `seen`, and its new `seen`."""
  is_added = lambda x: isinstance(x, Added)
  ranks = jax.tree.map(lambda x: x.rank, state, is_leaf=is_added)
  before = tree.zeros_like(ranks) if type(seen) is tuple else seen

  def leaf(x, old):
    new = x.rank - old
    # Compared as ranks: their bytes could overflow.
    cheaper = new <= x.dense // x.factors
    few = jnp.where(cheaper, new, 0) * x.factors
    return jnp.where(cheaper, few, x.dense).astype(jnp.int32)

  counts = jax.tree.map(leaf, state, before, is_leaf=is_added)
  return counts, ranks


NodeRule = Callable[[Seen], Aggregate]


def by_node(
  name: str,
  rule: NodeRule,
  traits: Traits,
  *,
  weighted: bool = True,
  assigns: bool = False,
  rank_down: Callable[[jax.Array], Any] | None = None,
) -> Aggregator:
  """Returns an aggregator from a rule on single nodes.

  With `assigns` the rule writes both factors, so both have to travel;
  `rank_down(held [K, ..., R])` is the rank [...] of the residual that a round
  adds to the base. The state is the rank of all residuals so far, and a client
  receives the residuals added since it last took part: as factors of these
  ranks or as one dense matrix, whichever is less.
  """

  def init(params, key):
    del key
    nodes = jax.tree.leaves(params, is_leaf=low_rank.is_node)
    if not any(map(low_rank.is_node, nodes)):
      raise Error(
        f'{name} is a rule on low-rank factors, and there are none: '
        'adapter.name=lora, or use a mean.'
      )
    if rank_down is None:
      return ()
    return jax.tree.map(
      lambda x: Added.none(x) if low_rank.is_node(x) else None,
      params,
      is_leaf=low_rank.is_node,
    )

  weights = by_weight if weighted else equal

  def aggregate(uploads, state, params, key):
    counts = counted(uploads)
    some_weight = jnp.any(counts)
    weight = tree.normalise(weights(uploads))
    mean = tree.weighted_mean(uploads.update, weight)

    def leaf(path, p, nodes, update, held):
      if not low_rank.is_node(p):
        return Aggregate(update), None
      where = tree.path_name(path)
      _check(name, where, update, held, assigns)
      columns = _columns(held.a, nodes.a, counts)
      here = jax.random.fold_in(key, zlib.crc32(where.encode()))
      done = rule(Seen(nodes, weight, p, update, columns, here))
      down = None
      if rank_down is not None:
        rank = jnp.broadcast_to(rank_down(columns), p.a.shape[:-2])
        down = jnp.where(some_weight, rank, 0).astype(jnp.int32)
      change = done.delta, done.assign or NOTHING
      return _or_nothing(some_weight, *change, p), down

    outcome = jax.tree_util.tree_map_with_path(
      leaf,
      params,
      tree.whole(uploads),
      mean,
      uploads.masks.held,
      is_leaf=lambda x: x is None or low_rank.is_node(x),
    )
    part = lambda pick: jax.tree.map(
      pick, outcome, is_leaf=lambda x: type(x) is tuple
    )
    result = Aggregate(part(lambda x: x[0].delta), part(lambda x: x[0].assign))
    if rank_down is None:
      return result, state
    is_added = lambda x: x is None or isinstance(x, Added)
    more = jax.tree.map(
      lambda old, rank: None if old is None else old.plus(rank),
      state,
      part(lambda x: x[1]),
      is_leaf=is_added,
    )
    return result, more

  num_bytes = None if rank_down is None else _missed
  return Aggregator(init, aggregate, traits, num_bytes, weights=weights)


def _or_nothing(
  some_weight: jax.Array, delta: LowRank, assign: LowRank, server: LowRank
) -> Aggregate:
  """Returns the outcome in the server's dtypes; none if no client counts."""
  delta, assign = _as(delta, server), _as(assign, server)
  old = server
  if server.residual is None and assign.residual is not None:
    old = server._replace(residual=jnp.zeros_like(assign.residual))
  keep = lambda new, old: jnp.where(some_weight, new, old)
  return Aggregate(
    tree.map_present(lambda d: keep(d, jnp.zeros_like(d)), delta),
    tree.map_present(keep, assign, old),
  )


def _as(new: LowRank, like: LowRank) -> LowRank:
  cast = lambda x, p: None if x is None else x.astype(p.dtype)
  return LowRank(cast(new.a, like.a), cast(new.b, like.b), None, new.residual)


def _check(
  name: str, where: str, update: LowRank, held: LowRank, assigns: bool
) -> None:
  for factor in ('a', 'b'):
    if getattr(update, factor) is not None:
      continue
    if getattr(held, factor) is not None:
      raise Error(
        f'{name} needs whole factors, but clients keep {where}/{factor} to '
        'themselves: share it, or use a mean.'
      )
    if assigns:
      raise Error(
        f'{name} writes both factors, but {where}/{factor} is frozen: train '
        'it, or use a mean, which is exact with one factor frozen.'
      )


def _columns(held: jax.Array | None, a: jax.Array, valid: jax.Array):
  """Returns the columns of a [K, ..., D, R] held by each client in `valid`."""
  shape = (*a.shape[:-2], a.shape[-1])
  mask = jnp.bool_(True) if held is None else tree.rows(held, a)
  mask = jnp.any(jnp.broadcast_to(mask, a.shape), axis=-2)
  return mask & valid.reshape((-1,) + (1,) * (len(shape) - 1))


def per_client(weight: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes a weight [K] to broadcast against [K, ...]."""
  return weight.reshape((-1,) + (1,) * (like.ndim - 1))


def grown(server: LowRank, change: jax.Array) -> jax.Array:
  """Returns the server's residual plus a change [..., D, F]."""
  return change if server.residual is None else server.residual + change


def moved_to_mean(
  seen: Seen, nodes: LowRank, share: jax.Array, held: jax.Array | None = None
) -> LowRank:
  """Returns the delta to sum_k share_k of the factors; share [K, ...].

  With `held` [K, ..., R], columns that no client with a share holds stay.
  """
  kept = None
  if held is not None:
    kept = ~jnp.any(held & (share > 0)[..., None], axis=0)  # [..., R]
  share = share[..., None, None]

  def factor(whole, old, travels, columns):
    if travels is None:
      return None
    delta = jnp.sum(share * whole, axis=0) - old
    return delta if kept is None else jnp.where(columns(kept), 0.0, delta)

  a, b = seen.server.a, seen.server.b
  return LowRank(
    factor(nodes.a, a, seen.update.a, lambda x: x[..., None, :]),
    factor(nodes.b, b, seen.update.b, lambda x: x[..., :, None]),
    None,
  )
