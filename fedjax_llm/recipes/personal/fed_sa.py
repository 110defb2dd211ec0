"""FedSA-LoRA: clients train both factors, share a and keep b.

Guo et al. 2025, arXiv 2410.01463.
"""

from typing import Any

from fedjax_llm import scopes
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
  """FedSA-LoRA: clients train both factors, share a and keep b.

      a <- sum_k w_k a_k,   b_k of client k goes on where it stopped

  Guo et al. 2025, arXiv 2410.01463, section 4. A personalised method: a client
  that never trained is served the initial b. On rank-stabilised factors the
  rule is the same.

  Args:
    private: a pattern on the names of the leaves that clients keep; the paper
      keeps a head too, with '/b$|head'.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_sa(None, local.optimizer('adamw'))
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> kept = method.init_client({'q': node}).private['q']
  >>> kept.a, kept.b.shape
  (None, (2, 3))
  """
  scope = scopes.private(private)
  return fed_avg(loss, optimizer, scope=scope, **parts)
