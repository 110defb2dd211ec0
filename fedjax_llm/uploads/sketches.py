"""Codecs that add up: count sketches.

`count_sketch` returns a `Codec`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Context, Error


class Sketch(NamedTuple):
  """Tables of signed sums; `shape` marks the leaves that they hold."""

  table: Any  # [rows, columns] float32
  shape: Any  # empty arrays, None where a leaf is absent


def count_sketch(
  density: float = 0.1, rows: int = 5, estimate: str = 'median'
) -> Codec:
  """Returns an additive codec: sums of entries in common random buckets.

      table[j, c] = sum over i with h_j(i) = c of s_j(i) u_i
      decoded_i = median (or mean) over j of s_j(i) table[j, h_j(i)]

  with buckets h_j and signs s_j that both sides draw from the key of the round
  (Charikar et al. 2002; FetchSGD, Rothchild et al. 2020, arXiv 2007.07690,
  section 3). An estimate of one row has the mean u_i and the variance
  (||u||^2 - u_i^2) / columns over the draws; the mean of the rows divides it by
  their number, and the median of them, which is unbiased too, resists a few
  large entries. The messages of all clients are summed before they are decoded,
  so the rule must be linear. FetchSGD's momentum and error in the sketch are
  not part of it. Four bytes a cell: columns = ceil(density P / rows) of P
  entries.

  Args:
    density: cells of the table per entry of the update.
    rows: the number of estimates of an entry.
    estimate: 'median' or 'mean'.

  Raises:
    Error: a density or a number of rows out of range; another estimate.

  >>> from fedjax_llm.types import Masks
  >>> codec, update = count_sketch(0.5, rows=2), {'w': jnp.ones((5, 20))}
  >>> context = Context(round_key=jax.random.key(0))
  >>> message, _ = codec.encode(update, Masks(None, {'w': None}), (), context)
  >>> message.table.shape, int(codec.num_bytes(message, None))
  ((2, 25), 200)
  """
  if not 0 < density <= 1:
    raise Error(f'count_sketch: density={density} must be in (0, 1].')
  if rows < 1:
    raise Error(f'count_sketch: rows={rows} must be at least 1.')
  if estimate not in ('median', 'mean'):
    raise Error(
      f"count_sketch: estimate={estimate!r} is neither 'median' nor 'mean'."
    )

  def drawn(key, num: int, columns: int) -> tuple[jax.Array, jax.Array]:
    place, flip = jax.random.split(key)
    buckets = jax.random.randint(place, (num,), 0, columns)
    return buckets, jax.random.rademacher(flip, (num,), jnp.float32)

  def encode(update, masks, state, context: Context):
    inside = tree.apply_mask(update, masks.trained)
    flat = tree.ravel(jax.tree.map(lambda x: x[None], inside))[0]
    columns = max(1, math.ceil(density * flat.size / rows))

    def row(key):
      buckets, signs = drawn(key, flat.size, columns)
      return jnp.zeros(columns).at[buckets].add(signs * flat)

    table = jax.lax.map(row, jax.random.split(context.round_key, rows))
    empty = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), inside)
    return Sketch(table, empty), state

  def decode(message, start, context: Context):
    leaves, treedef = jax.tree.flatten(tree.like(start, message.shape))
    num = sum(x.size for x in leaves)

    def row(pair):
      key, cells = pair
      buckets, signs = drawn(key, num, cells.size)
      return signs * cells[buckets]

    keys = jax.random.split(context.round_key, rows)
    each = jax.lax.map(row, (keys, message.table))  # [rows, P]
    over = jnp.median if estimate == 'median' else jnp.mean
    parts = tree.split_flat(over(each, axis=0), leaves)
    return jax.tree.unflatten(
      treedef, [part.astype(x.dtype) for part, x in zip(parts, leaves)]
    )

  def num_bytes(message, masks):
    del masks
    return jnp.int32(4 * message.table.size)

  return Codec(
    lambda _: (), encode, decode, num_bytes, additive=True, lossy=True
  )
