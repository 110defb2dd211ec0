"""FedSA-LoRA: both factors are trained, a is shared, and b stays at home.

Guo et al. 2025, arXiv 2410.01463.
"""

from typing import Any

from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_sa': {},
}


def fed_sa(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private: str = '/b$',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSA-LoRA: both factors are trained, a is shared, and b stays at home.

      a <- sum_k w_k a_k,   b_k of client k goes on where it stopped

  Guo et al. 2025, arXiv 2410.01463, section 4. A personalised method: a client
  never trained on is served b as it started. On rank-stabilised factors the
  rule is the same.

  Args:
    private: what clients keep, as a pattern on the names of leaves; a head
      that the paper keeps too is added with '/b$|head'.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import LowRank
  >>> method = fed_sa(None, local.optimizer('adamw'))
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> kept = method.init_client({'q': node}).private['q']
  >>> kept.a, kept.b.shape
  (None, (2, 3))
  """
  scope = scopes.private(private)
  return fed_avg(loss, optimizer, scope=scope, **parts)
