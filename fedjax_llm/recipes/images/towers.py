"""Federated averaging of two towers over the clients that can train each.

It is no method of a paper and has no row in the list of methods: a config names
it by its path, `fedjax_llm.recipes.images.towers:by_tower`.
"""

from typing import Any

from fedjax_llm import aggregators, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.either import of_present
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import FederatedAlgorithm, Loss


def by_tower(
  loss: Loss, optimizer: LocalOptimizer, *, mu: float = 0.0, **parts: Any
) -> FederatedAlgorithm:
  """Returns federated averaging by tower, for clients that lack a modality.

      p_m <- p_m + sum_(k has m) w_k u_k,m / sum_(k has m) w_k

  for the tower m of pictures or of texts; a client trains the towers of which
  it has data in the round (`local.either.of_present`), on its loss +
  mu / 2 ||p - start||^2. A tower that nobody trained stays as it is. Where all
  clients have pictures and texts it is FedProx, FedAvg with mu = 0.

  >>> from jax import numpy as jnp
  >>> method = by_tower(None, local.optimizer('sgd'))
  >>> method.init_client({'text': {'w': jnp.ones(2)}}).private is None
  True
  """
  parts.setdefault('aggregator', aggregators.masked_mean())
  return compose(of_present(local.sgd(loss, optimizer, prox=mu)), **parts)
