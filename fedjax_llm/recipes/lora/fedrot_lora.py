"""FedRot-LoRA: the mean of factors that are rotated onto the server's.

Zhang et al. 2026, arXiv 2602.23638.
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
  'fedrot_lora': {},
}


def fedrot_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float = 1.0,
  first: str = 'a',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRot-LoRA: the mean of factors that are rotated onto the server's.

      a <- sum_k w_k a_k R_k,   b <- sum_k w_k R_k' b_k,   R_k a rotation

  Zhang et al. 2026, arXiv 2602.23638; settings as in `aggregators.fedrot`. A
  client can turn its factors itself, so the bytes are those of FedIT.

  >>> from fedjax_llm import local
  >>> fedrot_lora(None, local.optimizer('adamw'), strength=2.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fedrot: strength=2.0 must be from 0 to 1.
  """
  rule = aggregators.fedrot(strength=strength, first=first)
  return with_rule('fedrot_lora', rule, loss, optimizer, parts)
