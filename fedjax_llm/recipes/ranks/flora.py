"""FLoRA: the stacked product goes into the base, and factors start anew.

Wang et al. 2024, arXiv 2409.05976.
"""

from typing import Any

from fedjax_llm import aggregators, scopes, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import RANKS, refuse, with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'flora': RANKS,
}


def flora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLoRA: the stacked product goes into the base, and factors start anew.

      W0 <- W0 + s sum_k w_k a_k b_k,   then a new a, and b = 0

  Wang et al. 2024, arXiv 2409.05976. Exact for any mix of ranks. The fresh
  factors are drawn from a common seed, so the download is the stack of the
  round before; clients of the same rank get the same columns.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> from fedjax_llm import adapters
  >>> from fedjax_llm.nodes import LowRank
  >>> method = flora(None, local.optimizer('adamw'), fold=adapters.fold)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init(None, params).params.residual.shape  # on its way to the base
  (4, 3)
  """
  refuse('flora', 'download', parts)
  return with_rule(
    'flora',
    aggregators.flora(),
    loss,
    optimizer,
    {'scope': scopes.ranks(), **parts, 'download': uploads.known()},
  )
