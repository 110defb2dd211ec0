"""Emulators: networks from which layers in the middle are left out.

`Layout` says which layers a client trains, emulates or does not have, and
`on_emulator` returns the loss of the smaller network. Parameters are
`Halves(client, server)`: the adapters of the outer layers, which clients train,
and those of all layers between them, which belong to the server.
"""

from typing import Any, NamedTuple

import jax

from fedjax_llm import local, tree
from fedjax_llm.adapters import halves
from fedjax_llm.nodes import Halves, LowRank
from fedjax_llm.recipes.split.cutting import layers_of
from fedjax_llm.types import Error, Loss, Model, Params, known


class Layout(NamedTuple):
  """The layers of an emulator.

  >>> layout = Layout(bottom=1, top=2, drop=0.5)
  >>> layout.kept(7), layout.numbers(7)
  ([1, 4], [0, 1, 4, 5, 6])
  """

  bottom: int  # layers below that clients train
  top: int  # layers above that clients train
  drop: float  # the share of the layers between them that is left out

  def kept(self, num_layers: int) -> list[int]:
    """Returns the layers between them that the emulator has."""
    between = num_layers - self.bottom - self.top
    return [self.bottom + i for i in uniform(between, self.drop)]

  def numbers(self, num_layers: int) -> list[int]:
    """Returns all layers of the emulator with its adapters."""
    above = range(num_layers - self.top, num_layers)
    return [*range(self.bottom), *self.kept(num_layers), *above]


def uniform(num_layers: int, drop: float) -> list[int]:
  """Returns the layers that a uniform drop keeps, floor(i (L - 1) / (L' - 1)).

  L' is (1 - drop) L, rounded, and at least 1 (Xiao et al. 2023, arXiv
  2302.04870, section 3.3).

  >>> uniform(10, 0.5), uniform(4, 0.0), uniform(5, 0.9)
  ([0, 2, 4, 6, 9], [0, 1, 2, 3], [0])
  """
  number = max(round((1 - drop) * num_layers), 1)
  if number == 1:
    return [0]
  return [i * (num_layers - 1) // (number - 1) for i in range(number)]


def checked(who: str, bottom: int, top: int, drop: float) -> Layout:
  """Returns the layout of these settings, an `Error` for one out of range."""
  for name, value in (('bottom', bottom), ('top', top)):
    if value < 0:
      raise Error(f'{who}: {name} is {value}; it must be 0 or more.')
  if bottom + top < 1:
    raise Error(f'{who}: bottom and top are 0, so clients have no layer.')
  if not known(drop) or not 0 <= drop < 1:
    raise Error(f'{who}: drop is {drop}; it must be from 0 to below 1.')
  return Layout(bottom, top, drop)


def cut(params: Params, layout: Layout, who: str) -> Halves:
  """Returns the adapters of the outer layers, and of those between them.

  Raises:
    Error: nodes other than `LowRank` in the layers, whose absence is a zero;
      too few layers for a layer in the middle.

  >>> from jax import numpy as jnp
  >>> node = LowRank(jnp.ones((4, 2, 1)), jnp.ones((4, 1, 2)), jnp.ones(4))
  >>> parts = cut({'layers': {'q': node}}, Layout(1, 1, 0.5), 'it')
  >>> [part['layers']['q'].scale.size for part in parts]
  [2, 2]
  """
  num = halves.num_layers(params, who)
  if num <= layout.bottom + layout.top:
    raise Error(
      f'{who}: bottom={layout.bottom} and top={layout.top} leave none of the '
      f'{num} layers for the emulator.'
    )
  is_low = lambda x: isinstance(x, LowRank)
  nodes = jax.tree.leaves(params['layers'], is_leaf=is_low)
  if not all(map(is_low, nodes)):
    raise Error(
      f'{who} needs low-rank factors in the layers: adapter.name=lora.'
    )
  below, above = layout.bottom, num - layout.top
  outside = {name: x for name, x in params.items() if name != 'layers'}
  both = halves.stacked(
    halves.rows(params['layers'], slice(None, below)),
    halves.rows(params['layers'], slice(above, None)),
  )
  middle = halves.rows(params['layers'], slice(below, above))
  return Halves({**outside, 'layers': both}, {'layers': middle})


def joined(parts: Halves, layout: Layout) -> Params:
  """Returns the adapter of all layers, those of the server's in the middle."""
  own, below = parts.client['layers'], layout.bottom
  layers = halves.stacked(
    halves.stacked(
      halves.rows(own, slice(None, below)), parts.server['layers']
    ),
    halves.rows(own, slice(below, None)),
  )
  return {**parts.client, 'layers': layers}


def plugged(parts: Halves, layout: Layout) -> Params:
  """Returns the clients' adapters in the whole network, no others beside them.

  >>> from jax import numpy as jnp
  >>> node = LowRank(jnp.ones((3, 2, 1)), jnp.ones((3, 1, 2)), jnp.ones(3))
  >>> layout = Layout(1, 1, 0.0)
  >>> parts = cut({'layers': {'q': node}}, layout, 'it')
  >>> plugged(parts, layout)['layers']['q'].b.ravel().tolist()
  [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
  """
  return joined(parts._replace(server=tree.zeros_like(parts.server)), layout)


def on_emulator(loss: Loss, model: Model, layout: Layout) -> Loss:
  """Returns the loss of the network without the layers that are left out.

  It takes the whole adapter. It is built where it is first called, since a
  method that only reads a trained state has no network.
  """

  def hidden(base: Any, params: Params, batch: Any) -> jax.Array:
    num = halves.num_layers(params, 'the emulator')
    return layers_of(model)(base, params, batch, layout.numbers(num))

  def on(base, params, batch, key):
    small = local.on_model(loss, Model(hidden, model.logits, read=model.read))
    return small(base, params, batch, key)

  return on
