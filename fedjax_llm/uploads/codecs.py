"""Codecs of dense updates: unchanged, transformed by optax, or not sent.

Builders return a `Codec`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm import tree
from fedjax_llm.types import Codec, Error

_LARGEST = np.iinfo(np.int32).max


def _dense_bytes(leaf: jax.Array) -> int:
  num = math.prod(leaf.shape) * leaf.dtype.itemsize
  if num > _LARGEST:
    raise Error(
      f'uploads: a leaf of shape {tuple(leaf.shape)} and dtype {leaf.dtype} '
      f'takes {num} bytes, more than the {_LARGEST} that one count holds: '
      'split the leaf.'
    )
  return num


def _masked_bytes(leaf: jax.Array, mask: jax.Array | None) -> jax.Array:
  dense = _dense_bytes(leaf)
  if mask is None:
    return jnp.int32(dense)
  # An entry of the mask broadcasts to this many entries of the leaf.
  each = dense // max(math.prod(mask.shape), 1)
  return jnp.sum(mask, dtype=jnp.int32) * each


def identity(entries: str = 'trained', bitmap: bool = False) -> Codec:
  """Returns a codec with the tree as the message, at the entries that travel.

  An upload sends the entries that were trained, a download those that the
  client holds (`entries='held'`: a value that is held but not trained has to
  arrive too). The others are zero in the message and cost nothing. Bytes are
  the entries inside the mask times the size of the leaf's dtype, exactly. Both
  sides know the masks, unless the client chose them: with `bitmap` each mask
  that is not all False also costs a bit an entry.

  Raises:
    Error: `entries` is another word; a leaf of 2 GiB or more.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = identity(), {'a': jnp.ones((5, 4))}
  >>> masks = Masks(None, {'a': jnp.array([True, True, False, False])})
  >>> message, _ = codec.encode(update, masks, codec.init(update), None)
  >>> int(codec.num_bytes(message, masks)['a'])  # 5 * 2 float32
  40
  """
  if entries not in ('trained', 'held'):
    raise Error(
      f"identity: entries={entries!r} is neither 'trained' nor 'held'."
    )

  def init(update):
    del update
    return ()

  def encode(update, masks, state, context):
    del context
    return tree.apply_mask(update, getattr(masks, entries)), state

  def decode(message, start, context):
    del start, context
    return message

  def count(leaf, mask):
    num = _masked_bytes(leaf, mask)
    if bitmap and mask is not None and mask.ndim:
      num += jnp.where(jnp.any(mask), jnp.int32(-(-mask.size // 8)), 0)
    return num

  def num_bytes(message, masks):
    return jax.tree.map(
      lambda x, m: None if x is None else count(x, m),
      message,
      getattr(masks, entries),
      is_leaf=lambda x: x is None,
    )

  return Codec(init, encode, decode, num_bytes)


def known() -> Codec:
  """Returns a codec that sends nothing: the receiver computes all of it.

  As a download, for parameters that are drawn from a common seed.

  >>> codec = known()
  >>> message, _ = codec.encode({'a': jnp.ones(3)}, None, (), None)
  >>> codec.decode(message, {'a': jnp.ones(3)}, None)['a'].tolist()
  [1.0, 1.0, 1.0]
  """

  def encode(update, masks, state, context):
    del update, masks, context
    return (), state

  def decode(message, start, context):
    del message, context
    return start

  return Codec(lambda _: (), encode, decode, lambda message, masks: ())


def from_optax(transform: optax.GradientTransformation) -> Codec:
  """Returns an optax transformation of updates as a codec.

  The message is the transformed update, the client's upload state is the
  state of the transformation, and untrained entries stay zero. The bytes
  are those of the dense update. Clipping and gradient noise travel this way;
  a transformation that needs parameters (weight decay) does not. One that
  draws random numbers from a seed of its own draws the same for every client.

  Raises:
    Error: a leaf of 2 GiB or more.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = from_optax(optax.clip(0.5)), jnp.array([0.2, 3.0])
  >>> masks = Masks(None, jnp.bool_(True))
  >>> message, _ = codec.encode(update, masks, codec.init(update), None)
  >>> message.tolist()  # float32
  [0.20000000298023224, 0.5]
  """

  def encode(update, masks, state, context):
    del context
    inside = tree.apply_mask(update, masks.trained)
    message, state = transform.update(inside, state)
    message = jax.tree.map(lambda m, u: m.astype(u.dtype), message, inside)
    return tree.apply_mask(message, masks.trained), state

  def decode(message, start, context):
    del start, context
    return message

  def num_bytes(message, masks):
    del masks
    return jax.tree.map(lambda x: jnp.int32(_dense_bytes(x)), message)

  def init(update) -> Any:
    return transform.init(update)

  return Codec(init, encode, decode, num_bytes, lossy=True)
