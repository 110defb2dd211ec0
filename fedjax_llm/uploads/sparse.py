"""Codecs that send the largest entries and their places.

`top_k` returns a `Codec`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Error
from fedjax_llm.uploads import feedback


class Sparse(NamedTuple):
  """The k entries of P that travel: values in order, and their places.

  `where` is [k] int32 places, or a bitmap [ceil(P / 8)] uint8 where that is
  less.
  """

  values: Any  # [k]
  where: Any


class SparseTree(NamedTuple):
  """The entries chosen over a whole tree; `shape` marks the leaves in it."""

  entries: Sparse
  shape: Any  # empty arrays, None where a leaf is absent


def top_k(
  density: float = 0.25, per: str = 'tree', memory: str = 'none'
) -> Codec:
  """Returns a codec of the k = ceil(density P) entries of largest magnitude.

  All other entries are zero. It codes an upload of an update, or a download of
  parameters (the client's start is then zero elsewhere). Without a memory the
  entries left out are lost. Bytes are those of k values and of their places, as
  int32 or as a bitmap, whichever is less; a density of one sends the entries
  alone. It shrinks the distance: ||u - C(u)||^2 <= (1 - k / P) ||u||^2.

  Args:
    density: the share of entries that travel, in (0, 1].
    per: the set from which the k entries are chosen: 'tree' takes all leaves
      together as FLASC does (arXiv 2406.05233), 'leaf' each leaf by itself, so
      that every leaf sends some.
    memory: 'none', 'error' (error feedback; Stich et al. 2018, arXiv
      1809.07599, algorithm 1) or 'difference': see `feedback.remembering`.

  Raises:
    Error: a density out of range; `per` or `memory` is another word.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = top_k(0.5), {'a': jnp.array([1.0, -5.0, 0.1, 3.0])}
  >>> message, _ = codec.encode(update, Masks(None, {'a': None}), (), None)
  >>> codec.decode(message, update, None)['a'].tolist()
  [0.0, -5.0, 0.0, 3.0]
  """
  if not 0 < density <= 1:
    raise Error(f'top_k: density={density} must be above 0 and at most 1.')
  if per not in ('tree', 'leaf'):
    raise Error(f"top_k: per={per!r} is neither 'tree' nor 'leaf'.")
  feedback.check('top_k', memory)

  def encode(update, masks, state, context):
    del context
    inside = tree.apply_mask(update, masks.trained)
    if per == 'leaf':
      return jax.tree.map(lambda x: _largest(x.ravel(), density), inside), state
    flat = tree.ravel(jax.tree.map(lambda x: x[None], inside))[0]
    empty = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), inside)
    return SparseTree(_largest(flat, density), empty), state

  def decode(message, start, context):
    del context
    if per == 'leaf':
      return jax.tree.map(
        lambda m, x: None if m is None else _dense(m, x.size).reshape(x.shape),
        message,
        start,
        is_leaf=lambda m: m is None or isinstance(m, Sparse),
      )
    like = tree.like(start, message.shape)
    leaves, treedef = jax.tree.flatten(like)
    flat = _dense(message.entries, sum(x.size for x in leaves))
    parts = tree.split_flat(flat, leaves)
    filled = jax.tree.unflatten(
      treedef, [part.astype(x.dtype) for part, x in zip(parts, leaves)]
    )
    return tree.like(tree.merge(filled, start), message.shape)

  def num_bytes(message, masks):
    del masks
    return jax.tree.map(lambda x: jnp.int32(x.size * x.dtype.itemsize), message)

  codec = Codec(lambda _: (), encode, decode, num_bytes, lossy=True)
  return feedback.remembering(codec, memory)


def _largest(flat: jax.Array, density: float) -> Sparse:
  size = flat.size
  k = min(size, math.ceil(density * size))
  if k == size:
    return Sparse(flat, jnp.zeros((0,), jnp.int32))
  places = tree.largest_places(jnp.abs(flat), k)
  values = flat[places]
  if 4 * k <= -(-size // 8):
    return Sparse(values, places.astype(jnp.int32))
  chosen = jnp.zeros(size, bool).at[places].set(True)
  return Sparse(values, jnp.packbits(chosen))


def _dense(sparse: Sparse, size: int) -> jax.Array:
  values, where = sparse
  k = values.size
  if k == size:
    return values
  if where.dtype == jnp.uint8:
    where = jnp.nonzero(jnp.unpackbits(where, count=size), size=k)[0]
  return jnp.zeros(size, values.dtype).at[where].set(values)
