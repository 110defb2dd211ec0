"""Which clients count in a rule, and how much."""

import jax
import jax.numpy as jnp

from fedjax_llm.types import Uploads


def counted(uploads: Uploads) -> jax.Array:
  """Booleans [K]: the clients that are valid and have a weight above zero.

  A client of weight zero counts for nothing in any rule, also in those where
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
  """The weights of the clients that count, [K] float32, zero for the others."""
  return jnp.where(counted(uploads), uploads.weight, 0).astype(jnp.float32)


def equal(uploads: Uploads) -> jax.Array:
  """One for each client that counts, [K] float32, zero for the others."""
  return counted(uploads).astype(jnp.float32)
