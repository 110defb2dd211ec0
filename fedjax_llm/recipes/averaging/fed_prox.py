"""FedProx: FedAvg with mu / 2 * ||p - start||^2 in the local objective.

Li et al. 2020, arXiv 1812.06127.
"""

from typing import Any

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_prox': {},
}


def fed_prox(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  mu: float = 0.01,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedProx: FedAvg with mu / 2 * ||p - start||^2 in the local objective.

  Li et al. 2020, arXiv 1812.06127, algorithm 2; mu = 0 is FedAvg.

  >>> fed_prox(None, local.optimizer('sgd'), mu=-1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: prox is -1.0; it must be 0 or more.
  """
  update = local.sgd(loss, optimizer, prox=mu)
  return compose(update, **parts)
