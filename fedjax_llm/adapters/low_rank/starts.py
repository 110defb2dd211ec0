"""Initial values of adapters from a decomposition of the base's weights."""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.types import Error


def singular(
  name: str, kernel: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the `rank` largest singular triplets of kernels [..., D, F].

  In float32.

  Returns:
    u [..., D, R], s [..., R], v' [..., R, F].

  Raises:
    Error: quantised kernels, which have no singular vectors; the message names
      the adapter `name`.

  >>> u, s, v = singular('federa', jnp.diag(jnp.array([1.0, 5.0]))[None], 1)
  >>> u.shape, s.tolist(), v.shape
  ((1, 2, 1), [[5.0]], (1, 1, 2))
  """
  if hasattr(kernel, 'qvalue'):
    raise Error(
      f'{name} starts from the singular values of the weights, which a '
      'quantised base does not have: leave model.quantisation out.'
    )
  u, s, v = linalg.svd(kernel.astype(jnp.float32))
  return u[..., :rank], s[..., :rank], v[..., :rank, :]
