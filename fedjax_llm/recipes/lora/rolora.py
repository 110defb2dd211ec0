"""RoLoRA: rounds take turns between b (the first) and a.

Chen et al. 2024, arXiv 2409.02346.
"""

from typing import Any

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'rolora': {},
}


def rolora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """RoLoRA: rounds take turns between b (the first) and a.

      even t: b <- sum_k w_k b_k, a stays;   odd t: a <- sum_k w_k a_k, b stays

  One factor is the same for all clients in every round, so the mean is exact
  (Chen et al. 2024, arXiv 2409.02346). One factor is sent up and both are sent
  down, since a client may not have taken part in the round before. Moments of
  the local optimizer start afresh in every round.

  >>> from fedjax_llm import local
  >>> from fedjax_llm.types import Context
  >>> from jax import numpy as jnp
  >>> turns, params = scopes.alternating('b$', 'a$'), {'a': 1.0, 'b': 2.0}
  >>> [[name for name, m in turns.mask(params, None, Context(
  ...   round=t)).trained.items() if m] for t in (0, 1)]
  [['b'], ['a']]
  >>> method = rolora(None, local.optimizer('adamw'))
  """
  scope = scopes.alternating('/b$', '/a$')
  return fed_avg(loss, optimizer, scope=scope, **parts)
