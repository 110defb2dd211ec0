"""FedAsync: the server mixes in every client as it arrives.

Xie et al. 2019, arXiv 1903.03934.
"""

from typing import Any

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.asynchronous.fed_buff import versions
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_async': dict(
    clients=dict(name='buffered', cohort_size=1, concurrency=4),
    system=dict(name='fleet'),
  ),
}


def fed_async(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  alpha: float = 0.9,
  staleness: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
  mu: float = 0.0,
  max_staleness: int = 10,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAsync: the server mixes in every client as it arrives.

      p <- (1 - a) p + a p_k,   a = alpha s(tau_k)

  Xie et al. 2019, arXiv 1903.03934, algorithm 1, with local training on the
  loss + mu / 2 ||p - start||^2. A client's whole parameters are mixed, not its
  update, so a late client pulls the server back. `clients.timed.buffered` with
  a cohort of one is the paper's server; in larger cohorts clients that arrive
  together are mixed in one after another. The paper's server also mixes into
  the parameters that it has, so no server optimizer but plain SGD fits.

  Args:
    alpha: the share of a client that is not late.
    staleness, exponent, after: s, see `aggregators.staleness.discount`.
    mu: rho of the paper.
    max_staleness: the most rounds that a client may be late.

  Raises:
    Error: an aggregator or a server in `parts`, or a number out of range.

  >>> fed_async(None, local.optimizer('sgd'), alpha=1.5)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: alpha is 1.5: it must be above 0 and at most 1.
  """
  refuse('fed_async', 'aggregator', parts)
  refuse('fed_async', 'server', parts)
  return compose(
    local.sgd(loss, optimizer, prox=mu),
    aggregator=aggregators.one_after_another(alpha, staleness, exponent, after),
    history=versions(max_staleness),
    **parts,
  )
