"""Fed-BBPT: a prompt generator is trained by two losses a step.

Lin et al. 2023, arXiv 2310.03123.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Gradient,
  Loss,
  LossSum,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_bbpt': dict(
    adapter=dict(name='p_tuning'),
    local=dict(name='sgd', learning_rate=1e-2, momentum=0.9, nesterov=True),
  ),
}


def fed_bbpt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  radius: float = 0.01,
  samples: int = 1,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-BBPT: a prompt generator is trained by two losses a step.

      g = (L(phi + c u) - L(phi - c u)) / (2 c) u^-1,   1/u entry by entry,
      v <- beta v + g,   phi_k <- phi_k - eta (g + beta v),
      phi <- sum_k w_k phi_k

  Lin et al. 2023, arXiv 2310.03123: the clients reach the model through an API
  that returns losses, and share a small generator of prompts. The estimate is
  simultaneous perturbation with gradient correction (Oh et al. 2023, BlackVIP,
  arXiv 2303.14773): the size of an entry of u is uniform in [1/2, 1], its sign
  either with probability 1/2, and v is Nesterov's momentum, a setting of the
  config's `local` section (sgd, momentum=0.9, nesterov=True). BlackVIP's decay
  of c and eta over the steps is left to the schedule. The generator is that of
  P-tuning (`adapter.name=p_tuning`). Nothing is differentiated.

  Args:
    radius: c.
    samples: pairs of losses whose estimates are averaged.

  Raises:
    Error: a radius that is not above 0, fewer than one sample.

  >>> fed_bbpt(None, local.optimizer('sgd'), samples=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.samples is 0; it must be at least 1.
  """
  if known(radius) and radius <= 0:
    raise Error(f'algorithm.radius is {radius}; it must be above 0.')
  if samples < 1:
    raise Error(f'algorithm.samples is {samples}; it must be at least 1.')
  step = local.sgd(loss, optimizer, gradient=perturbed(radius, samples))
  return compose(step, **parts)


def perturbed(radius: float, samples: int = 1) -> Gradient:
  """Returns the estimate (L(p + c u) - L(p - c u)) / (2 c u) of a gradient.

  >>> loss = lambda base, p, batch, key: LossSum(3 * p['w'], *jnp.ones(2))
  >>> start = {'w': jnp.float32(1)}  # of one entry it is exact
  >>> slope = perturbed(0.5)
  >>> grads, _ = slope(loss, None, start, start, None, jax.random.key(0))
  >>> round(float(grads['w']), 4)
  3.0
  """

  def gradient(loss, base, trained, start, batch, key):
    def one(number):
      name = jax.random.fold_in(key, number)
      u = direction(name, trained)
      at = lambda sign: mean_loss(
        loss,
        base,
        tree.map_present(
          lambda p, d: (p + sign * radius * d).astype(p.dtype), trained, u
        ),
        start,
        batch,
        key,
      )
      (high, one), (low, two) = at(1.0), at(-1.0)
      slope = (high - low) / (2 * radius)
      grads = tree.map_present(lambda d: slope / d, u)
      half = jax.tree.map(lambda x, y: (x + y) / 2, one, two)
      return grads, half

    grads, sums = jax.lax.map(one, jnp.arange(samples))
    mean = lambda x: jnp.mean(x, 0)
    return jax.tree.map(mean, grads), LossSum(*jax.tree.map(mean, sums))

  return gradient


def direction(key: jax.Array, like: Any) -> Any:
  """Returns entries of size in [1/2, 1] and either sign, as the leaves.

  >>> u = direction(jax.random.key(0), {'w': jnp.zeros(4)})['w']
  >>> bool(jnp.all((abs(u) >= 0.5) & (abs(u) <= 1)))
  True
  """
  leaves, treedef = jax.tree.flatten(like)

  def leaf(number, x):
    size, sign = jax.random.split(jax.random.fold_in(key, number))
    length = jax.random.uniform(size, x.shape, jnp.float32, 0.5, 1.0)
    return length * jax.random.rademacher(sign, x.shape, jnp.float32)

  drawn = [leaf(number, x) for number, x in enumerate(leaves)]
  return jax.tree.unflatten(treedef, drawn)
