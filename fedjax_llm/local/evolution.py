"""CMA-ES: an evolution strategy that needs values of a function alone.

Hansen 2016, arXiv 1604.00772, "The CMA Evolution Strategy: A Tutorial", table 1
and figure 6, negative weights included. All functions can be traced and
mapped over clients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import linalg

_HIGHEST = jax.lax.Precision.HIGHEST


class Strategy(NamedTuple):
  """The distribution of CMA-ES, and its paths."""

  mean: Any  # [D]
  sigma: Any  # []
  covariance: Any  # [D, D]
  path_sigma: Any  # [D]
  path: Any  # [D]
  generation: Any  # [] int32


def started(mean: jax.Array, sigma: Any, covariance: Any = None) -> Strategy:
  """Returns a strategy with empty paths, and the identity by default.

  >>> started(jnp.zeros(2), 0.5).covariance.tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  if covariance is None:
    covariance = jnp.eye(mean.shape[0], dtype=mean.dtype)
  # Two buffers: a donated state must not hold one buffer twice.
  paths = [jnp.zeros_like(mean) for _ in range(2)]
  sigma = jnp.asarray(sigma, mean.dtype)
  return Strategy(mean, sigma, covariance, paths[0], paths[1], jnp.int32(0))


class Constants(NamedTuple):
  """The constants of an update, from its weights and the dimension."""

  weights: Any  # [P], of the P samples from the best to the worst
  mu_eff: Any
  c_sigma: Any
  d_sigma: Any
  c_c: Any
  c_1: Any
  c_mu: Any
  expected: Any  # E ||N(0, I)||


def raw_weights(population: int) -> np.ndarray:
  """Returns log((P + 1) / 2) - log i for i = 1 .. P, equation 49.

  >>> raw_weights(3).round(3).tolist()
  [0.693, 0.0, -0.405]
  """
  return np.log((population + 1) / 2) - np.log(np.arange(1, population + 1))


def parents(number: int) -> np.ndarray:
  """Returns log(mu + 1/2) - log i for i = 1 .. mu: every sample is a parent."""
  return np.log(number + 0.5) - np.log(np.arange(1, number + 1))


def constants(raw: Any, dimension: int) -> Constants:
  """Returns the constants of table 1 for raw weights [P].

  Positive weights are divided by their sum; negative ones are scaled as in
  equations 50 to 53. The weights may be traced.

  >>> one = constants(raw_weights(4), 2)
  >>> float(jnp.sum(jnp.maximum(one.weights, 0)).round(4))
  1.0
  """
  n, raw = dimension, jnp.asarray(raw, jnp.float32)
  good, bad = jnp.maximum(raw, 0), jnp.maximum(-raw, 0)
  eff = lambda w: jnp.sum(w) ** 2 / jnp.maximum(jnp.sum(w**2), 1e-30)
  mu_eff, mu_bad = jnp.maximum(eff(good), 1.0), eff(bad)
  c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
  c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
  c_mu = jnp.minimum(
    1 - c_1,
    2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff),
  )
  c_mu = jnp.maximum(c_mu, 0.0)
  some = jnp.where(c_mu > 0, c_mu, 1.0)
  least = jnp.minimum(
    jnp.minimum(1 + c_1 / some, 1 + 2 * mu_bad / (mu_eff + 2)),
    (1 - c_1 - c_mu) / (n * some),
  )
  total, under = jnp.sum(good), jnp.sum(bad)
  weights = good / jnp.where(total > 0, total, 1.0)
  weights -= least * bad / jnp.where(under > 0, under, 1.0)
  c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
  d_sigma = (
    1 + 2 * jnp.maximum(0.0, jnp.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
  )
  expected = n**0.5 * (1 - 1 / (4 * n) + 1 / (21 * n**2))
  return Constants(weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, expected)


def asked(state: Strategy, key: jax.Array, population: int) -> jax.Array:
  """Returns samples m + sigma C^(1/2) z, z ~ N(0, I): [P, D].

  >>> asked(started(jnp.zeros(2), 1.0), jax.random.key(0), 3).shape
  (3, 2)
  """
  root, _ = _roots(state.covariance)
  z = jax.random.normal(key, (population, *state.mean.shape), state.mean.dtype)
  return state.mean + state.sigma * jnp.matmul(z, root, precision=_HIGHEST)


def moved(
  state: Strategy, samples: jax.Array, values: jax.Array, constants: Constants
) -> Strategy:
  """Returns the strategy after an update by samples [P, D] with values [P].

  The smallest value is the best. The weights must sum to one over the best
  (`constants`); a sample behind the last weight counts for nothing.

  >>> state = started(jnp.zeros(1), 1.0)
  >>> samples = jnp.array([[-1.0], [1.0]])
  >>> new = moved(state, samples, jnp.array([5.0, 3.0]), constants(
  ...   raw_weights(2), 1))
  >>> new.mean.tolist()
  [1.0]
  """
  n, c = state.mean.shape[0], constants
  order = jnp.argsort(values)
  y = (samples[order] - state.mean) / state.sigma  # [P, D]
  good = jnp.maximum(c.weights, 0)
  dot = lambda x, m: jnp.matmul(x, m, precision=_HIGHEST)
  step = dot(good, y)
  _, inverse = _roots(state.covariance)
  cs = c.c_sigma
  path_sigma = (1 - cs) * state.path_sigma + jnp.sqrt(
    cs * (2 - cs) * c.mu_eff
  ) * dot(inverse, step)
  length = jnp.sqrt(jnp.sum(path_sigma**2))
  sigma = state.sigma * jnp.exp(cs / c.d_sigma * (length / c.expected - 1))
  past = 1 - (1 - cs) ** (2 * (state.generation + 1.0))
  calm = length / jnp.sqrt(past) < (1.4 + 2 / (n + 1)) * c.expected
  calm = calm.astype(y.dtype)
  path = (1 - c.c_c) * state.path + calm * jnp.sqrt(
    c.c_c * (2 - c.c_c) * c.mu_eff
  ) * step
  size = jnp.sum(dot(y, inverse) ** 2, -1)
  each = jnp.where(
    c.weights >= 0, c.weights, c.weights * n / jnp.maximum(size, 1e-12)
  )
  keep = (
    1
    + c.c_1 * (1 - calm) * c.c_c * (2 - c.c_c)
    - c.c_1
    - c.c_mu * jnp.sum(c.weights)
  )
  covariance = (
    keep * state.covariance
    + c.c_1 * jnp.outer(path, path)
    + c.c_mu * dot(y.T * each, y)
  )
  return Strategy(
    state.mean + state.sigma * step,
    sigma,
    0.5 * (covariance + covariance.T),
    path_sigma,
    path,
    state.generation + 1,
  )


def _roots(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns C^(1/2) and C^(-1/2), symmetric."""
  values, vectors = linalg.each(lambda x: tuple(jnp.linalg.eigh(x)), covariance)
  values = jnp.maximum(values, 1e-12)
  of = lambda x: jnp.matmul(vectors * x, vectors.T, precision=_HIGHEST)
  return of(jnp.sqrt(values)), of(1 / jnp.sqrt(values))
