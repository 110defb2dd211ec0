"""Codecs of few bits an entry: scaled signs, and uniform levels.

Builders return a `Codec`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Error
from fedjax_llm.uploads import feedback


class Levels(NamedTuple):
  """A leaf as whole numbers and the float32 that a unit of them stands for.

  `levels` has the leaf's shape, int8, and is zero outside the mask. The
  entries inside the mask are what travels, `bits` each.
  """

  levels: Any
  unit: Any  # [] float32


def sign(memory: str = 'error') -> Codec:
  """Returns a codec of signs, a bit an entry, and of one scale a leaf.

      C(u) = ||u||_1 / n sign(u),   sign(0) = 1,

  for each leaf with n entries inside the mask. With its default memory it is
  EF-signSGD (Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1). It
  shrinks the distance, ||u - C(u)||^2 = ||u||^2 - ||u||_1^2 / n, and is biased:
  without a memory its error stays. Bytes are ceil(n / 8) + 4 a leaf.

  Args:
    memory: 'error', 'difference' or 'none': see `feedback.remembering`.

  Raises:
    Error: another memory.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = sign('none'), jnp.array([1.0, -2.0, 0.0])
  >>> message, _ = codec.encode(update, Masks(None, None), (), None)
  >>> codec.decode(message, update, None).tolist()
  [1.0, -1.0, 1.0]
  """
  feedback.check('sign', memory)

  def encode(leaf, mask, key):
    del key
    num = jnp.maximum(feedback.inside(leaf, mask), 1)
    signs = jnp.where(leaf < 0, -1, 1).astype(jnp.int8)
    if mask is not None:
      signs = jnp.where(mask, signs, 0).astype(jnp.int8)
    return Levels(signs, jnp.sum(jnp.abs(leaf)) / num)

  return feedback.remembering(_by_leaf(encode, bits=1), memory)


def quantised(
  bits: int = 8,
  rounding: str = 'stochastic',
  scale: str = 'max',
  memory: str = 'none',
) -> Codec:
  """Returns a codec of evenly spaced levels, `bits` bits an entry.

      C(u)_i = s / L round(L u_i / s),   L = 2^(bits - 1) - 1 = 127, 7 or 1,

  for each leaf, with s its largest magnitude or its Euclidean norm over n
  entries inside the mask. Bytes are ceil(n bits / 8) + 4 a leaf.

  Args:
    bits: 8, 4 or 2.
    rounding: 'nearest', with |C(u)_i - u_i| <= s / (2 L), or 'stochastic', up
      or down with mean u_i and E||C(u) - u||^2 <= n s^2 / (4 L^2).
    scale: 'max' or 'norm'. Stochastic rounding with the norm is QSGD (Alistarh
      et al. 2017, arXiv 1610.02132, section 3.1): its error is also at most
      min(n / L^2, sqrt(n) / L) ||u||^2. For large leaves 'max' errs less.
    memory: 'none', 'error' or 'difference': see `feedback.remembering`.

  Raises:
    Error: another number of bits, rounding, scale or memory.

  >>> from fedjax_llm.types import Masks
  >>> codec = quantised(2, 'nearest')
  >>> update, masks = jnp.array([4.0, -3.0, 1.0]), Masks(None, None)
  >>> message, _ = codec.encode(update, masks, (), None)
  >>> codec.decode(message, update, None).tolist()
  [4.0, -4.0, 0.0]
  >>> int(codec.num_bytes(message, masks))  # 6 bits and a float32
  5
  """
  if bits not in (2, 4, 8):
    raise Error(f'quantised: bits={bits} is none of 2, 4, 8.')
  if rounding not in ('nearest', 'stochastic'):
    raise Error(
      f"quantised: rounding={rounding!r} is neither 'nearest' nor 'stochastic'."
    )
  if scale not in ('max', 'norm'):
    raise Error(f"quantised: scale={scale!r} is neither 'max' nor 'norm'.")
  feedback.check('quantised', memory)
  most = 2 ** (bits - 1) - 1

  def encode(leaf, mask, key):
    del mask  # the leaf is zero outside, and zero is a level
    if scale == 'max':
      size = jnp.max(jnp.abs(leaf), initial=0.0)
    else:
      size = tree.norm(leaf)
    at = jnp.abs(leaf) / jnp.where(size > 0, size, 1.0) * most
    if rounding == 'nearest':
      steps = jnp.round(at)
    else:
      steps = jnp.floor(at + jax.random.uniform(key, at.shape))
    steps = jnp.minimum(steps, most)  # floats may round above it
    levels = jnp.where(leaf < 0, -steps, steps).astype(jnp.int8)
    return Levels(levels, size / most)

  codec = _by_leaf(encode, bits, draws=rounding == 'stochastic')
  return feedback.remembering(codec, memory)


def _by_leaf(
  encode_leaf: Callable[..., Levels], bits: int, draws: bool = False
) -> Codec:
  """Returns the codec of `(leaf float32, mask or None, key) -> Levels`."""
  stop = lambda x: x is None or isinstance(x, Levels)

  def encode(update, masks, state, context):
    leaves, treedef = jax.tree.flatten(
      tree.apply_mask(update, masks.trained), is_leaf=stop
    )
    trained = treedef.flatten_up_to(masks.trained)
    made = []
    for i, (leaf, mask) in enumerate(zip(leaves, trained)):
      if leaf is None:
        made.append(None)
        continue
      key = jax.random.fold_in(context.key, i) if draws else None
      made.append(encode_leaf(leaf.astype(jnp.float32), mask, key))
    return jax.tree.unflatten(treedef, made), state

  def decode(message, start, context):
    del context

    def leaf(m, x):
      if m is None:
        return None
      return (m.levels.astype(jnp.float32) * m.unit).astype(x.dtype)

    return jax.tree.map(leaf, message, start, is_leaf=stop)

  def num_bytes(message, masks):
    def leaf(m, mask):
      if m is None:
        return None
      return feedback.packed(feedback.inside(m.levels, mask), bits)

    return jax.tree.map(leaf, message, masks.trained, is_leaf=stop)

  return Codec(lambda _: (), encode, decode, num_bytes, lossy=True)
