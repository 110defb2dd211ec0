"""Quantises the frozen base, as in QLoRA (Dettmers et al. 2023, 2305.14314).

The matrices of the layers become integers with scales, W ~ scale * values;
embeddings, norms, biases and the head are unchanged. A matrix is dequantised
for its product, one layer at a time and once for all clients; the adapter
trains beside it in float32. The arrays are qwix's, `qwix.QArray`.

    int8   a scale a feature:      |W - deq W| <= scale / 2
    int4   a scale a feature and block of inputs, the same bound
    nf4    likewise, with 16 levels that are quantiles of a normal
           distribution (section 3): |W - deq W| <= 0.1521 scale
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.nodes import dense as dense_lib
from fedjax_llm.types import Base, Error

KINDS = ('int8', 'int4', 'nf4')
dense = dense_lib.values
BLOCK = 64  # inputs that share a scale, where 64 divides their number


def quantise(kernel: jax.Array, kind: str) -> Any:
  """Quantises a kernel [D, F] or [L, D, F] to a `qwix.QArray` of its shape.

  `int8` has scales [L, 1, F], `int4` and `nf4` [L, D / block, F]: a block
  is 64 inputs, or the largest of 32 and 16 that divides D. Scales are float32.

  Raises:
    Error: an unknown kind; qwix is missing; D is no multiple of 16.
  """
  check(kind)
  inputs = kernel.shape[-2]
  block = math.gcd(inputs, BLOCK)
  if kind != 'int8' and block < 16:
    raise Error(
      f'quantisation={kind!r} needs matrices whose inputs are a multiple of '
      f'16, and one has {inputs}.'
    )
  return _quantise(kernel, kind, block)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantise(kernel, kind, block):
  def one(matrix):
    return _qwix().quantize(
      matrix.astype(jnp.float32),
      kind,
      channelwise_axes=[1],
      tiled_axes={} if kind == 'int8' else {0: block},
    )

  # One layer at a time, for memory: nf4 compares every weight with 16 levels.
  return jax.lax.map(one, kernel) if kernel.ndim > 2 else one(kernel)


def leaf(path: Sequence[str], value: jax.Array, kind: str | None) -> Any:
  """Quantises a leaf of the base if it is a matrix of the layers.

  >>> leaf(('layers', 'norm', 'scale'), jnp.ones(3), 'int8').dtype
  dtype('float32')
  """
  if kind is None or 'layers' not in path or path[-1] != 'kernel':
    return value
  try:
    return quantise(value, kind)
  except Error as error:
    raise Error(f'{"/".join(path)}: {error}') from error


def base(tree: Base, kind: str | None) -> Base:
  """Quantises the matrices of the base's layers."""

  def walk(node, path):
    if not isinstance(node, Mapping):
      return leaf(path, node, kind)
    return {name: walk(child, (*path, name)) for name, child in node.items()}

  return walk(tree, ())


def num_bytes(tree: Base) -> int:
  """Returns the bytes that the devices of this process hold for the base.

  Copies on several devices are all counted. Four bits take a byte on CPU.

  >>> num_bytes({'scale': jnp.ones(3)})
  12
  """
  return sum(
    shard.data.on_device_size_in_bytes()
    for x in jax.tree.leaves(tree)
    for shard in x.addressable_shards
  )


def check(kind: str | None) -> None:
  """Raises `Error` for an unknown kind, or if qwix is missing."""
  if kind is None:
    return
  if kind not in KINDS:
    raise Error(f'quantisation={kind!r} is not one of {", ".join(KINDS)}.')
  _qwix()


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise Error(
      "quantisation needs the package 'qwix': pip install 'fedjax_llm[quant]'."
    ) from error
  return qwix
