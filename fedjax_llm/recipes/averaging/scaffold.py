"""SCAFFOLD: control variates cancel the drift between clients.

Karimireddy et al. 2020, arXiv 1910.06378.
"""

import functools
from typing import Any

import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, server, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.sgd import descend
from fedjax_llm.nodes import Controlled
from fedjax_llm.recipes.composing import (
  compose,
)
from fedjax_llm.types import (
  AnyAggregator,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  Masks,
  Params,
)

# What the config of each method changes.
NEEDS = {
  # Local steps of plain SGD.
  'scaffold': dict(local=dict(name='sgd', learning_rate=1.0)),
}


def scaffold(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  aggregator: AnyAggregator | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """SCAFFOLD: control variates cancel the drift between clients.

  Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II. Local
  optimizer: plain SGD. The server's c moves by the sum of the changes of c_k
  over all N = `num_clients` clients; it doubles the bytes both ways.

  >>> from fedjax_llm import local
  >>> method = scaffold(None, local.optimizer('sgd'), num_clients=10)
  >>> method.init(None, {'w': jnp.float32(5)}).params.control  # c
  {'w': Array(0., dtype=float32)}
  >>> method.init_client(Controlled(*[{'w': jnp.float32(5)}] * 2)).local  # c_k
  {'w': Array(0., dtype=float32)}
  """
  inner = aggregator or aggregators.mean()
  scope = parts.get('scope') or scopes.everything()

  def wrap(key: Key, params: Params) -> Controlled:
    masks = tree.full_masks(params, scope.labels(params))
    control = tree.zeros_like(tree.like(params, masks.trained), jnp.float32)
    return Controlled(params, control)

  fold = parts.pop('fold', None)
  return server.on_part(
    functools.partial(
      compose,
      corrected(loss, optimizer),
      aggregator=aggregators.control_variates(inner, num_clients),
      **parts,
    ),
    wrap=wrap,
    get=lambda params: params.params,
    put=lambda params, part: params._replace(params=part),
    fold=fold,
  )


def corrected(
  loss: Loss,
  optimizer: LocalOptimizer,
) -> LocalUpdate:
  """Returns steps of y <- y - eta (g(y) - c_k + c), and a new c_k.

  Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1, option II:

      c_k+ = c_k - c + (x - y) / sum_s eta_s

  over the steps taken, with the learning rates of those steps. The parameters
  are a `Controlled` pair; c arrives with them, c_k is the client's own control
  variate, kept as its state, and the change of c_k is sent beside the update.

  Raises:
    Error: an optimizer other than plain SGD: (x - y) / sum eta is then no
      average of gradients.

  >>> from fedjax_llm.local import optimizer
  >>> update = corrected(None, optimizer('sgd', 0.1))
  >>> start = Controlled({'w': jnp.float32(7)}, {'w': jnp.float32(5)})
  >>> update.init(start)  # c_k starts at zero
  {'w': Array(0., dtype=float32)}
  """
  plain = not any(optimizer.keywords.values())
  if optimizer.name != 'sgd' or not plain:
    settings = ', '.join(f'{k}={v}' for k, v in optimizer.keywords.items())
    described = (
      f'{optimizer.name} with {settings}' if settings else optimizer.name
    )
    raise Error(
      f'scaffold needs local.name=sgd without momentum, not {described}: its '
      'control variates are averages of plain gradients.'
    )

  def init(trainable: Controlled) -> Any:
    return tree.zeros_like(trainable.control, jnp.float32)

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    inner_masks = Masks(masks.held.params, masks.trained.params)
    correction = tree.sub(start.control, state)  # c - c_k

    def adjust(grads, now):
      del now
      return tree.map_present(lambda g, c: g + c, grads, correction)

    trained = tree.like(start.params, inner_masks.trained)
    out = descend(
      loss, optimizer, base, start.params, optimizer.init(trained), batches,
      inner_masks, context, adjust,
    )  # fmt: skip
    update = tree.sub(out.end, trained)
    rates = out.rates
    change = tree.map_present(
      lambda u, c: jnp.where(
        rates > 0, -u / jnp.where(rates > 0, rates, 1.0) - c, 0.0
      ),
      update,
      start.control,
    )
    change = tree.apply_mask(change, masks.trained.control)
    new_state = tree.add(state, change)
    return ClientOutput(
      update=Controlled(update, change),
      masks=masks,
      state=new_state,
      work=out.work,
      metrics=out.metrics,
    )

  return LocalUpdate(init, run)
