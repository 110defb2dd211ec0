"""HierFAVG: regions average their clients often, the cloud the regions rarely.

Liu et al. 2020, arXiv 1905.06641.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import rows
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Loss,
)

# What the config of each method changes.
NEEDS = {
  'hier_favg': dict(algorithm=dict(num_regions=2, sync_every=2)),
}


def hier_favg(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_regions: int = 4,
  sync_every: int = 4,
  **parts: Any,
) -> FederatedAlgorithm:
  """HierFAVG: regions average their clients often, the cloud rarely.

      every round:      p_g <- p_g + sum_{k in g} w_k u_k / sum_{k in g} w_k
      sometimes, then:  p_g <- sum_h W_h p_h / sum_h W_h

  Liu et al. 2020, arXiv 1905.06641, algorithm 1: a round is an edge aggregation
  after kappa_1 = `cohort.num_steps` local steps, and every `sync_every`-th
  (kappa_2) ends with a cloud aggregation. W_g is the weight of the reports of
  region g since the last one. Client k belongs to region floor(k G / N). One
  region, or `sync_every` = 1 where all clients take part, is FedAvg.

  Args:
    num_clients, num_regions: N and G.
    sync_every: rounds between two averages of the regions.

  Raises:
    Error: an aggregator in `parts`, a number below one, more regions than
      clients.

  >>> method = hier_favg(None, local.optimizer('sgd'), num_clients=8)
  >>> method.init(jax.random.key(0), {'w': jnp.ones(3)}).params['w'].shape
  (4, 3)
  """
  refuse('hier_favg', 'aggregator', parts)
  if not 1 <= num_regions <= num_clients:
    raise Error(
      f'algorithm.num_regions is {num_regions}; it must be from 1 to the '
      f'{num_clients} clients.'
    )
  if sync_every < 1:
    raise Error(f'algorithm.sync_every is {sync_every}; it must be at least 1.')
  region = jnp.asarray(np.arange(num_clients) * num_regions // num_clients)
  return rows.compose(
    local.sgd(loss, optimizer),
    num_regions,
    lambda params, context: region[jnp.maximum(context.client, 0)],
    parts,
    rule=regional(region, num_regions, sync_every),
  )


class Since(NamedTuple):
  """Rounds and weights of the regions since the last synchronisation."""

  rounds: jax.Array  # [] int32
  weight: jax.Array  # [G] float32


def regional(region: jax.Array, num_regions: int, sync_every: int):
  """Returns the rule on stacked parameters [G, ...] of both averages.

  >>> rule = regional(jnp.array([0, 1]), 2, sync_every=1)
  >>> rule.init({'w': jnp.zeros((2, 3))}, None).weight.tolist()
  [0.0, 0.0]
  """

  def init(params, key):
    del params, key
    return Since(jnp.int32(0), jnp.zeros(num_regions, jnp.float32))

  def aggregate(uploads, state, params, key):
    del key
    weight = by_weight(uploads)
    mine = (
      region[jnp.maximum(uploads.ids, 0)] == jnp.arange(num_regions)[:, None]
    )
    each = weight * mine  # [G, K]
    total = each.sum(1)
    share = each / jnp.where(total > 0, total, 1.0)[:, None]
    since = Since(state.rounds + 1, state.weight + total)
    due = (since.rounds >= sync_every) & (since.weight.sum() > 0)
    part = since.weight / jnp.maximum(since.weight.sum(), 1e-30)

    def leaf(u, p):  # [K, G, ...] and [G, ...]
      change = jnp.einsum(
        'gk,kg...->g...', share, u.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
      )  # fmt: skip
      ends = p + change
      mean = tree.weighted_sum(ends, part)
      return (jnp.where(due, mean, ends) - p).astype(p.dtype)

    delta = tree.map_present(leaf, uploads.update, params)
    keep = lambda x: jnp.where(due, jnp.zeros_like(x), x)
    return Aggregate(delta), jax.tree.map(keep, since)

  return Aggregator(init, aggregate, weights=by_weight)
