"""FedCompass: clients get as many local steps as let them arrive together.

Li et al. 2023, arXiv 2309.14675 (ICLR 2024).
"""

from typing import Any

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.asynchronous.fed_buff import versions
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_compass': dict(
    clients=dict(name='compass'),
    population=dict(max_clients=4),
    system=dict(name='fleet'),
  ),
}


def fed_compass(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  alpha: float = 0.9,
  staleness: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
  max_staleness: int = 10,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedCompass: clients get as many local steps as let them arrive together.

      p <- (1 - sum_k a_k) p + sum_k a_k p_k,   a_k = alpha s(tau_k) / N

  Li et al. 2023, arXiv 2309.14675. The schedule of local steps is the
  sampler's: `clients.compass` deals them by the measured speed of each client,
  so that groups of clients arrive at the same time and few are late. alpha and
  s are those of the authors' package APPFL, whose server mixes whole
  parameters, so no server optimizer but plain SGD fits. With all N clients in
  one group, alpha = 1 and nobody late it is federated averaging with equal
  weights.

  Args:
    num_clients: N.
    alpha: N times the share of a client that is not late.
    staleness, exponent, after: s, see `aggregators.staleness.discount`.
    max_staleness: the most rounds that a client may be late.

  Raises:
    Error: an aggregator or a server in `parts`, or a number out of range.

  >>> fed_compass(None, local.optimizer('sgd'), num_clients=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: num_clients is 0: it must be at least 1.
  """
  refuse('fed_compass', 'aggregator', parts)
  refuse('fed_compass', 'server', parts)
  return compose(
    local.sgd(loss, optimizer),
    aggregator=aggregators.all_together(
      num_clients, alpha, staleness, exponent, after
    ),
    history=versions(max_staleness),
    **parts,
  )
