"""Losses on a view of the parameters.

`viewed` returns a `Loss`, such as one of the shared or the personal part.
"""

from collections.abc import Callable

from fedjax_llm.types import (
  Loss,
  Params,
)


def viewed(loss: Loss, view: Callable[[Params], Params]) -> Loss:
  """Returns the loss on `view(params)` in place of the parameters.

  >>> double = viewed(lambda base, params, batch, key: params, lambda p: 2 * p)
  >>> double(None, 3, None, None)
  6
  """
  return lambda base, params, batch, key: loss(base, view(params), batch, key)
