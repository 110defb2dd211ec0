"""FedPipe's policy: a client trains its most important weights.

Fang et al. 2024, arXiv 2404.06448.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_llm import aggregators, local, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  compose,
  refuse,
)
from fedjax_llm.scopes import allotment, policies
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  # Budgets of parameters, of the 8,184 of the tiny adapter.
  'fed_pipe': dict(profiles=dict(name='budgets', choices=(2000, 8000))),
}


def fed_pipe(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  profiles: Mapping[str, np.ndarray] | None = None,
  policy: Callable[..., Any] | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedPipe's policy: a client trains its most important weights.

      client:  trains the first r_km ranks of weight m, and reports I_km,
      server:  each rank <- mean over the clients that trained it,
      host:    r_k = argmax sum_m I_km r_km within the client's budget

  Fang et al. 2024, arXiv 2404.06448: weights are chosen by their contribution,
  each client (the paper's edge server) gets ranks within its budget, and ranks
  that several clients trained are averaged. The contribution here is |p dL/dp|
  of the factors (`local.weight_importance`), the budget a number of parameters
  (`profiles.name=budgets`), and the knapsack is solved exactly
  (`policies.by_importance`). The paper's models of latency, batch sizes and bit
  widths, which need measured machines, are left out: another `policy` may add
  them. With budgets for all ranks it is FedIT; clients count the same with
  `aggregators.masked_mean(weighted=False)`.

  Args:
    num_clients, profiles: N, and {'budget': [N]}.
    policy: `(sizes, most, budgets) -> policy`; `policies.by_importance` if
      None.

  Raises:
    Error: no budgets; a scope in `parts`.

  >>> import jax
  >>> from fedjax_llm.nodes import LowRank
  >>> ones = jax.numpy.ones
  >>> node = LowRank(ones((2, 3, 4)), ones((2, 4, 5)), ones(2))
  >>> method = fed_pipe(
  ...   None, local.optimizer('sgd'), num_clients=2,
  ...   profiles={'budget': np.array([17, 999])})
  >>> state = method.init(jax.random.key(0), {'q': node})
  >>> state.aggregator.profiles['ranks'].sum(1).tolist()  # 8 parameters each
  [2, 8]
  """
  refuse('fed_pipe', 'scope', parts)
  if profiles is None or 'budget' not in profiles:
    raise Error(
      'fed_pipe needs a budget of every client: profiles.name=budgets.'
    )
  budgets = np.asarray(profiles['budget'])
  build = policies.by_importance if policy is None else policy
  update = local.reported(
    local.sgd(loss, optimizer),
    local.weight_importance(loss),
  )
  parts.setdefault('aggregator', aggregators.masked_mean('mask'))
  algorithm = compose(update, scope=allotment.allotted(), **parts)

  def first(params):
    sizes, _ = allotment.rank_sizes(params)
    none = np.zeros((num_clients, len(sizes)), np.int32)
    return {'ranks': none}, np.zeros(len(sizes), np.float32)

  return server.planned(
    algorithm,
    lambda params: build(*allotment.rank_sizes(params), budgets),
    first=first,
    num_clients=num_clients,
  )
