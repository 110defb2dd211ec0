"""FedRPCA: common and sparse parts of the updates, by robust PCA.

`fedrpca` returns an `Aggregator`.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, tree
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits, known


def fedrpca(*, beta: float = 2.0, iterations: int = 30) -> Aggregator:
  """Returns FedRPCA: the mean of the common part, and more of the sparse part.

      [vec u_1 ... vec u_K] = L + S,    mean_k(L_k) + beta mean_k(S_k)

  for each matrix of the updates (arXiv 2506.01194): L has a low rank, the
  knowledge that clients share, and S is sparse, what single clients learnt,
  which a mean waters down. The paper adapts beta, by a rule that is not known
  here: it is a constant. The split is taken of a and of b, each by itself, and
  by principal component pursuit with the usual settings of its augmented
  Lagrangian (lambda = 1 / sqrt of the longer side, mu from 1.25 / ||D||_2 by
  1.5 a step); what is left after the last iteration counts as sparse.

  Args:
    beta: 1 is the weighted mean.
    iterations: of the pursuit.

  Raises:
    Error: a negative beta, no iteration.

  >>> from fedjax_llm.aggregators import received
  >>> ends = [{'w': jnp.ones((4, 1))}] * 4
  >>> ends[3] = {'w': ends[3]['w'].at[0].set(9.0)}
  >>> sent, params = received({'w': jnp.zeros((4, 1))}, ends), {'w': 0}
  >>> rule = fedrpca(beta=2.0)
  >>> new = rule.aggregate(sent, (), params, None)[0].delta['w']
  >>> new.round(1).ravel().tolist()  # the mean, and one client's 8 / 4 again
  [5.0, 1.0, 1.0, 1.0]
  """
  if known(beta) and beta < 0:
    raise Error(f'fedrpca: beta={beta} must not be negative.')
  if iterations < 1:
    raise Error(f'fedrpca: iterations={iterations} must be at least 1.')

  def init(params, key):
    del params, key
    return ()

  def aggregate(uploads, state, params, key):
    del params, key
    weight = tree.normalise(by_weight(uploads))
    here = counted(uploads)

    def leaf(u):
      some = here.reshape(-1, *[1] * (u.ndim - 1))
      u = jnp.where(some, u.astype(jnp.float32), 0.0)
      lead = u.shape[1:-2]
      columns = jnp.moveaxis(u.reshape(len(u), *lead, -1), 0, -1)
      common = _common(columns, iterations)
      mixed = common + beta * (columns - common)  # [..., P, K]
      mean = jnp.matmul(mixed, weight, precision=jax.lax.Precision.HIGHEST)
      return mean.reshape(u.shape[1:])

    delta = jax.tree.map(lambda u: leaf(u).astype(u.dtype), uploads.update)
    return Aggregate(delta), state

  return Aggregator(init, aggregate, Traits(), weights=by_weight)


def _common(d: jax.Array, iterations: int) -> jax.Array:
  """Returns L of d = L + S, [..., P, K], by principal component pursuit."""
  sparsity = max(d.shape[-2:]) ** -0.5
  largest = lambda x: jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True)
  safe = lambda x: jnp.where(x > 0, x, 1.0)
  _, s, _ = linalg.svd(linalg.qr(d)[1])
  norm = s[..., :1, None]
  dual = d / safe(jnp.maximum(norm, largest(d) / sparsity))
  soft = lambda x, by: jnp.sign(x) * jnp.maximum(jnp.abs(x) - by, 0.0)

  def step(_, carry):
    low, sparse, dual, mu = carry
    x = d - sparse + dual / mu
    # Singular values of x shrink by 1 / mu: its right vectors are enough.
    _, s, v = linalg.svd(linalg.qr(x)[1])
    gain = jnp.maximum(1 - 1 / (mu[..., 0] * safe(s)), 0.0)
    project = jnp.einsum(
      '...ki,...k,...kj->...ij', v, gain, v,
      precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    low = jnp.matmul(x, project, precision=jax.lax.Precision.HIGHEST)
    sparse = soft(d - low + dual / mu, sparsity / mu)
    return low, sparse, dual + mu * (d - low - sparse), 1.5 * mu

  start = (jnp.zeros_like(d), jnp.zeros_like(d), dual, 1.25 / safe(norm))
  return jax.lax.fori_loop(0, iterations, step, start)[0]
