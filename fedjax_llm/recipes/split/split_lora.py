"""SplitLoRA: adapters on both sides of a cut, in every step a message each way.

Lin et al. 2024, arXiv 2407.00952.
"""

from typing import Any

from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.split import cutting
from fedjax_llm.types import FederatedAlgorithm, Loss, Model

# What the config of each method changes.
NEEDS = {
  'split_lora': {},
}


def split_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  cut: int = 1,
  order: str = 'sequential',
  client_part: str = 'averaged',
  keep_optimizer: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """SplitLoRA: adapters on both sides of a cut, a message each way a step.

      h = f(x; c_k)                              up: h and the labels
      v <- v - eta grad_v l(h; v),  grad_h l     down: grad_h l
      c_k <- c_k - eta (grad_c h) grad_h l       in every step
      c   <- sum_k w_k c_k                       after the S steps of a round

  Lin et al. 2024, arXiv 2407.00952. Clients hold embeddings and the layers
  below `cut`, the server holds all above; only adapters are trained. The
  server learns from client after client, as the authors' program does, or from
  all at once (`server.split`). The program averages the clients' parts without
  weights (`cohort.weight_by=uniform`) every 100 steps (`cohort.num_steps`),
  with a cut at layer 3 of 12. With one client it is SGD on the whole adapter.

  Args:
    model: the network.
    cut: the number of layers on the clients, from 1 to L - 1 for an adapter in
      the layers alone.
    order: 'sequential' or 'parallel' over clients.
    client_part: 'averaged', or 'private': each client keeps its own.
    keep_optimizer: clients keep the moments of their optimizer between rounds.

  Raises:
    Error: an unknown `order` or `client_part`, a download codec, privacy,
      several devices; from `init`, a cut that leaves a side nothing to train.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> method = split_lora(None, local.optimizer('sgd'), model=None, cut=1)
  >>> params = {'layers': {'q': jnp.ones((3, 2))}}
  >>> both = method.init(None, params).params
  >>> both.client['layers']['q'].shape, both.server['layers']['q'].shape
  ((1, 2), (2, 2))
  """
  refuse('split_lora', 'download', parts)

  def messages(base, params, batch):
    sent = cutting.states(model, base, params, batch, cut)
    return (sent, batch), sent

  return cutting.compose(
    loss,
    optimizer,
    messages,
    lambda params: halves.at_layer(params, cut, 'split_lora'),
    order=order,
    client_part=client_part,
    keep_optimizer=keep_optimizer,
    **parts,
  )
