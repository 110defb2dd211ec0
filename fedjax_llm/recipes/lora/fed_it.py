"""FedIT: federated averaging of the factors.

Zhang et al. 2023, arXiv 2305.05644.
"""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_it': {},
}


def fed_it(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedIT: federated averaging of the factors.

      a <- sum_k w_k a_k,   b <- sum_k w_k b_k

  Zhang et al. 2023, arXiv 2305.05644. It is `fed_avg` by its name in papers.
  The mean of the factors is not the mean of the products: the metric
  'aggregators/error' is their relative distance.

  >>> from fedjax_llm import local
  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import Cohort, LossSum
  >>> from fedjax_llm.nodes import LowRank
  >>> loss = lambda base, p, x, key: LossSum(
  ...   jnp.sum((p.a @ p.b - x) ** 2), *jnp.float32([1, 0]))
  >>> method = fed_it(loss, local.optimizer('sgd', 0.1))
  >>> params = LowRank(*jnp.float32([[[1]], [[1]]]), scale=jnp.float32(1))
  >>> state = method.init(jax.random.key(0), params)
  >>> cohort = Cohort(jnp.arange(2), jnp.array([[0.0], [4.0]]), jnp.ones(2),
  ...                 jnp.ones(2, bool))
  >>> _, _, info = jax.jit(method.round)(state, cohort)
  >>> error = info.metrics['aggregators/error']  # of one step on each client
  >>> round(float(error), 3)
  0.1
  """
  return fed_avg(loss, optimizer, **parts)
