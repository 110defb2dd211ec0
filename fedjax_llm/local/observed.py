"""Losses that know their network, and return the statistics of its nodes.

`observed` returns an `Observed`, which is a `Loss`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedjax_llm.types import Base, Error, Key, Loss, LossSum, Model, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
  """A `Loss`, the same with statistics of its network's nodes, and its builder.

  `loss(base, params, batch, key) -> LossSum`, which is also its call;
  `with_statistics(base, params, batch, key) -> (LossSum, statistics)`, with the
  statistics of `Model.hidden_with_statistics`, None for a network without them;
  `build(model)` is the same loss of another network (`on_model`). It is no
  tuple, since `jax.jit` keeps weak references to the functions that it
  compiles.

  >>> def both(base, params, batch, key):
  ...   return LossSum(batch, 1.0, 0.0), {'layers': None}
  >>> loss = Observed(lambda *args: both(*args)[0], both)
  >>> loss(None, {}, 2.0, None)
  LossSum(total=2.0, count=1.0, correct=0.0)
  """

  loss: Loss
  with_statistics: Callable[..., tuple[LossSum, Any]] | None
  build: Callable[[Model], Loss] | None = None

  def __call__(self, base: Base, params: Params, batch: Any, key: Key):
    return self.loss(base, params, batch, key)


def observed(build: Callable[[Model], Loss], model: Model) -> Loss:
  """Returns the loss of a model as an `Observed`.

  `build(model)` is a loss that takes the hidden states of `model` once, outside
  of loops and of functions that are computed again in the backward pass.

  >>> import jax.numpy as jnp
  >>> model = Model(
  ...   hidden=lambda base, params, batch: batch,
  ...   logits=lambda base, params, hidden: hidden,
  ...   hidden_with_statistics=lambda base, params, batch: (batch, 'counts'))
  >>> build = lambda model: lambda base, params, batch, key: LossSum(
  ...   model.hidden(base, params, batch), batch, batch)
  >>> loss = observed(build, model)
  >>> loss.with_statistics(None, {}, 3.0, None)
  (LossSum(total=3.0, count=3.0, correct=3.0), 'counts')
  """
  plain, states = build(model), model.hidden_with_statistics
  if states is None:
    return Observed(plain, None, build)

  def with_statistics(base: Base, params: Params, batch: Any, key: Key):
    seen = []

    def hidden(base, params, batch):
      states_of_batch, statistics = states(base, params, batch)
      seen.append(statistics)
      return states_of_batch

    seeing = model._replace(
      hidden=hidden, hidden_with_statistics=None, layers=None
    )
    sums = build(seeing)(base, params, batch, key)
    if len(seen) != 1:
      raise Error(
        f'observed: the loss reads the hidden states {len(seen)} times; it has '
        'to read them once.'
      )
    return sums, seen[0]

  return Observed(plain, with_statistics, build)


def on_model(loss: Loss, model: Model) -> Loss:
  """Returns the same loss of another network, such as a part of its own.

  Raises:
    Error: the loss does not know how it was built.

  >>> loss = Observed(None, None, build=lambda model: model.logits)
  >>> on_model(loss, Model(hidden=None, logits='the loss of this model'))
  'the loss of this model'
  """
  if isinstance(loss, Observed) and loss.build is not None:
    return loss.build(model)
  raise Error(
    'this loss cannot be computed on another network: it must be a '
    '`local.Observed` with `build`, as the losses of the models here are.'
  )


def with_statistics(loss: Loss) -> Callable[..., tuple[LossSum, Any]]:
  """Returns the function of a loss that also returns statistics.

  Raises:
    Error: the loss has no such function, as its network has no statistics.
  """
  if isinstance(loss, Observed) and loss.with_statistics is not None:
    return loss.with_statistics
  raise Error(
    'this loss gives no statistics of experts: it must be a `local.Observed`, '
    'as the losses of the models here are; your own network has no experts.'
  )
