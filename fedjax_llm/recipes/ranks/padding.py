"""Means for mixed ranks: zero padding, RBLA and replication padding.

Cho et al. 2024, arXiv 2401.06432; Tavallaie et al. 2024, arXiv 2408.08699; Byun
and Lee 2025, arXiv 2406.17477.
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import RANKS, ranked
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'zero_padding': RANKS,
  'rbla': RANKS,
  'replication_padding': RANKS,
}


def zero_padding(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_unheld: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedIT with ranks: the mean of factors that are padded with zeros.

      a <- sum_k w_k [a_k 0],   b <- sum_k w_k [b_k; 0]

  The baseline of every paper on mixed ranks (called zero padding by Cho et al.
  2024, arXiv 2401.06432): ranks that few clients hold shrink in every round.
  Ranks that no client of a round holds keep their value; with
  `keep_unheld=False` they are set to zero permanently, as in the formula.

  >>> zero_padding(  # doctest: +ELLIPSIS
  ...   None, None, aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: zero_padding brings its own aggregator: leave the ...
  """
  rule = aggregators.zero_padding(keep_unheld=keep_unheld)
  return ranked('zero_padding', rule, loss, optimizer, parts)


def rbla(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """RBLA: every rank is averaged over the clients that hold it.

      a[:, i] <- sum_{k: r_k > i} w_k a_k[:, i] / sum_{k: r_k > i} w_k

  and the rows of b likewise (Tavallaie et al. 2024, arXiv 2408.08699). A rank
  that no client of the round holds keeps its value.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> node = lambda x: LowRank(jnp.full((1, 2), x), jnp.zeros((2, 1)), None)
  >>> sent = aggregators.received(
  ...   node(1.0), [node(4.0), node(8.0)], ranks=[1, 2])
  >>> rule = aggregators.as_stack(aggregators.masked_mean('mask'))
  >>> new, _ = rule.aggregate(sent, (), node(1.0), None)
  >>> (1.0 + new.delta.a).tolist()  # of two clients, and of one
  [[6.0, 8.0]]
  """
  return ranked('rbla', aggregators.masked_mean('mask'), loss, optimizer, parts)


def replication_padding(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """Replication padding: small clients take ranks from the largest clients.

      a_k[:, i] <- mean of a_j[:, i] over the clients of the largest rank

  for the ranks that client k lacks, then the weighted mean (Byun and Lee 2025,
  arXiv 2406.17477). With two sizes of clients it is RBLA on the larger ranks.

  >>> replication_padding(  # doctest: +ELLIPSIS
  ...   None, None, aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: replication_padding brings its own aggregator: ...
  """
  return ranked(
    'replication_padding', aggregators.replication(), loss, optimizer, parts
  )
