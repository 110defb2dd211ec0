"""FedBuff: the server steps whenever K clients have arrived, late or not.

Nguyen et al. 2022, arXiv 2106.06639.
"""

from typing import Any

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_buff': dict(
    clients=dict(name='buffered', cohort_size=2, concurrency=4),
    system=dict(name='fleet'),
  ),
}


def fed_buff(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  max_staleness: int = 10,
  staleness: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedBuff: the server steps whenever K clients have arrived, late or not.

      p <- p + eta (1 / K) sum_k s(tau_k) (p_k - p^{t - tau_k})

  Nguyen et al. 2022, arXiv 2106.06639, algorithm 1: every client of the buffer
  is compared with the parameters that it started from, s(tau) = 1 / sqrt(1 +
  tau), eta is the server's learning rate. Who arrives when is the sampler's
  business (`clients.timed.buffered`); if nobody is late this is FedAvg with
  equal weights. The server keeps the parameters of the last `max_staleness` + 1
  rounds; clients that are later are left out.

  Args:
    max_staleness: the most rounds that a client may be late.
    staleness, exponent, after: s, see `aggregators.staleness.discount`.

  Raises:
    Error: an aggregator in `parts`, a negative number, an unknown `staleness`.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> method = fed_buff(None, local.optimizer('sgd'), max_staleness=2)
  >>> method.init(jax.random.key(0), {'w': jnp.ones(4)}).history['w'].shape
  (3, 4)
  """
  refuse('fed_buff', 'aggregator', parts)
  return compose(
    local.sgd(loss, optimizer),
    aggregator=aggregators.buffered_mean(staleness, exponent, after),
    history=versions(max_staleness),
    **parts,
  )


def versions(max_staleness: int) -> int:
  """Returns the number of versions that the server keeps, or raises `Error`.

  >>> versions(2)
  3
  """
  if max_staleness < 0:
    raise Error(f'max_staleness is {max_staleness}: it must be 0 or more.')
  return max_staleness + 1
