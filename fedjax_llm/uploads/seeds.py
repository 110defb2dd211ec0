"""Codecs of scalars: coefficients in a seeded basis, and few entries of many.

Builders return a `Codec`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes import directions
from fedjax_llm.types import Codec, Context, Error


def seeded(num: int = 64, distribution: str = 'normal') -> Codec:
  """Returns an additive codec: J coefficients in a basis of common directions.

      message_j = <z_j, u>,    decoded: 1/J sum_j message_j z_j,

  with J = `num` directions that both sides draw from the key of the round and
  nobody sends. The decoded update has the mean u over the draws, and adds noise
  of variance (P + 1) / J ||u||^2 for P entries. The messages of all clients are
  summed before they are decoded, so the rule must be linear. Four bytes a
  coefficient.

  Raises:
    Error: fewer than one direction; an unknown distribution.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = seeded(4), {'w': jnp.ones((5, 20))}
  >>> context = Context(round_key=jax.random.key(0))
  >>> message, _ = codec.encode(update, Masks(None, {'w': None}), (), context)
  >>> message.shape, int(codec.num_bytes(message, None))
  ((4,), 16)
  """
  if num < 1:
    raise Error(f'seeded: num={num} must be at least 1.')
  directions.check(distribution, 'seeded')

  def keys(context: Context) -> jax.Array:
    return jax.random.split(context.round_key, num)

  def encode(update, masks, state, context):
    inside = tree.apply_mask(update, masks.trained)

    def one(key):
      return tree.dot(directions.draw(key, inside, distribution), inside)

    return jax.lax.map(one, keys(context)), state

  def decode(message, start, context):
    zeros = tree.zeros_like(start, jnp.float32)
    return directions.combined(
      zeros, keys(context), message / num, distribution
    )

  def num_bytes(message, masks):
    del masks
    return jnp.int32(4 * message.size)

  return Codec(
    lambda _: (), encode, decode, num_bytes, additive=True, lossy=True
  )


def nonzero() -> Codec:
  """Returns a codec of the entries that are not zero, with their places.

  Without loss. An entry costs its value and four bytes for its place; a leaf
  with so many entries that all of them cost less is sent whole. For updates
  that touch few entries, such as a histogram of seeds.

  >>> codec, update = nonzero(), {'w': jnp.zeros(100).at[7].set(2.0)}
  >>> message, _ = codec.encode(update, None, (), None)
  >>> int(codec.num_bytes(message, None)['w'])
  8
  """

  def num_bytes(message, masks):
    del masks

    def leaf(x):
      each = x.dtype.itemsize
      some = jnp.sum(x != 0, dtype=jnp.int32)
      return jnp.minimum(some * (each + 4), jnp.int32(x.size * each))

    return jax.tree.map(leaf, message)

  def encode(update, masks, state, context) -> tuple[Any, Any]:
    del masks, context
    return update, state

  def decode(message, start, context):
    del start, context
    return message

  return Codec(lambda _: (), encode, decode, num_bytes)
