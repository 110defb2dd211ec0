"""GLoRA: the mean product in a consensus frame of the clients' outputs.

arXiv 2605.06733 (2026).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'glora': {},
}


def glora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  frame: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """GLoRA: the mean product in a consensus frame of the clients' outputs.

      U = leading directions of 1/K sum_k U_k U_k',  U_k a basis of b_k's rows,
      s a b = SVD_R((sum_k w_k s a_k (b_k U)) U')

  arXiv 2605.06733 (2026). Clients' products count, not the factors that they
  are written in. `aggregators.glora` says which parts the paper leaves open and
  what is chosen.

  >>> from fedjax_llm import local
  >>> glora(None, local.optimizer('adamw'), frame=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: glora: frame=0 must be at least 1.
  """
  rule = aggregators.glora(frame=frame)
  return with_rule('glora', rule, loss, optimizer, parts)
