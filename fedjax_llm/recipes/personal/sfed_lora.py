"""SFed-LoRA: FedSA-LoRA with a scale that fits the rank and the cohort.

arXiv 2603.08058 (2026).
"""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.personal.fed_sa import fed_sa
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'sfed_lora': dict(adapter=dict(name='sfed_lora', rank=4, clients=8)),
}


def sfed_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private: str = '/b$',
  **parts: Any,
) -> FederatedAlgorithm:
  """SFed-LoRA: FedSA-LoRA with a scale that fits the rank and the cohort.

      W + alpha sqrt(N / R) a b_k,   a <- sum_k w_k a_k,   b_k stays

  arXiv 2603.08058 (2026). The scale is that of the adapter `sfed_lora`, whose
  `clients` is N, the clients averaged in a round; the round is `fed_sa`. With
  N = 1 it is FedSA-LoRA on rank-stabilised factors.

  >>> from fedjax_llm import local
  >>> method = sfed_lora(None, local.optimizer('adamw'), private='head')
  >>> method.init_client({'head': 1.0}).private
  {'head': 1.0}
  """
  return fed_sa(loss, optimizer, private=private, **parts)
