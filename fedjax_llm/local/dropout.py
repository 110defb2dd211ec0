"""Dropout in training: a loss whose adapter drops inputs at random."""

from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm.local.observed import Observed
from fedjax_llm.nodes import dropped
from fedjax_llm.types import Base, Error, Key, Loss, Params, known


def dropout(loss: Loss, rate: float) -> Loss:
  """Returns a loss with dropout on the inputs of low-rank adapters.

  An entry of the input of a factor a is zero with probability `rate`, and
  1 / (1 - rate) times its value otherwise, independently for each token,
  feature, weight and layer (`lora_dropout` of PEFT; Hu et al. 2021, arXiv
  2106.09685, appendix D). The masks are functions of the key of a step, thus of
  (seed, round, client, step). It is for training; evaluations take `loss`.

  Args:
    loss: of a network with the nodes `LowRank` or `Dora`.
    rate: from 0 to below 1; 0 returns `loss` itself.

  Raises:
    Error: a rate out of range; from the loss, nodes without a dropout.

  >>> from fedjax_llm import local, models
  >>> loss = local.causal_lm(models.random(vocab_size=32).model)
  >>> dropout(loss, 0.0) is loss
  True
  """
  if known(rate) and not 0 <= rate < 1:
    raise Error(
      f'adapter.lora_dropout is {rate}; it must be at least 0 and below 1.'
    )
  if known(rate) and rate == 0:
    return loss

  def thin(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_dropped(base: Base, params: Params, batch: Any, key: Key):
      own, key = jax.random.split(key)
      return function(base, dropped.drop(params, rate, own), batch, key)

    return of_dropped

  if isinstance(loss, Observed):
    again, states = loss.build, loss.with_statistics
    build = None if again is None else lambda model: thin(again(model))
    return Observed(thin(loss.loss), states and thin(states), build)
  return thin(loss)
