"""FedRPCA: the mean of the common part of the updates, and more of the rest.

arXiv 2506.01194 (2025).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fedrpca': {},
}


def fedrpca(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  beta: float = 2.0,
  iterations: int = 30,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRPCA: the mean of the common part of the updates, and more of the rest.

      [vec u_1 ... vec u_K] = L + S,    mean_k(L_k) + beta mean_k(S_k)

  for each factor, with L of low rank and S sparse (arXiv 2506.01194, 2025). The
  paper adapts beta, by a rule that is not known here; it is constant, and 1 is
  FedIT. Further choices: `aggregators.fedrpca`.

  >>> from fedjax_llm import local
  >>> fedrpca(None, local.optimizer('adamw'), beta=-1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fedrpca: beta=-1.0 must not be negative.
  """
  rule = aggregators.fedrpca(beta=beta, iterations=iterations)
  return with_rule('fedrpca', rule, loss, optimizer, parts)
