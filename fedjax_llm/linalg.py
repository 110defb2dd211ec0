"""Factorisations of stacks of matrices that cannot deadlock.

The functions return arrays with the leading axes of their arguments.

On a CPU a batch of LAPACK calls is spread over threads of XLA's own pool and
waits for them there. Two batches at once, such as the layers of two targets,
can each hold the thread that the other needs, and the round never ends. These
functions run the matrices of a stack one after another; on a GPU as well,
where they are as exact and slower for many small matrices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def each(factorise: Callable[..., Any], *stacks: jax.Array) -> Any:
  """Applies `factorise` to each matrix of stacks [..., m, n], in turn.

  `vmap` does not batch the calls either, except where they are differentiated.

  Args:
    factorise: a function of one matrix of each stack; returns arrays in any
      pytree.
    stacks: arrays of the same leading axes.

  Returns:
    The result of `factorise`, with the leading axes in front.

  >>> import jax.numpy as jnp
  >>> stack = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
  >>> each(lambda x: jnp.linalg.eigh(x)[0], stack).tolist()
  [[1.0, 1.0], [3.0, 3.0]]
  """
  plain = lambda *matrices: factorise(*matrices)
  one = jax.custom_jvp(jax.custom_batching.sequential_vmap(plain))
  one.defjvp(lambda at, moved: jax.jvp(plain, at, moved))
  lead = stacks[0].shape[:-2]
  flat = [x.reshape(-1, *x.shape[-2:]) for x in stacks]
  done = jax.lax.map(lambda matrices: one(*matrices), flat)
  return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), done)


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns each matrix's thin SVD: u [..., m, r], s [..., r], v' [..., r, n].

  >>> [y.shape for y in svd(jnp.ones((5, 3, 2)))]
  [(5, 3, 2), (5, 2), (5, 2, 2)]
  """
  return each(lambda y: tuple(jnp.linalg.svd(y, full_matrices=False)), x)


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns each matrix's thin QR: q [..., m, r], r [..., r, n].

  >>> [y.shape for y in qr(jnp.ones((5, 3, 2)))]
  [(5, 3, 2), (5, 2, 2)]
  """
  return each(lambda y: tuple(jnp.linalg.qr(y)), x)


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns x with a x = b for each square a [..., r, r] and b [..., r, n].

  >>> solve(2 * jnp.eye(2)[None], jnp.ones((1, 2, 1))).ravel().tolist()
  [0.5, 0.5]
  """
  return each(jnp.linalg.solve, a, b)
