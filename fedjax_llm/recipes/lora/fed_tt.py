"""FedTT: the cores of tensor trains are averaged.

Ghiasvand et al. 2025, arXiv 2410.13097.
"""

from typing import Any

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_tt': dict(adapter=dict(name='tensor_train')),
  'fed_tt_plus': dict(adapter=dict(name='tensor_train')),
}


def fed_tt(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedTT: the cores of tensor trains are averaged.

      G_i <- sum_k w_k G_i,k   for every core i

  Ghiasvand et al. 2025, arXiv 2410.13097, on the adapter `tensor_train`; the
  round is `fed_avg`. The mean of cores is not the mean of their products;
  `fed_tt_plus` trains one core a round, so its mean is exact.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_tt(None, local.optimizer('adamw'))
  >>> method.init_client({'w': jnp.ones(2)})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  return fed_avg(loss, optimizer, **parts)


def fed_tt_plus(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedTT+: of every tensor train one core is trained in a round, in turn.

      round t: G_i <- sum_k w_k G_i,k,   i = n - t mod n,   the others stay

  Ghiasvand et al. 2025, arXiv 2410.13097, on the adapter `tensor_train`. The
  change is linear in one core, so the mean is exact, and an n-th is sent up.
  Round 0 trains the last core, which starts at zero. FedTT trains all cores in
  every round: it is `fed_avg` on that adapter. The paper does not fix the
  number of cores in a round, nor their order.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> from fedjax_llm.types import Context
  >>> turns = scopes.in_turn('/cores/([0-9]+)$')
  >>> train = {'q': {'cores': [jnp.ones(1)] * 3}}
  >>> masks = turns.mask(train, None, Context(round=1))
  >>> [bool(m) for m in masks.trained['q']['cores']]  # the second round
  [False, True, False]
  >>> method = fed_tt_plus(None, local.optimizer('adamw'))
  """
  refuse('fed_tt_plus', 'scope', parts)
  scope = scopes.in_turn('/cores/([0-9]+)$')
  return fed_avg(loss, optimizer, scope=scope, **parts)
