"""A mark in the parameters: the lowest layers are not trained.

The network computes the layers below the mark without derivatives of their
weights, so that no activation of theirs is kept for a backward pass. The mark
is part of the tree's structure and holds no array; a loss puts it in just
before the network reads the parameters (`local.frozen_below`), and no state
of a method contains it.
"""

from collections.abc import Mapping
from typing import Any

from fedjax_llm.types import Bound, Params

NAME = 'frozen_below'


def marked(params: Params, num_layers: int) -> Params:
  """Returns the parameters with the mark of that many frozen layers.

  >>> marked({'w': 1.0}, 2)
  {'w': 1.0, 'frozen_below': 2}
  """
  return {**params, NAME: Bound(num_layers)}


def unmarked(params: Any) -> tuple[int, Any]:
  """Returns the number of frozen layers and the parameters without the mark.

  >>> unmarked({'w': 1.0, 'frozen_below': Bound(2)}), unmarked({'w': 1.0})
  ((2, {'w': 1.0}), (0, {'w': 1.0}))
  """
  if not isinstance(params, Mapping) or NAME not in params:
    return 0, params
  rest = {name: x for name, x in params.items() if name != NAME}
  return int(params[NAME]), rest
