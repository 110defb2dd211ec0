"""A codec of matrices as products of two thin factors: PowerSGD.

`low_rank` returns a `Codec`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, tree
from fedjax_llm.types import Codec, Error
from fedjax_llm.uploads import feedback


class Factors(NamedTuple):
  """A stack of matrices left @ right' of rank R."""

  left: Any  # [..., D, R], orthonormal columns
  right: Any  # [..., F, R]


class LowRankMessage(NamedTuple):
  """The leaves as `Factors` or whole, and the masks, which both sides know."""

  parts: Any
  trained: Any


def low_rank(rank: int = 4, memory: str = 'error') -> Codec:
  """Returns a codec of each matrix of a leaf as a product of rank R.

      left = orthonormal(U basis),   right = U' left,   C(U) = left right'

  with the basis [F, R] of the client's last `right`, at first a random one: a
  step of the power method a round (PowerSGD; Vogels et al. 2019, arXiv
  1905.13727, algorithm 1, here client by client). C(U) is U projected onto R
  directions, so ||U - C(U)||^2 = ||U||^2 - ||C(U)||^2, and U itself if its rank
  is at most R. The last two axes of a leaf are a matrix; a leaf with fewer
  axes, or of no more entries than its factors, is sent whole. R is cut to the
  sides of the matrix. Bytes are those of the factors in the leaf's dtype.

  Args:
    rank: R.
    memory: 'error', 'difference' or 'none': see `feedback.remembering`.

  Raises:
    Error: a rank below one; another memory.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = low_rank(1, 'none'), jnp.ones((3, 4))
  >>> masks = Masks(None, None)
  >>> message, _ = codec.encode(update, masks, codec.init(update), None)
  >>> jnp.round(codec.decode(message, update, None)[0], 4).tolist()
  [1.0, 1.0, 1.0, 1.0]
  >>> int(codec.num_bytes(message, masks))  # (3 + 4) * 1 float32
  28
  """
  if rank < 1:
    raise Error(f'low_rank: rank={rank} must be at least 1.')
  feedback.check('low_rank', memory)
  stop = lambda x: x is None or isinstance(x, Factors)
  product = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  def cut(leaf) -> int:
    """Returns R for a leaf, 0 for one that is sent whole."""
    if leaf.ndim < 2:
      return 0
    height, width = leaf.shape[-2:]
    r = min(rank, height, width)
    return r if r * (height + width) < height * width else 0

  def init(update):
    leaves, treedef = jax.tree.flatten(update)

    def basis(i, leaf):
      if not (r := cut(leaf)):
        return jnp.zeros((0,))
      key = jax.random.fold_in(jax.random.key(0), i)
      return jax.random.normal(key, (*leaf.shape[:-2], leaf.shape[-1], r))

    bases = [basis(i, leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, bases)

  def encode(update, masks, state, context):
    del context
    inside = tree.apply_mask(update, masks.trained)

    def leaf(x, basis):
      if not cut(x):
        return x
      matrix = x.astype(jnp.float32)
      left, _ = linalg.qr(product(matrix, basis))
      right = product(jnp.swapaxes(matrix, -1, -2), left)
      return Factors(left.astype(x.dtype), right.astype(x.dtype))

    def following(part, basis):
      if not isinstance(part, Factors):
        return basis
      right = part.right.astype(jnp.float32)
      some = jnp.any(right != 0, axis=(-2, -1), keepdims=True)
      # The basis of a matrix of lower rank is completed by the QR.
      return jnp.where(some, linalg.qr(right)[0], basis)

    parts = tree.map_present(leaf, inside, state)
    return (
      LowRankMessage(parts, masks.trained),
      jax.tree.map(
        lambda p, b: None if p is None else following(p, b),
        parts,
        state,
        is_leaf=stop,
      ),
    )

  def decode(message, start, context):
    del context

    def leaf(part, x):
      if not isinstance(part, Factors):
        return part
      left, right = (y.astype(jnp.float32) for y in part)
      return product(left, jnp.swapaxes(right, -1, -2)).astype(x.dtype)

    whole = jax.tree.map(leaf, message.parts, start, is_leaf=stop)
    return tree.apply_mask(whole, message.trained)

  def num_bytes(message, masks):
    def leaf(part, mask):
      if part is None:
        return None
      if not isinstance(part, Factors):
        return feedback.inside(part, mask) * part.dtype.itemsize
      num = sum(x.size * x.dtype.itemsize for x in part)
      return jnp.int32(num) if mask is None else jnp.any(mask) * jnp.int32(num)

    return jax.tree.map(leaf, message.parts, masks.trained, is_leaf=stop)

  codec = Codec(init, encode, decode, num_bytes, lossy=True)
  return feedback.remembering(codec, memory)
