"""DiLoCo: many AdamW steps a round, and Nesterov momentum on the server.

Douillard et al. 2023, arXiv 2311.08105.
"""

from typing import Any

import optax

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Loss,
  ServerOptimizer,
  known,
)

# What the config of each method changes.
NEEDS = {
  'diloco': dict(
    clients=dict(name='full'),
    population=dict(max_clients=4),
  ),
}


def diloco(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float = 0.7,
  momentum: float = 0.9,
  **parts: Any,
) -> FederatedAlgorithm:
  """DiLoCo: many AdamW steps a round, and Nesterov momentum on the server.

      delta = p - (1 / K) sum_k p_k,   m <- mu m + delta,
      p <- p - eta (delta + mu m)

  Douillard et al. 2023, arXiv 2311.08105, algorithm 1: K workers take part in
  every round and count the same; each keeps the moments of its inner optimizer
  from round to round (the paper's is AdamW). The outer settings are the paper's
  best; its H is `cohort.num_steps`. With eta = 1 and mu = 0 it is federated
  averaging of clients that keep their moments (Photon's server, arXiv
  2411.02908).

  Args:
    server_learning_rate: eta.
    momentum: mu.

  Raises:
    Error: a server in `parts`, or a number out of range.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> method = diloco(None, local.optimizer('sgd', momentum=0.9))
  >>> kept = method.init_client({'w': jnp.ones(2)}).local  # its momentum
  >>> [x.tolist() for x in jax.tree.leaves(kept) if x.ndim]
  [[0.0, 0.0]]
  """
  refuse('diloco', 'server', parts)
  parts.setdefault('aggregator', aggregators.uniform_mean())
  return compose(
    local.sgd(loss, optimizer, keep_optimizer=True),
    server=outer('diloco', server_learning_rate, momentum),
    **parts,
  )


def outer(
  name: str, server_learning_rate: float, momentum: float
) -> ServerOptimizer:
  """Returns the outer optimizer: SGD with Nesterov momentum.

  Raises:
    Error: a learning rate that is not positive, a momentum not in [0, 1).

  >>> import jax.numpy as jnp
  >>> step = outer('diloco', 0.5, 0.5)
  >>> step.update(jnp.float32(2), step.init(jnp.float32(0)))[0].item()
  -1.5
  """
  if known(server_learning_rate) and not server_learning_rate > 0:
    raise Error(
      f'{name}: server_learning_rate={server_learning_rate} must be positive.'
    )
  if known(momentum) and not 0 <= momentum < 1:
    raise Error(f'{name}: momentum={momentum} must be at least 0 and below 1.')
  return optax.sgd(server_learning_rate, momentum, nesterov=True)
