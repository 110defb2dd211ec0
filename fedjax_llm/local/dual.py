"""Local training of a shared and a personal set of parameters."""

from collections.abc import Callable

from fedjax_llm.types import (
  Loss,
  Params,
)


def viewed(loss: Loss, view: Callable[[Params], Params]) -> Loss:
  """The loss of what a view makes of the parameters.

  >>> double = viewed(lambda base, params, batch, key: params, lambda p: 2 * p)
  >>> double(None, 3, None, None)
  6
  """
  return lambda base, params, batch, key: loss(base, view(params), batch, key)
