"""CyBeR-0: robust rules on the scalars of shared directions.

2024, arXiv 2406.14362: communication-efficient Byzantine-resilient federated
zero-order optimization.

    client k:  g_k,sp = (L(p + mu z_sp) - L(p - mu z_sp)) / (2 mu)
    server:    g_sp = rule(g_1,sp, ..., g_K,sp), p <- p - eta sum g_sp z_sp / P

Defaults: mu = 1e-3, P = 1; a trimmed mean that drops a fifth on both sides is a
choice of this code.
"""

from typing import Any

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.zeroth_order.decomfl import along_shared
from fedjax_llm.types import AnyAggregator, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'cyber_0': dict(local=dict(name='sgd', learning_rate=2e-3)),
}


def cyber_0(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_steps: int = 1,
  mu: float = 1e-3,
  perturbations: int = 1,
  distribution: str = 'normal',
  log_rounds: int = 64,
  aggregator: AnyAggregator | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """CyBeR-0: a robust rule on every scalar of shared directions.

  CyBeR-0, 2024, arXiv 2406.14362: `decomfl` with central
  differences, where corrupted clients can only lie about scalars: a rule on
  [K, S, P] numbers, not on K models, removes them. Any robust rule is allowed
  (`aggregator.name=median`, `krum`); with the mean it is DeComFL.

  Args:
    num_steps, mu, perturbations, distribution, log_rounds: see `decomfl`.
    aggregator: the rule; `trimmed_mean(0.2)` if None.

  Raises:
    Error: as `decomfl`.

  >>> import jax
  >>> method = cyber_0(None, local.optimizer('sgd', 1e-3), perturbations=3)
  >>> state = method.init(jax.random.key(0), {'w': jax.numpy.ones(9)})
  >>> state.params.coefficients.shape  # S, P
  (1, 3)
  """
  return along_shared(
    'cyber_0',
    loss,
    optimizer,
    local.two_point(mu),
    num_steps=num_steps,
    perturbations=perturbations,
    distribution=distribution,
    log_rounds=log_rounds,
    aggregator=aggregator or aggregators.trimmed_mean(0.2),
    **parts,
  )
