"""The memory of a lossy codec: error feedback, and differences of messages.

`remembering` returns a `Codec`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Error

MEMORIES = ('none', 'error', 'difference')


class Remembered(NamedTuple):
  """The state of a client: the codec's own, and an update's tree of floats."""

  inner: Any
  memory: Any  # float32: the error left, or the last update decoded


class Difference(NamedTuple):
  """A coded difference beside its reference, which both sides have."""

  coded: Any
  reference: Any


def check(name: str, memory: str) -> None:
  """Raises `Error` unless `memory` is one of `MEMORIES`.

  >>> check('sign', 'all')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: sign: memory='all' is none of 'none', 'error', \
'difference'.
  """
  if memory not in MEMORIES:
    words = ', '.join(map(repr, MEMORIES))
    raise Error(f'{name}: memory={memory!r} is none of {words}.')


def remembering(codec: Codec, memory: str) -> Codec:
  """Returns a codec of updates with a memory of former rounds.

  With C the codec, u_t the client's updates and v_t what the server decodes:

      'none':        v_t = C(u_t)
      'error':       v_t = C(u_t + e_t),         e_t+1 = u_t + e_t - v_t
      'difference':  v_t = h_t + C(u_t - h_t),   h_t+1 = v_t

  'error' is error feedback (Karimireddy et al. 2019, arXiv 1901.09847,
  algorithm 2): sum_t v_t + e = sum_t u_t at every time. 'difference' sends the
  residual against the last decoded update (EF21; Richtarik et al. 2021, arXiv
  2106.05203, algorithm 2); the server keeps an update for each client. Both
  start from zero. Entries that are not trained in a round keep their memory.
  The bytes are those of C. A client that is left out of a round keeps the
  memory from before it, as if it had sent nothing.

  Args:
    codec: a codec that is decoded client by client.
    memory: 'none', 'error' or 'difference'.

  Raises:
    Error: another memory; a memory of an additive codec, whose decoded update
      no client knows.

  >>> from fedjax_llm import uploads
  >>> from fedjax_llm.types import Masks
  >>> codec = remembering(uploads.top_k(0.5), 'error')
  >>> update, masks = jnp.array([3.0, 2.0]), Masks(None, None)
  >>> state = codec.init(update)
  >>> _, state = codec.encode(update, masks, state, None)
  >>> message, state = codec.encode(update, masks, state, None)
  >>> codec.decode(message, update, None).tolist(), state.memory.tolist()
  ([0.0, 4.0], [3.0, 0.0])
  """
  check('remembering', memory)
  if memory == 'none':
    return codec
  if codec.additive:
    raise Error(
      f'remembering: memory={memory!r} needs the decoded update of a single '
      "client, and this codec decodes the sum: use memory='none'."
    )

  def init(update):
    return Remembered(codec.init(update), tree.zeros_like(update, jnp.float32))

  def with_error(update, masks, state, context):
    inside = tree.apply_mask(update, masks.trained)
    total = tree.map_present(
      lambda e, u: e + u.astype(jnp.float32), state.memory, inside
    )
    sent = tree.map_present(lambda x, u: x.astype(u.dtype), total, inside)
    message, inner = codec.encode(sent, masks, state.inner, context)
    decoded = codec.decode(message, sent, context)
    return message, Remembered(inner, tree.sub(total, decoded))

  def with_difference(update, masks, state, context):
    rest = tree.map_present(
      lambda u, h: (u.astype(jnp.float32) - h).astype(u.dtype),
      update,
      state.memory,
    )
    coded, inner = codec.encode(rest, masks, state.inner, context)
    decoded = codec.decode(coded, rest, context)
    reference = tree.apply_mask(state.memory, masks.trained)
    message = Difference(coded, reference)
    return message, Remembered(inner, tree.add(state.memory, decoded))

  def decode(message, start, context):
    if memory == 'error':
      return codec.decode(message, start, context)
    decoded = codec.decode(message.coded, start, context)
    return tree.map_present(
      lambda h, d: (h + d.astype(jnp.float32)).astype(d.dtype),
      message.reference,
      decoded,
    )

  def num_bytes(message, masks):
    coded = message if memory == 'error' else message.coded
    return codec.num_bytes(coded, masks)

  encode = with_error if memory == 'error' else with_difference
  return Codec(init, encode, decode, num_bytes, lossy=True)


def inside(leaf: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Returns the number of entries of a leaf inside its mask, int32.

  >>> int(inside(jnp.ones((5, 2)), jnp.array([True, False])))
  5
  """
  if mask is None:
    return jnp.int32(leaf.size)
  each = leaf.size // max(mask.size, 1)
  return jnp.sum(mask, dtype=jnp.int32) * each


def packed(num: jax.Array, bits: int) -> jax.Array:
  """Returns the bytes of `num` codes of `bits` bits and one float32, int32.

  No code, no float: zero.

  >>> int(packed(jnp.int32(9), 2)), int(packed(jnp.int32(0), 2))
  (7, 0)
  """
  # In eights, so that the count of bits does not exceed 32 bits.
  codes = num // 8 * bits + -(-(num % 8 * bits) // 8)
  return jnp.where(num > 0, codes + 4, 0).astype(jnp.int32)
