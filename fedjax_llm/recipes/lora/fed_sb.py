"""Fed-SB: averages only an R x R matrix between frozen bases.

Singhal et al. 2025, arXiv 2502.15436.
"""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import on_cores, refuse
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_sb': dict(adapter=dict(name='lora_xs', rank=16, alpha=16.0)),
}


def fed_sb(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-SB: averages only an R x R matrix between frozen bases.

      C <- sum_k w_k C_k,   so that   p C q = sum_k w_k p C_k q   exactly

  Singhal et al. 2025, arXiv 2502.15436: R^2 numbers a matrix travel, for any
  sides and any number of clients. On the adapter `lora_xs`, with bases from the
  weights; the paper takes them from the singular vectors of a first gradient of
  full fine-tuning, which needs clients' data before the first round and is left
  out.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm import scopes
  >>> from fedjax_llm import adapters, local
  >>> method = fed_sb(None, local.optimizer('adamw'))
  >>> base, key = {'q': {'kernel': jnp.ones((4, 3))}}, jax.random.key(0)
  >>> params = adapters.lora_xs(rank=2, targets=['q']).init(key, base)
  >>> scopes.leaf_paths(method.init(None, params).params)
  ['q/core', 'q/p', 'q/q', 'q/scale']
  """
  refuse('fed_sb', 'scope', parts)
  return fed_avg(loss, optimizer, scope=on_cores('fed_sb'), **parts)
