"""SCAFFOLD's local update: gradients corrected for client drift."""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.local.sgd import descend
from fedjax_llm.types import (
  ClientOutput,
  Controlled,
  Error,
  LocalUpdate,
  Loss,
  Masks,
)


def scaffold(
  loss: Loss,
  optimizer: LocalOptimizer,
) -> LocalUpdate:
  """Steps of y <- y - eta (g(y) - c_k + c), and a new control variate c_k.

  Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1, option II:

      c_k+ = c_k - c + (x - y) / sum_s eta_s

  over the steps really taken, with the learning rates of those steps. The
  parameters are a `Controlled` pair; c arrives with them, c_k is the client's
  own state, and the change of c_k travels back beside the update.

  Raises:
    Error: an optimizer other than plain SGD: (x - y) / sum eta is then no
      average of gradients.

  >>> from fedjax_llm.local import optimizer
  >>> update = scaffold(None, optimizer('sgd', 0.1))
  >>> start = Controlled({'w': jnp.float32(7)}, {'w': jnp.float32(5)})
  >>> update.init(start)  # c_k starts at zero
  {'w': Array(0., dtype=float32)}
  """
  plain = not any(optimizer.keywords.values())
  if optimizer.name != 'sgd' or not plain:
    told = ', '.join(f'{k}={v}' for k, v in optimizer.keywords.items())
    given = f'{optimizer.name} with {told}' if told else optimizer.name
    raise Error(
      f'scaffold needs local.name=sgd without momentum, not {given}: its '
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
