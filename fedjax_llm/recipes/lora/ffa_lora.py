"""FFA-LoRA: a keeps its initial value, and only b is trained and sent.

Sun et al. 2024, arXiv 2403.12313.
"""

from typing import Any

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'ffa_lora': {},
}


def ffa_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """FFA-LoRA: a keeps its initial value, and only b is trained and sent.

      b <- sum_k w_k b_k,   so that   a b = sum_k w_k a b_k   exactly

  Sun et al. 2024, arXiv 2403.12313, section 4. It halves the bytes sent.

  >>> from fedjax_llm import local, server
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = ffa_lora(
  ...   None, local.optimizer('adamw'), server=server.fed_avgm())
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> moments = method.init(None, {'q': node}).optimizer[0].m['q']
  >>> moments.a, moments.b.shape  # the server receives no update of a
  (None, (2, 3))
  """
  scope = scopes.frozen('/a$')
  return fed_avg(loss, optimizer, scope=scope, **parts)
