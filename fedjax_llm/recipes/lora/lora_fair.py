"""LoRA-FAIR: the mean of the factors, b corrected towards the mean product.

Bian et al. 2025, arXiv 2411.14961.
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  with_rule,
)
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'lora_fair': {},
}


def lora_fair(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  penalty: float = 0.01,
  **parts: Any,
) -> FederatedAlgorithm:
  """LoRA-FAIR: the mean of the factors, b corrected towards the mean product.

      b <- mean b_k + argmin_c ||mean a_k b_k - a (mean b_k + c)||^2
                               + penalty ||c||^2

  Bian et al. 2025, arXiv 2411.14961, by the closed form of
  `aggregators.lora_fair`. Clients start from the averaged factors.

  >>> from fedjax_llm import local
  >>> lora_fair(None, local.optimizer('adamw'), penalty=0.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: lora_fair: penalty=0.0 must be positive.
  """
  rule = aggregators.lora_fair(penalty=penalty)
  return with_rule('lora_fair', rule, loss, optimizer, parts)
