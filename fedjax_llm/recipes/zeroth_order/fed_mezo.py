"""FedMeZO: local steps on adapters by two forward passes each.

Ling et al. 2024, arXiv 2402.05926.

    z ~ N(0, I),  g = (L(p + eps z) - L(p - eps z)) / (2 eps),  p <- p - eta g z

Defaults: eps = 1e-3, one direction. The paper's learning rate is 1e-5 for 30
steps a round and 500 rounds.
"""

from typing import Any

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_mezo': dict(local=dict(name='sgd', learning_rate=1e-2)),
}


def fed_mezo(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  eps: float = 1e-3,
  directions: int = 1,
  distribution: str = 'normal',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedMeZO: FedAvg whose clients step along random directions.

  Ling et al. 2024, arXiv 2402.05926: MeZO (Malladi et al. 2023, arXiv
  2305.17333) as the local solver, on LoRA factors that travel as in FedAvg. A
  step is two forward passes, so a client needs the memory of inference.

  Args:
    eps: the distance of the two points.
    directions: random directions a step, two passes each.
    distribution: of a direction: 'normal', 'rademacher' or 'sphere'.

  Raises:
    Error: `eps` not positive, no direction, an unknown distribution.

  >>> method = fed_mezo(None, local.optimizer('sgd', 1e-5))
  >>> method.init_client({'w': 1.0})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  gradient = local.along(
    local.two_point(eps), directions=directions, distribution=distribution
  )
  return compose(local.sgd(loss, optimizer, gradient=gradient), **parts)
