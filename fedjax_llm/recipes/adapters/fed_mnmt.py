"""Fed-MNMT: adapters are averaged within clusters of clients.

Liu et al. 2023, arXiv 2305.12449.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import rows
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_mnmt': dict(algorithm=dict(num_clusters=2)),
}

_DRAWN = 311  # purpose of the random stream


def fed_mnmt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_clusters: int = 3,
  clusters: Sequence[int] | None = None,
  weighted: bool = False,
  seed: int = 0,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-MNMT: adapters are averaged within clusters of clients.

      theta_c <- mean over the clients k of cluster c of theta_k

  Liu et al. 2023, arXiv 2305.12449: the clients are language pairs, the
  clusters families of languages, or drawn at random as a baseline, and only
  bottleneck adapters (and norms) travel. A cluster without a client in a round
  keeps its adapter. The server holds all clusters' adapters; a client receives
  that of its own cluster. One cluster is FedAvg. The paper clusters the
  adapters of the encoder and of the decoder apart; models here have one of
  both.

  Args:
    num_clients, num_clusters: N and C.
    clusters: the cluster of each client, [N] numbers from 0 to C - 1; drawn, as
      evenly as N allows, if None.
    weighted: whether clients count by their weight; the authors' code counts
      them the same.
    seed: of the clusters that are drawn.

  Raises:
    Error: an aggregator in `parts`, clusters that are not one for each client,
      or a number of clusters that is below 1 or above N.

  >>> import jax
  >>> method = fed_mnmt(
  ...   None, local.optimizer('sgd'), num_clients=4, num_clusters=2)
  >>> method.init(jax.random.key(0), {'w': jnp.ones(3)}).params['w'].shape
  (2, 3)
  """
  refuse('fed_mnmt', 'aggregator', parts)
  if not 1 <= num_clusters <= num_clients:
    raise Error(
      f'algorithm.num_clusters is {num_clusters}; it must be from 1 to the '
      f'{num_clients} clients.'
    )
  table = jnp.asarray(_table(clusters, num_clusters, num_clients, seed))
  return rows.compose(
    local.sgd(loss, optimizer),
    num_clusters,
    lambda params, context: table[jnp.maximum(context.client, 0)],
    parts,
    rule=aggregators.masked_mean('mask', weighted=weighted),
  )


def _table(clusters, num_clusters, num_clients, seed) -> np.ndarray:
  if clusters is None:
    order = np.random.default_rng((seed, _DRAWN)).permutation(num_clients)
    return (order % num_clusters).astype(np.int32)
  table = np.asarray(clusters, np.int32)
  if table.shape != (num_clients,) or not (
    ((table >= 0) & (table < num_clusters)).all()
  ):
    raise Error(
      f'algorithm.clusters must hold a number from 0 to {num_clusters - 1} for '
      f'each of the {num_clients} clients.'
    )
  return table
