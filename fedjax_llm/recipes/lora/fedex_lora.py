"""FedEx-LoRA: the mean of the factors, with its error added to the base.

Singhal et al. 2025, arXiv 2410.09432.
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
  'fedex_lora': {},
}


def fedex_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  residual_rank: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedEx-LoRA: the mean of the factors, with its error added to the base.

      W0 <- W0 + s (mean_k a_k b_k - (mean_k a_k)(mean_k b_k))

  Singhal et al. 2025, arXiv 2410.09432. The settings are those of
  `aggregators.fedex`; clients count the same unless `weighted`.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> from fedjax_llm import adapters
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fedex_lora(None, local.optimizer('adamw'), fold=adapters.fold)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init(None, params).params.residual.shape  # for what factors miss
  (4, 3)
  """
  rule = aggregators.fedex(weighted=weighted, residual_rank=residual_rank)
  return with_rule('fedex_lora', rule, loss, optimizer, parts)
