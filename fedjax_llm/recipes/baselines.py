"""The two baselines that every federated result needs beside it."""

from typing import Any

from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.types import FederatedAlgorithm, Loss


def local_only(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_optimizer: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """Every client trains its own adapter and nothing travels.

  All leaves are private; sampling, local steps and token budget stay those of
  the federated run beside it.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = local_only(None, local.optimizer('sgd'))
  >>> method.init_client({'w': jnp.ones(2)}).private['w'].tolist()
  [1.0, 1.0]
  """
  return averaging.fed_avg(
    loss,
    optimizer,
    keep_optimizer=keep_optimizer,
    scope=scopes.all_private(),
    **parts,
  )


def centralised(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_optimizer: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """One client holds everybody's data: the bound without federation.

  The launcher pools the clients' texts and gives that client the steps of a
  whole cohort, so the token budget is that of the federated run beside it.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = centralised(None, local.optimizer('sgd', momentum=0.9))
  >>> kept = method.init_client({'w': jnp.ones(2)}).local
  >>> kept.inner_state[0].trace['w'].tolist()  # momentum goes on over rounds
  [0.0, 0.0]
  """
  return averaging.fed_avg(
    loss,
    optimizer,
    keep_optimizer=keep_optimizer,
    **parts,
  )
