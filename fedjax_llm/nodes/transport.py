"""Partial optimal transport between few features and many.

`partial_plan` returns the plan, in logarithms and with a fixed number of
iterations, so that it can be mapped over images, classes and clients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.types import Error


def partial_plan(
  similarity: jax.Array,
  mass: Any = 1.0,
  temperature: Any = 0.1,
  steps: int = 100,
) -> jax.Array:
  """Returns the entropic plan that moves a part of the mass, [..., M, N].

      min_T sum_mn T_mn (1 - s_mn) + e sum_mn T_mn (log T_mn - 1),
      T 1 <= 1/M,   T' 1 = g/N,   T >= 0

  for a similarity s, the temperature e and the mass g. Of the M rows (patches
  of an image) those that resemble no column (prompts) may stay behind, a part
  1 - g in all. Dykstra's iteration in the scaling form of Benamou et al. 2015,
  arXiv 1412.5154, as FedOTP (arXiv 2403.00041, equation 9) uses it:

      K = exp((s - 1) / e),   u = min(1/M / (K v), 1),   v = g/N / (K' u),
      T = diag(u) K diag(v)

  computed on logarithms. Every plan takes `steps` iterations, so that the plan
  of an image does not depend on the others in its batch. Columns are exact
  after each iteration, rows in the limit. With mass 1 it is Sinkhorn's plan.

  Args:
    similarity: cosines s, [..., M, N].
    mass: g, above 0 and at most 1.
    temperature: e, above 0.
    steps: iterations.

  Raises:
    Error: a mass, a temperature or a number of steps out of range.

  >>> plan = partial_plan(jnp.array([[1.0], [0.9], [-1.0]]), mass=0.6)
  >>> (100 * plan[:, 0]).round().tolist()  # 1/3 is the most a row can move
  [33.0, 27.0, 0.0]
  """
  if isinstance(mass, float) and not 0 < mass <= 1:
    raise Error(f'partial_plan: mass={mass} must be above 0 and at most 1.')
  if isinstance(temperature, float) and temperature <= 0:
    raise Error(f'partial_plan: temperature={temperature} must be above 0.')
  if steps < 1:
    raise Error(f'partial_plan: steps={steps} must be at least 1.')
  rows, columns = similarity.shape[-2:]
  log_k = (similarity.astype(jnp.float32) - 1) / temperature
  most, share = -jnp.log(rows), jnp.log(mass / columns)
  over = lambda x, axis: jax.nn.logsumexp(x, axis)

  def step(_, pair):
    _, v = pair
    u = jnp.minimum(most - over(log_k + v[..., None, :], -1), 0.0)
    return u, share - over(log_k + u[..., None], -2)

  u = jnp.zeros(log_k.shape[:-1])
  v = jnp.zeros((*log_k.shape[:-2], columns))
  u, v = jax.lax.fori_loop(0, steps, step, (u, v))
  return jnp.exp(u[..., None] + log_k + v[..., None, :])
