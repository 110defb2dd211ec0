"""FedAT: tiers are synchronous, and seldom heard tiers weigh more.

Chai et al. 2021, SC, arXiv 2010.05958.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm import local, tree
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.asynchronous.fed_buff import versions
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Loss,
)

# What the config of each method changes.
NEEDS = {
  'fed_at': dict(
    clients=dict(name='tiered', cohort_size=2, num_tiers=2),
    system=dict(name='fleet'),
    algorithm=dict(num_tiers=2),
  ),
}


class Tiers(NamedTuple):
  """The rule's state: the last parameters of every tier, and its rounds."""

  params: Any  # [M, ...]
  rounds: Any  # [M] int32


def fed_at(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_tiers: int = 3,
  mu: float = 0.0,
  max_staleness: int = 10,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAT: tiers are synchronous, and seldom heard tiers weigh more.

      w_m <- sum_k n_k p_k / sum_k n_k    over the clients of the tier m whose
                                          round ended,   T_m <- T_m + 1
      p   <- sum_m (T_{M+1-m} / T) w_m,   T = sum_m T_m

  Chai et al. 2021, arXiv 2010.05958, algorithm 1: tiers are numbered by speed,
  so the slowest gets the weight of the rounds of the fastest. All w_m start as
  p. The tiers are those of `clients.name=tiered`, which also says from which
  parameters a late tier started. Clients descend F_k + mu / 2 ||p - start||^2;
  the paper's compression is left to the section `upload`.

  Args:
    num_tiers: M, `clients.num_tiers`.
    mu: of the clients' penalty.
    max_staleness: the most rounds that a tier may be late.

  Raises:
    Error: an aggregator or a server in `parts`, a number out of range; from the
      round, clients without a tier.

  >>> fed_at(None, local.optimizer('sgd'), num_tiers=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.num_tiers is 0; it must be at least 1.
  """
  for section in ('aggregator', 'server'):
    refuse('fed_at', section, parts)
  if num_tiers < 1:
    raise Error(f'algorithm.num_tiers is {num_tiers}; it must be at least 1.')
  return compose(
    local.sgd(loss, optimizer, prox=mu),
    aggregator=across_tiers(num_tiers),
    history=versions(max_staleness),
    **parts,
  )


def across_tiers(num_tiers: int) -> Aggregator:
  """Returns FedAT's rule; a round's clients are of one tier.

  >>> from fedjax_llm.aggregators import received
  >>> rule, start = across_tiers(2), {'w': jnp.zeros(1)}
  >>> state = rule.init(start, None)
  >>> sent = received(start, [{'w': jnp.ones(1)}])
  >>> fast = sent._replace(profiles={'tier': jnp.array([0])})
  >>> result, state = rule.aggregate(fast, state, start, None)
  >>> result.delta['w'].item()  # the slow tier has no round yet
  0.0
  >>> slow = sent._replace(profiles={'tier': jnp.array([1])})
  >>> rule.aggregate(slow, state, start, None)[0].delta['w'].item()
  1.0
  """

  def init(params: Any, key: Any) -> Tiers:
    del key
    start = tree.broadcast(params, num_tiers)
    return Tiers(start, jnp.zeros(num_tiers, jnp.int32))

  def aggregate(uploads, state, params, key):
    del key
    profiles = uploads.profiles
    if not isinstance(profiles, dict) or 'tier' not in profiles:
      raise Error('fed_at needs clients of tiers: set clients.name=tiered.')
    weight = tree.normalise(by_weight(uploads))
    tier = jnp.max(jnp.where(counted(uploads), profiles['tier'], 0))
    ends = tree.like(tree.whole(uploads), uploads.update)
    rounds = state.rounds.at[tier].add(1)
    share = rounds[::-1] / jnp.sum(rounds)  # T_{M+1-m} / T

    def kept(end, old):
      mean = tree.weighted_sum(end.astype(jnp.float32), weight)
      return old.at[tier].set(mean.astype(old.dtype))

    tiers = tree.map_present(kept, ends, state.params)
    delta = tree.map_present(
      lambda w, p: tree.weighted_sum(w.astype(jnp.float32) - p, share).astype(
        p.dtype
      ),
      tiers,
      params,
    )
    return Aggregate(delta), Tiers(tree.merge(tiers, state.params), rounds)

  return Aggregator(init, aggregate, weights=by_weight)
