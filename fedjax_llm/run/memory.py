"""The section `memory` of a config: losses that need less memory.

`spared` returns the loss of a run with the modes that its config sets
(`memory.micro_batch`) or implies (an adapter in upper layers only).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm import adapters, local
from fedjax_llm.nodes import Chosen, protocol
from fedjax_llm.run import builders
from fedjax_llm.types import Error, Loss, Params


class Memory(NamedTuple):
  """The section `memory`: ways to spend less of it in local training."""

  # Rows of a batch whose activations exist at the same time; None: all. They
  # divide `cohort.batch_size`, and change nothing but rounding and speed.
  micro_batch: int | None = None


def check(conf: Mapping[str, Any]) -> None:
  """Raises `Error` for a `memory.micro_batch` that does not fit the batches."""
  rows = (conf.get('memory') or {}).get('micro_batch')
  if rows is None:
    return
  batch = conf['cohort']['batch_size']
  if rows < 1 or batch % rows:
    raise Error(
      f'memory.micro_batch is {rows}; it must divide cohort.batch_size, which '
      f'is {batch}.'
    )


def spared(conf: Mapping[str, Any], loss: Loss, num_layers: int | None) -> Loss:
  """Returns the loss of local training with the memory modes of a config.

  Args:
    conf: a checked config.
    loss: of the task and the model.
    num_layers: L of the network; None: it is not known.
  """
  check(conf)
  if num_layers:
    below = lowest(conf['adapter'], num_layers)
    loss = local.frozen_below(loss, below, only_chosen)
  return loss


def micro_batched(conf: Mapping[str, Any], loss: Loss) -> Loss:
  """Returns the loss over the micro-batches of the section `memory`."""
  rows = (conf.get('memory') or {}).get('micro_batch')
  return loss if rows is None else local.micro_batches(loss, rows)


def lowest(section: Mapping[str, Any], num_layers: int) -> int:
  """Returns the number of layers below the lowest one of an adapter.

  Args:
    section: the section `adapter`, with a field `layers` (LoRA in some layers)
      or the name `layers` (all weights of some layers).
    num_layers: L.

  >>> lowest({'name': 'lora', 'layers': [2, 3]}, 4), lowest({'name': 'lora'}, 4)
  (2, 0)
  >>> lowest({'name': 'layers'}, 4), lowest({'name': 'layers', 'which': [1]}, 4)
  (3, 1)
  """
  if builders.named(section) == 'layers':
    return min(i % num_layers for i in section.get('which', (-1,)))
  layers = section.get('layers')
  if layers is None:
    return 0
  return min(adapters.picked.numbers(layers, num_layers))


def only_chosen(params: Params) -> bool:
  """Returns True if all nodes of the layers are those of chosen layers.

  A method may add nodes to all layers, which train there.

  >>> from fedjax_llm.nodes import LowRank
  >>> import jax.numpy as jnp
  >>> node = LowRank(jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2)), jnp.ones(1))
  >>> only_chosen({'layers': {'q': node, 'picked': jnp.array([1])}})
  True
  >>> only_chosen({'layers': {'q': node}})
  False
  """
  below = dict(params.get('layers') or {})
  picked = below.pop(adapters.picked.NAME, None) is not None
  leaves = jax.tree.leaves(below, is_leaf=protocol.is_node)
  low_rank = lambda x: picked and hasattr(x, 'weight_shape')
  return bool(leaves) and all(
    isinstance(x, Chosen) or low_rank(x) for x in leaves
  )
