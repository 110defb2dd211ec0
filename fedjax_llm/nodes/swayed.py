"""Random changes of a whole weight that are never stored.

Swayed(keys, sizes, count)   W' = W + sum_j sizes_j Z_j, Z_j drawn from keys_j

The product x W' is computed as x W + sum over blocks of rows b of
x_b (sum_j sizes_j Z_jb): one block of Z exists at a time, and W is neither
copied nor batched over clients.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.nodes.dense import add
from fedjax_llm.types import Error

BLOCK = 2**16  # numbers of a block of Z, at most (or one row)


class Swayed(NamedTuple):
  """A node that adds random directions to a weight, drawn again by blocks.

  Nothing in it is trained: methods write keys and sizes into it.

  >>> key = jax.random.key_data(jax.random.key(0))
  >>> node = Swayed(key[None], jnp.ones(1), jnp.int32(1))
  >>> x, w = jnp.ones((1, 4)), jnp.zeros((4, 3))
  >>> stacked = jax.tree.map(lambda leaf: leaf[None], node)
  >>> whole = stacked.write(w[None])[0]
  >>> bool(jnp.allclose(node.act(x, x @ w, w), x @ whole, atol=1e-6))
  True
  """

  keys: Any  # [L, J, 2] uint32, data of threefry keys
  sizes: Any  # [L, J] float32
  count: Any  # [L] int32: the first `count` directions are used

  FROZEN = ('keys', 'sizes', 'count')

  def act(self, x, y, weight) -> jax.Array:
    rows = rows_of(weight.shape)

    def block(b, y):
      z = _block(self, b, rows, weight.shape[-1])
      part = jax.lax.dynamic_slice_in_dim(x, b * rows, rows, -1)
      return y + jnp.matmul(part, z.astype(x.dtype)).astype(y.dtype)

    return jax.lax.fori_loop(0, weight.shape[-2] // rows, block, y)

  def write(self, weight: Any) -> Any:
    return add(weight, self._change(weight.shape))

  def fold(self, weight: Any) -> tuple[Any, 'Swayed']:
    return self.write(weight), self._replace(sizes=jnp.zeros_like(self.sizes))

  def check(self, shape, path) -> None:
    if self.sizes.shape[0] != shape[0]:
      raise Error(
        f'{path}: this node has {self.sizes.shape[0]} layers, and the weight '
        f'has {shape[0]}.'
      )

  def _change(self, shape: tuple[int, ...]) -> jax.Array:
    """Returns sum_j sizes_j Z_j, [L, D, F]."""
    rows = rows_of(shape)

    def layer(node: Swayed) -> jax.Array:
      each = jax.lax.map(
        lambda b: _block(node, b, rows, shape[-1]),
        jnp.arange(shape[-2] // rows),
      )
      return each.reshape(shape[-2:])

    return jax.lax.map(layer, self)


def rows_of(shape: tuple[int, ...]) -> int:
  """Returns the rows of a block: the most that fit and divide D.

  >>> rows_of((576, 1536)), rows_of((4, 3)), rows_of((2, 2**20))
  (36, 4, 1)
  """
  most = max(min(BLOCK // shape[-1], shape[-2]), 1)
  return int(max(n for n in range(1, most + 1) if shape[-2] % n == 0))


def key_data(keys: jax.Array, name: str, num_layers: int) -> jax.Array:
  """Returns keys of each layer's direction of the weight `name`, [L, J, 2].

  Args:
    keys: [J], of the directions.

  >>> key_data(jax.random.split(jax.random.key(0), 3), 'q', 2).shape
  (2, 3, 2)
  """
  number = np.uint32(zlib.crc32(name.encode()))

  def one(layer, key):
    own = jax.random.fold_in(jax.random.fold_in(key, number), layer)
    return jax.random.key_data(own)

  by_key = jax.vmap(one, (None, 0))
  return jax.vmap(by_key, (0, None))(jnp.arange(num_layers), keys)


def _block(node: Swayed, b: Any, rows: int, width: int) -> jax.Array:
  """Returns rows b of sum_j sizes_j Z_j of one layer, [rows, F] float32."""

  def add_one(j, total):
    def draw(total):
      key = jax.random.wrap_key_data(node.keys[j], impl='threefry2x32')
      z = jax.random.normal(jax.random.fold_in(key, b), (rows, width))
      return total + node.sizes[j] * z

    return jax.lax.cond(node.sizes[j] != 0, draw, lambda total: total, total)

  zeros = jnp.zeros((rows, width), jnp.float32)
  return jax.lax.fori_loop(0, node.count, add_one, zeros)
