"""FedMomentum: the best product stays, further directions go into the base.

As in the third-party code base FedLLM-Factory (2026).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fedmomentum': {},
}


def fedmomentum(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  energy: float = 0.9999,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedMomentum: the best product stays, further directions go into the base.

      U S V' = sum_k w_k s a_k b_k:   s a b = U_R S_R V_R',
      W0 <- W0 + the directions after R, up to the share `energy` of sum S^2

  As in the third-party code base FedLLM-Factory (2026). Its "momentum" is the
  singular directions that a later round goes on with: there is no velocity.
  With energy=1 the weights served are the mean of the clients'.

  >>> from fedjax_llm import local
  >>> fedmomentum(None, local.optimizer('adamw'), energy=2.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fedmomentum: energy=2.0 must be above 0 and at most 1.
  """
  rule = aggregators.fedmomentum(energy=energy)
  return with_rule('fedmomentum', rule, loss, optimizer, parts)
