"""FedRA: a client trains layers that are drawn at random in every round.

Su et al. 2024, arXiv 2311.11227.
"""

import functools
from typing import Any

from fedjax_llm import adapters, aggregators, scopes, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import (
  refuse,
)
from fedjax_llm.types import (
  FederatedAlgorithm,
  Loss,
  Params,
)

# What the config of each method changes.
NEEDS = {
  'fed_ra': dict(profiles=dict(name='layers', choices=(1, 2))),
}


def fed_ra(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRA: a client trains layers that are drawn at random in every round.

      client: the network of its L_k layers alone, drawn anew in each round,
      server: P_l <- mean of P_l,k over the clients that held layer l

  Su et al. 2024, arXiv 2311.11227. A layer that no client holds keeps its
  adapter; leaves outside of layers are trained by all clients. L_k is the
  client's profile (`profiles.name=layers`), and a layer that a client lacks is
  left out of its forward pass: the residual stream passes it by. That simulates
  the shallow network, at the cost of the deep one. Beside the adapters of its
  layers a client receives four bytes a layer that mark it as held. With all
  layers for all clients it is FedIT; clients count the same unless `weighted`.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_ra(None, local.optimizer('adamw'))
  >>> params = {'layers': {'q': LowRank(
  ...   jnp.ones((6, 4, 2)), jnp.zeros((6, 2, 3)), jnp.ones(6))}}
  >>> start = method.init(None, params).params
  >>> sorted(start['layers']), sorted(method.personal(start, None)['layers'])
  (['gate', 'q'], ['q'])
  """
  for section in ('scope', 'aggregator'):
    refuse('fed_ra', section, parts)
  gate = adapters.gates.NAME

  def put(params: Params, part: Params) -> Params:
    gates = params['layers'][gate]
    return {**part, 'layers': {**part['layers'], gate: gates}}

  fold = parts.pop('fold', None)
  return server.on_part(
    functools.partial(
      fed_avg,
      loss,
      optimizer,
      scope=scopes.layers(scopes.untrained(f'^layers/{gate}$')),
      aggregator=aggregators.masked_mean('mask', weighted=weighted),
      **parts,
    ),
    wrap=lambda key, params: adapters.gates.added(params),
    get=adapters.gates.without,
    put=put,
    fold=fold,
  )
