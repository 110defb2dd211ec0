"""Local training: every client trains its own adapter and sends nothing."""

from typing import Any

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'local_only': {},
}


def local_only(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_optimizer: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """Local training: every client trains its own adapter and sends nothing.

  All leaves are private; sampling, local steps and token budget stay those of
  the federated run it is compared with.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = local_only(None, local.optimizer('sgd'))
  >>> method.init_client({'w': jnp.ones(2)}).private['w'].tolist()
  [1.0, 1.0]
  """
  return fed_avg(
    loss,
    optimizer,
    keep_optimizer=keep_optimizer,
    scope=scopes.all_private(),
    **parts,
  )
