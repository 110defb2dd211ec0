"""Centralised training: one client holds all data (no federation)."""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'centralised': dict(partition=dict(name='pooled')),
}


def centralised(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_optimizer: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """Centralised training: one client holds all data (no federation).

  This is federated averaging of the single client of `data.partition.pooled`,
  whose optimizer goes on from round to round. A config that names this method
  has its partition pooled.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = centralised(None, local.optimizer('sgd', momentum=0.9))
  >>> kept = method.init_client({'w': jnp.ones(2)}).local
  >>> kept.inner_state[0].trace['w'].tolist()  # momentum goes on over rounds
  [0.0, 0.0]
  """
  return fed_avg(
    loss,
    optimizer,
    keep_optimizer=keep_optimizer,
    **parts,
  )
