"""FedAvg: local steps, then the weighted mean of the updates.

McMahan et al. 2017, arXiv 1602.05629.
"""

from typing import Any

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_avg': {},
}


def fed_avg(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_optimizer: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAvg: local steps, then the weighted mean of the updates.

  McMahan et al. 2017, arXiv 1602.05629, algorithm 1. On LoRA factors it is
  FedIT (Zhang et al. 2023, arXiv 2305.05644), whose mean of factors is not the
  mean of their products.

  >>> from jax import numpy as jnp
  >>> import jax
  >>> from fedjax_llm.types import Cohort, LossSum
  >>> slope = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.float32([1, 0]))
  >>> method = fed_avg(slope, local.optimizer('sgd', 1.0))
  >>> state = method.init(jax.random.key(0), {'w': jnp.float32(0)})
  >>> texts, weight = jnp.array([[-2.0], [-6.0]]), jnp.array([3.0, 1.0])
  >>> cohort = Cohort(jnp.arange(2), texts, weight, jnp.array([True, True]))
  >>> state, _, _ = jax.jit(method.round)(state, cohort)
  >>> float(state.params['w'])  # (3 * 2 + 1 * 6) / 4
  3.0
  """
  update = local.sgd(loss, optimizer, keep_optimizer=keep_optimizer)
  return compose(update, **parts)
