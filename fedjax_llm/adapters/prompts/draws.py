"""Initial values of the parameters of prompts and of their networks."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.encoded import Affine, Direction
from fedjax_llm.types import Base, Error, Key


def at_least(**sizes: int) -> None:
  """Raises `Error` for a size below one.

  >>> at_least(length=0)
  Traceback (most recent call last):
  fedjax_llm.types.Error: adapter.length is 0; it must be at least 1.
  """
  for name, size in sizes.items():
    if size < 1:
      raise Error(f'adapter.{name} is {size}; it must be at least 1.')


def width(base: Base) -> int:
  """Returns D, the size of the rows in front of which a prompt stands.

  Raises:
    Error: the base embeds neither tokens nor patches.

  >>> width({'embed_class': {'embedding': jnp.ones((1, 4))}})
  4
  """
  pictures = base.get('embed_class', {}).get('embedding')
  return (embedding(base) if pictures is None else pictures).shape[-1]


def embedding(base: Base) -> Any:
  """Returns the table of tokens of the base, [V, D].

  Raises:
    Error: the base has none.
  """
  table = base.get('embed_tokens', {}).get('embedding')
  if table is None:
    raise Error(
      'the model has no embed_tokens, so no prompt can stand in front of a '
      'text.'
    )
  return table


def num_layers(base: Base) -> int:
  return projection(base).shape[0]


def projection(base: Base) -> Any:
  """Returns the matrices of the keys, [L, D, F].

  Raises:
    Error: the base has no layers of attention.
  """
  attention = base.get('layers', {}).get('self_attn', {})
  if 'k_proj' not in attention:
    raise Error(
      'the model has no layers/self_attn/k_proj, so it takes no prefix.'
    )
  return attention['k_proj']['kernel']


def uniform(key: Key, shape: tuple[int, ...], bound: float) -> jax.Array:
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def affine(key: Key, inputs: int, features: int, *lead: int) -> Affine:
  """Returns a layer with uniform entries in +-1 / sqrt(inputs)."""
  one, two = jax.random.split(key)
  bound = inputs**-0.5
  return Affine(
    uniform(one, (*lead, inputs, features), bound),
    uniform(two, (*lead, features), bound),
  )


def direction(key: Key, inputs: int, hidden: int) -> Direction:
  """Returns a direction of an LSTM, uniform in +-1 / sqrt(hidden)."""
  keys, bound = jax.random.split(key, 3), hidden**-0.5
  return Direction(
    uniform(keys[0], (inputs, 4 * hidden), bound),
    uniform(keys[1], (hidden, 4 * hidden), bound),
    uniform(keys[2], (4 * hidden,), bound),
  )
