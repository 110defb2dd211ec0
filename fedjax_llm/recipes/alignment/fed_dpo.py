"""FedDPO: federated averaging of LoRA adapters on a preference loss.

Ye et al. 2024 (OpenFedLLM), arXiv 2402.06954, its value alignment:

    client:  steps on  -log sigmoid(beta (D_chosen - D_rejected)),  beta = 0.1,
    server:  the mean of the adapters, weighted by numbers of pairs,

with D = log pi(y | x) - log pi_0(y | x). The reference pi_0 is the model with
which training starts in all rounds, never the last global one: without a warm
start it is the base without the adapter. `task.name` = ipo, kto, orpo or simpo
trains on the loss of that name.
"""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_prox import fed_prox
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes: no network, so made-up preferences.
NEEDS = {
  'fed_dpo': dict(task=dict(name='dpo'), data=dict(name='contrasted')),
}


def fed_dpo(
  loss: Loss, optimizer: LocalOptimizer, *, mu: float = 0.0, **parts: Any
) -> FederatedAlgorithm:
  """FedDPO: federated averaging of adapters on pairs of replies.

  Ye et al. 2024 (OpenFedLLM), arXiv 2402.06954. The loss is that of the task,
  `local.preference`; with `mu` > 0 the local objective is that of FedProx.

  >>> from fedjax_llm import local
  >>> fed_dpo(None, local.optimizer('sgd')).plan is None
  True
  """
  return fed_prox(loss, optimizer, mu=mu, **parts)
