"""FedSVD: clients train b alone, and the server factors the mean product.

Lee et al. 2025, arXiv 2505.12805.
"""

from typing import Any

from fedjax_llm import aggregators, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  with_rule,
)
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_svd': {},
}


def fed_svd(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  every: int = 1,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSVD: clients train b alone, and the server factors the mean product.

      b <- sum_k w_k b_k;   s a b = U S V':   a <- U,   b <- S V' / s

  Lee et al. 2025, arXiv 2505.12805: exact as FFA-LoRA, while a follows the
  product. Both factors are sent down, b is sent up. `every` as in
  `aggregators.fedsvd`.

  >>> from fedjax_llm import local, server
  >>> fed_svd(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  rule = aggregators.fedsvd(every=every)
  scope = {'scope': scopes.untrained('/a$')}
  return with_rule('fed_svd', rule, loss, optimizer, {**scope, **parts})
