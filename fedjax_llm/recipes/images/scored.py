"""Parts of the methods on dual encoders: their node, losses of one round."""

from collections.abc import Callable
from typing import Any

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.types import Context, Error, LocalUpdate, Loss, Params

# Drawn pictures, skewed over clients, whose classes have names.
IMAGES: dict[str, Any] = dict(
  task=dict(name='zero_shot', template='a drawing of a {}.'),
  data=dict(name='shapes', num=240),
  partition=dict(name='dirichlet', num_clients=10, alpha=0.3, min_size=6),
  model=dict(name='random_clip'),
)


def node_of(name: str, params: Params, kind: Any, adapter: str) -> Any:
  """Returns the node at 'scores' of the parameters.

  Raises:
    Error: they have none of this kind.

  >>> from fedjax_llm.nodes import Context as Rows
  >>> node_of('prompt_fl', {'w': 1.0}, Rows, 'context')
  Traceback (most recent call last):
  fedjax_llm.types.Error: prompt_fl needs adapter.name=context.
  """
  node = params.get('scores') if isinstance(params, dict) else None
  if not isinstance(node, kind):
    raise Error(f'{name} needs adapter.name={adapter}.')
  return node


def in_round(
  build: Callable[[Params, Any, Context], Loss], optimizer: LocalOptimizer
) -> LocalUpdate:
  """Returns steps of an optimizer on a loss that is made in each round.

  `build(start, batches, context)` gets what the client received, its batches
  [S, ...] of the round, and its context.

  >>> update = in_round(lambda start, batches, context: None,
  ...                   local.optimizer('sgd'))
  >>> update.init({'w': 1.0})
  ()
  """

  def run(base, start, state, batches, masks, context):
    loss = build(start, batches, context)
    step = local.sgd(loss, optimizer)
    return step.run(base, start, state, batches, masks, context)

  return LocalUpdate(lambda trainable: (), run)
