"""HetLoRA: truncated download, self-pruning, weights by the product's norm.

Cho et al. 2024, arXiv 2401.06432.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.sgd import descend
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import (
  RANKS,
  compose,
  refuse,
)
from fedjax_llm.scopes.ranks import rank_of
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  'het_lora': RANKS,
}


def het_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  penalty: float = 5e-4,
  gamma: float = 0.99,
  min_rank: int = 1,
  per: str = 'client',
  keep_unheld: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """HetLoRA: truncated download, self-pruning, weights by the product's norm.

      client k: the first r_k columns; loss + penalty ||tail a|| ||tail b||;
                r_k <- floor(gamma r_k) where the tail shrank
      server:   mean of zero-padded factors with p_k ~ ||a_k b_k||_F

  Cho et al. 2024, arXiv 2401.06432. Settings as in `self_pruning` and
  `aggregators.norm_weighted`; r_k starts as the client's profile. The paper
  does not fix whether the norm runs over a client or a target (`per`).

  >>> from fedjax_llm import local
  >>> from fedjax_llm.nodes import LowRank
  >>> method = het_lora(None, local.optimizer('adamw'))
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> int(method.init_client(params).local.rank)  # before it prunes itself
  2
  """
  refuse('het_lora', 'aggregator', parts)
  update = self_pruning(
    loss,
    optimizer,
    penalty=penalty,
    gamma=gamma,
    min_rank=min_rank,
  )
  return compose(
    update,
    aggregator=aggregators.norm_weighted(per=per, keep_unheld=keep_unheld),
    **{'scope': _pruned_ranks(), **parts},
  )


def _pruned_ranks() -> Scope:
  """Returns a scope of the profile's ranks that the client has not pruned."""
  inner = scopes.ranks()

  def mask(start, state, context):
    rank = jnp.minimum(rank_of(context.profile), state.local.rank)
    return inner.mask(start, state, context._replace(profile=rank))

  return inner._replace(mask=mask)


class Ranks(NamedTuple):
  """A client's state: the number of ranks that it has not pruned."""

  rank: Any  # [] int32


def self_pruning(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  penalty: float = 5e-4,
  gamma: float = 0.99,
  min_rank: int = 1,
) -> LocalUpdate:
  """Returns S steps on loss + penalty * tail; the rank falls with the tail.

      tail = sum over nodes and layers of ||a[:, g:r]||_F ||b[g:r, :]||_F,
      g = floor(gamma r)

  of a client that holds r ranks (`masks.held`). If the tail after training is
  smaller than before, the client keeps g ranks from then on: it sends only
  those, and stores the number in its state (Cho et al. 2024, arXiv 2401.06432,
  section 3.2). b starts at zero, so nothing is pruned in the first round. The
  local metric 'rank' is r after training.

  Args:
    penalty: lambda of the paper.
    gamma: the share of ranks that stay when a client prunes.
    min_rank: no client goes below.

  Raises:
    Error: a negative penalty, a gamma not in (0, 1), min_rank below one; from
      `init`, no `LowRank` node.

  >>> update = self_pruning(loss=None, optimizer=None, gamma=0.5)
  >>> node = LowRank(jnp.ones((2, 4)), jnp.ones((4, 2)), None)
  >>> int(update.init({'q': node}).rank)  # of a client that has pruned none
  4
  """
  if penalty < 0:
    raise Error(f'self_pruning: penalty={penalty} must not be negative.')
  if not 0 < gamma < 1:
    raise Error(f'self_pruning: gamma={gamma} must be above 0 and below 1.')
  if min_rank < 1:
    raise Error(f'self_pruning: min_rank={min_rank} must be at least 1.')

  def init(trainable: Params) -> Ranks:
    nodes = _nodes(trainable)
    if not nodes:
      raise Error('self_pruning needs low-rank factors: adapter.name=lora.')
    return Ranks(jnp.int32(max(x.a.shape[-1] for x in nodes)))

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trained = tree.like(start, masks.trained)
    rank = _held(masks, start)
    smaller = jnp.floor(gamma * rank + 1e-4).astype(jnp.int32)
    smaller = jnp.minimum(rank, jnp.maximum(smaller, min_rank))
    tail = lambda params: _tail(params, smaller)

    def adjust(grads, now):
      if penalty:
        pull = jax.grad(tail)(now)
        grads = tree.map_present(lambda g, p: g + penalty * p, grads, pull)
      return grads

    out = descend(
      loss,
      optimizer,
      base,
      start,
      optimizer.init(trained),
      batches,
      masks,
      context,
      adjust,
    )
    rank = jnp.where(tail(out.end) < tail(trained), smaller, rank)
    return ClientOutput(
      update=tree.sub(out.end, trained),
      masks=_first(masks, start, rank),
      state=Ranks(jnp.minimum(state.rank, rank)),
      work=out.work,
      metrics={**out.metrics, 'rank': rank.astype(jnp.float32)},
    )

  return LocalUpdate(init, run)


def _is_node(x: Any) -> bool:
  return isinstance(x, LowRank)


def _nodes(params: Params) -> list[LowRank]:
  leaves = jax.tree.leaves(params, is_leaf=_is_node)
  return [x for x in leaves if _is_node(x) and x.a is not None]


def _held(masks: Masks, start: Params) -> jax.Array:
  """Returns the number of ranks that the client holds; the others are zero."""
  node, held = _nodes(start)[0], _nodes(masks.held)[0].a
  num = node.a.shape[-1]
  if not held.ndim:
    return jnp.int32(num)
  columns = jnp.broadcast_to(held, node.a.shape).reshape(-1, num)
  return jnp.sum(jnp.any(columns, axis=0), dtype=jnp.int32)


def _tail(params: Params, first: jax.Array) -> jax.Array:
  """Returns sum ||a[:, first:]|| ||b[first:]||; zeros beyond the rank add 0."""

  def norm(x):  # its gradient at zero is zero, not NaN
    square = jnp.sum(jnp.square(x), axis=(-1, -2))
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)

  total = jnp.float32(0)
  for node in _nodes(params):
    late = jnp.arange(node.a.shape[-1]) >= first
    a, b = node.a * late, node.b * late[:, None]
    total += jnp.sum(norm(a) * norm(b))
  return total


def _first(masks: Masks, start: Params, rank: jax.Array) -> Masks:
  def node(x, m):
    if not _is_node(x):
      return m
    kept = jnp.arange(x.a.shape[-1]) < rank
    return m._replace(a=m.a & kept, b=m.b & kept[:, None])

  is_leaf = lambda x: x is None or _is_node(x)
  part = lambda mask: jax.tree.map(node, start, mask, is_leaf=is_leaf)
  return Masks(part(masks.held), part(masks.trained))
