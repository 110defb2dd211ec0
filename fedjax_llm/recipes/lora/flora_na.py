"""FLoRA-NA: means of the factors with weights nearest to the mean product.

arXiv 2509.26399 (2025).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'flora_na': {},
}


def flora_na(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  sweeps: int = 5,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLoRA-NA: means of the factors with weights nearest to the mean product.

      a <- sum_k q_k a_k,   b <- sum_k p_k b_k,
      (p, q) = argmin ||a b - 1/K sum_k a_k b_k||_F

  arXiv 2509.26399 (2025). Nothing but two factors travels. Clients count the
  same unless `weighted`. `aggregators.flora_na` has the solver of p and q,
  which the paper leaves open.

  >>> from fedjax_llm import local
  >>> flora_na(None, local.optimizer('adamw'), sweeps=-1)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: flora_na: sweeps=-1 must not be negative.
  """
  rule = aggregators.flora_na(weighted=weighted, sweeps=sweeps)
  return with_rule('flora_na', rule, loss, optimizer, parts)
