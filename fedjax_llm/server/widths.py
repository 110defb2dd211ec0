"""Batches cut to the width that a block needs, inside one program.

`narrowed` runs a function on rows of one of several widths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import batching


def narrowed(
  run: Callable[[Any], Any], batches: Any, widths: Sequence[int]
) -> tuple[Any, jax.Array]:
  """Returns `run(batches)` on rows cut to the smallest width that fits them.

  Widths below T become branches of one `lax.switch`, T itself the last one: the
  program contains the computation once a width and runs one of them. Only
  columns of padding are cut. Batches of other kinds than texts are not cut.

  Returns:
    The result of `run`, and the number of token places, B times the width, of a
    step in the cut batches.

  >>> from fedjax_llm.types import Batch
  >>> ones = jnp.ones([2, 8], jnp.int32)
  >>> batch = Batch(ones, ones > 0, jnp.where(jnp.arange(8) < 3, ones, 0), ones)
  >>> narrowed(lambda batch: batch.segments.sum(), batch, (4, 6))
  (Array(6, dtype=int32), Array(8, dtype=int32))
  """
  texts = batching.texts(batches)
  if not batching.kinds(batches) or not texts:
    return run(batches), jnp.int32(0)
  longest = batching.width(batches)
  widths = sorted({w for w in widths if w < longest} | {longest})
  rows = sum(x.segments.shape[-2] for x in texts)
  places = jnp.asarray(np.asarray(widths, np.int32) * rows)
  if len(widths) == 1:
    return run(batches), places[0]
  used = jnp.int32(0)
  for x in texts:
    some = jnp.any(x.segments > 0, axis=tuple(range(x.segments.ndim - 1)))
    used = jnp.maximum(
      used, jnp.max(jnp.where(some, jnp.arange(some.size) + 1, 0))
    )
  index = jnp.searchsorted(jnp.asarray(widths), used)

  def at(width):
    return lambda batches: run(batching.narrowed(batches, width))

  return jax.lax.switch(index, [at(w) for w in widths], batches), places[index]
