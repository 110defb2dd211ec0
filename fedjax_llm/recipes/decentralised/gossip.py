"""Gossip: clients mix their parameters with those of their neighbours.

Lian et al. 2017, arXiv 1705.09056; Sun et al. 2021, arXiv 2104.11375.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import local, tree
from fedjax_llm.aggregators import mixing, networks
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import rows
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'gossip': dict(clients=dict(name='full'), population=dict(max_clients=4)),
}


def gossip(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  topology: str = 'ring',
  degree: int = 2,
  seed: int = 0,
  **parts: Any,
) -> FederatedAlgorithm:
  """Gossip: clients mix their parameters with those of their neighbours.

      y_k = S local steps from x_k,   x_k <- sum_j W_kj y_j

  Decentralised federated averaging (Sun et al. 2021, arXiv 2104.11375,
  algorithm 1, without momentum); with one local step it is decentralised SGD
  (Lian et al. 2017, arXiv 1705.09056) in the order step, then mix. W holds the
  Metropolis weights of the network. There is no server: the program keeps every
  client's parameters, [N, ...], and reports the spectral gap of W and the
  clients' mean squared distance to their mean ('aggregators/apart'). A client
  that never trained is served the mean. Every client sends its parameters to
  each neighbour; the ledger counts them once, as a broadcast.

  Args:
    num_clients: N.
    topology, degree, seed: see `aggregators.networks.topology`.

  Raises:
    Error: an aggregator in `parts`, an unknown topology.

  >>> import jax
  >>> method = gossip(None, local.optimizer('sgd'), num_clients=4)
  >>> method.init(jax.random.key(0), {'w': jnp.ones(3)}).params['w'].shape
  (4, 3)
  """
  refuse('gossip', 'aggregator', parts)
  matrix = networks.topology(topology, num_clients, degree=degree, seed=seed)
  gap = networks.spectral_gap(matrix)

  def measure(uploads, old, new):
    del uploads, old
    apart = tree.sub(new, tree.broadcast(rows.mean_row(new), num_clients))
    return {
      'aggregators/spectral_gap': jnp.float32(gap),
      'aggregators/apart': tree.norm(apart) ** 2 / num_clients,
    }

  return rows.compose(
    local.sgd(loss, optimizer),
    num_clients,
    lambda params, context: jnp.maximum(context.client, 0),
    {'measure': measure, **parts},
    rule=mixing.mixed(networks.over(matrix)),
  )
