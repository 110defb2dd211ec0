"""Weights of the clients in a rule.

The functions return arrays [K].
"""

from fractions import Fraction

import jax
import jax.numpy as jnp

from fedjax_llm.types import Uploads, known


def counted(uploads: Uploads) -> jax.Array:
  """Returns booleans [K]: the clients that are valid and of positive weight.

  A client of weight zero does not count in any rule, even in those where
  clients count the same. A cohort of such clients changes nothing.

  >>> uploads = Uploads(None, None, None, jnp.array([2.0, 0.0, 1.0]),
  ...                   jnp.array([True, True, False]))
  >>> counted(uploads).tolist()
  [True, False, False]
  """
  if uploads.weight is None:
    return uploads.valid
  return uploads.valid & (uploads.weight > 0)


def by_weight(uploads: Uploads) -> jax.Array:
  """Returns the weights of the clients that count, [K] float32, else zero."""
  return jnp.where(counted(uploads), uploads.weight, 0).astype(jnp.float32)


def equal(uploads: Uploads) -> jax.Array:
  """Returns one for each client that counts, [K] float32, else zero."""
  return counted(uploads).astype(jnp.float32)


def floor_of(fraction: float, num_rows: int) -> jax.Array:
  """Returns floor(fraction * n) for n = 0 ... num_rows, [num_rows + 1] int32.

  A known fraction is the decimal as the user wrote it: in binary 0.29 * 100 is
  below 29.

  >>> floor_of(0.29, 100)[100].item()
  29
  """
  if not known(fraction):
    # The slack of float32: equal for decimals of up to four digits.
    exact = fraction * jnp.arange(num_rows + 1)
    return jnp.floor(exact * (1 + 2e-7)).astype(jnp.int32)
  decimal = Fraction(str(fraction))
  return jnp.array([int(decimal * m) for m in range(num_rows + 1)])
