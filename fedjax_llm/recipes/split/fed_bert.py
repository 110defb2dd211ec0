"""FedBERT: clients hold embeddings and head, the server the layers.

Tian et al. 2022, ACM TIST 13(4).
"""

from typing import Any

from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.split import cutting
from fedjax_llm.types import FederatedAlgorithm, Loss, Model

# What the config of each method changes: all weights but norms are trained.
NEEDS = {
  'fed_bert': dict(
    adapter=dict(
      name='dense', modules=('embed_tokens', 'lm_head', 'layers/.*proj')
    ),
    local=dict(name='adamw', learning_rate=3e-3),
  ),
}


def fed_bert(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  order: str = 'sequential',
  client_part: str = 'averaged',
  keep_optimizer: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedBERT: clients hold embeddings and head, the server the layers.

      e = embed(x; c_k)           up: e
      h = layers(e; v)            down: h
      l = head(h, y; c_k)         up: grad_h l     (labels stay with the client)
      v <- v - eta grad_v l       down: grad_e l
      c_k <- c_k - eta grad_c l   in every step
      c   <- sum_k w_k c_k        after the S steps of a round

  Tian et al. 2022, "FedBERT: When Federated Learning Meets Pre-Training": the
  cut has the form of a U, so no label leaves its client. The paper pre-trains
  all weights (`adapter.name=dense`) on masked tokens, with clients in sequence
  or in parallel (`server.split`); here the task is that of the config. With one
  client it is SGD on the whole adapter.

  Args:
    model: the network.
    order: 'sequential' or 'parallel' over clients.
    client_part: 'averaged', or 'private': each client keeps its own.
    keep_optimizer: clients keep the moments of their optimizer between rounds.

  Raises:
    Error: as `split_lora`; from `init`, an adapter that trains nothing outside
      of the layers, or nothing in them.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> method = fed_bert(None, local.optimizer('sgd'), model=None)
  >>> params = {'layers': {'q': jnp.ones((2, 3))}, 'lm_head': jnp.ones(3)}
  >>> both = method.init(None, params).params
  >>> sorted(both.client), sorted(both.server)
  (['lm_head'], ['layers'])
  """
  refuse('fed_bert', 'download', parts)

  def messages(base, params, batch):
    embedded = cutting.states(model, base, params, batch, 0)
    hidden = model.hidden(base, params, batch)
    # The server's attention needs to know which places belong together.
    return (embedded, batch.segments, batch.positions, hidden), (
      hidden,
      embedded,
    )

  return cutting.compose(
    loss,
    optimizer,
    messages,
    halves.around_layers,
    order=order,
    client_part=client_part,
    keep_optimizer=keep_optimizer,
    **parts,
  )
