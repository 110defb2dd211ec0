"""FedSplitBERT: clients keep the lower layers and average the upper ones.

Li et al. 2022, arXiv 2205.13299.
"""

import functools
from typing import Any

from fedjax_llm import local, scopes
from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.split import cutting
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_split_bert': {},
}


def fed_split_bert(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  cut: int = 1,
  frozen: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSplitBERT: clients keep the lower layers and average the upper ones.

      theta_l of client k goes on where it stopped   for layers l <  cut
      theta_l <- sum_k w_k theta_kl                  for layers l >= cut

  Li et al. 2022, arXiv 2205.13299: every client computes the whole network;
  the cut decides what is sent. Embeddings belong to the lower part, the head to
  the upper one. The paper trains whole layers and may quantise what is sent
  (section `upload`); here the layer's part of any adapter is meant. With cut=0
  it is FedAvg. A client that never trained is served the initial lower part.

  Args:
    cut: the number of layers that clients keep, from 0 to L.
    frozen: the lower part stays as it is in place of being trained.

  Raises:
    Error: a scope in `parts`; from `init`, a cut out of range.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> method = fed_split_bert(None, local.optimizer('sgd'), cut=2)
  >>> state = method.init(None, {'layers': {'q': jnp.arange(3.0)}})
  >>> method.init_client(state.params).private.client
  {'layers': {'q': Array([0., 1.], dtype=float32)}}
  """
  refuse('fed_split_bert', 'scope', parts)
  fold = parts.pop('fold', None)
  scope = cutting.kept_by_clients(scopes.everything(), frozen=frozen)
  whole = local.viewed(loss, halves.joined)
  return cutting.on_halves(
    functools.partial(fed_avg, whole, optimizer, scope=scope, **parts),
    lambda params: halves.at_layer(params, cut, 'fed_split_bert'),
    fold=fold,
  )
