"""The rule of client-level central differential privacy.

`noisy_mean` returns a `StreamingAggregator`: updates are clipped as a whole,
added up, and Gaussian noise is added once to the sum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  Aggregate,
  Error,
  StreamingAggregator,
  Traits,
)

# Clipped norms stay this share below the bound, so that no rounding of float32
# passes it.
_SLACK = 1e-6


class Adaptive(NamedTuple):
  """The settings of a clip norm that follows a quantile of the norms.

  Andrew et al. 2021, arXiv 1905.03871.

  >>> Adaptive(quantile=0.3)
  Adaptive(quantile=0.3, rate=0.2, count_noise=None)
  """

  quantile: float = 0.5  # gamma, the share of clients below the clip norm
  rate: float = 0.2  # eta, of the geometric steps
  count_noise: float | None = None  # sigma_b; None: a 20th of the denominator


class State(NamedTuple):
  """The state of `noisy_mean`: two public numbers.

  >>> State(clip=0.5, noise_multiplier=1.1).clip
  0.5
  """

  clip: Any  # [] float32, the clip norm of the next round
  noise_multiplier: Any  # [] float32, what the accountant counts


class Sums(NamedTuple):
  """The sums over the clients added so far, float32.

  >>> Sums(total={'w': 0.0}, below=0.0)._fields
  ('total', 'below')
  """

  total: Any  # sum_k clip(u_k), as the parameters
  below: Any  # [] sum_k (1[norm_k <= C] - 1/2)


def clipped(update: Any, clip: Any) -> tuple[Any, jax.Array]:
  """Returns the factors of clipped updates and the norms before, [K] each.

  A factor is min(1, C / ||u_k||), with one norm over all leaves of u_k; absent
  leaves (None) count nothing.

  >>> update = {'a': jnp.array([[3.0], [0.3]]), 'b': jnp.array([4.0, 0.4])}
  >>> factor, norm = clipped(update, 1.0)
  >>> factor.round(3).tolist(), norm.tolist()
  ([0.20000000298023224, 1.0], [5.0, 0.5])
  """
  norm = jax.vmap(tree.norm)(update)
  above = norm > clip * (1 - _SLACK)
  bound = clip * (1 - _SLACK) / jnp.where(above, norm, 1.0)
  return jnp.where(above, bound, 1.0), norm


def sum_noise(noise_multiplier: float, count_noise: float | None) -> float:
  """Returns z of the sum where the count of clipped clients is noised too.

  z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both together cost what the
  multiplier z costs alone (Andrew et al. 2021, arXiv 1905.03871, theorem 1).

  Raises:
    Error: sigma_b is at most z / 2.

  >>> sum_noise(1.0, None), round(sum_noise(1.0, 5.0), 4)
  (1.0, 1.005)
  """
  if count_noise is None:
    return noise_multiplier
  rest = noise_multiplier**-2 - (2 * count_noise) ** -2
  if rest <= 0:
    raise Error(
      f'privacy.count_noise is {count_noise:g}: it must be above half of the '
      f'noise multiplier {noise_multiplier:g}.'
    )
  return rest**-0.5


def noisy_mean(
  clip: float,
  noise_multiplier: float,
  denominator: float,
  adaptive: Adaptive | None = None,
) -> StreamingAggregator:
  """Returns the rule (sum_k clip(u_k) + N(0, (z C)^2)) / denominator.

  All clients that report count the same, clip(u) = u min(1, C / ||u||) with one
  norm over all shared leaves, and the denominator is a public number, q N: the
  number of reports never divides. A round of nobody is noise alone. So one
  client changes the sum by at most C (McMahan et al. 2018, arXiv 1710.06963,
  algorithm 1).

  `adaptive` moves C towards a quantile gamma of the norms (Andrew et al. 2021,
  arXiv 1905.03871, algorithm 1):

      b = (sum_k (1[norm_k <= C] - 1/2) + N(0, sigma_b^2)) / denominator + 1/2
      C <- C exp(-eta (b - gamma))

  Args:
    clip: C, the clip norm, or the first one.
    noise_multiplier: z.
    denominator: q N, the expected number of clients a round.
    adaptive: the settings of a moving clip norm; None: C is fixed.

  Raises:
    Error: a number is out of range; in the round, clients that send reports.

  >>> from fedjax_llm.types import Uploads
  >>> rule, params = noisy_mean(1.0, 0.0, denominator=4.0), {'w': jnp.zeros(2)}
  >>> update = {'w': jnp.array([[3.0, 4.0], [0.0, 0.5]])}  # norms 5 and 0.5
  >>> uploads = Uploads(update, None, None, jnp.array([9.0, 1.0]),
  ...                   jnp.array([True, True]))
  >>> state = rule.init(params, jax.random.key(0))
  >>> sums = rule.accumulate(rule.zero(params), uploads, state, params)
  >>> result, _ = rule.finalize(sums, state, params, jax.random.key(1))
  >>> result.delta['w'].round(3).tolist()  # (0.6, 0.8 + 0.5) / 4
  [0.15000000596046448, 0.32500001788139343]
  """
  for name, number, least in (
    ('clip', clip, 'above 0'),
    ('denominator', denominator, 'above 0'),
    ('noise_multiplier', noise_multiplier, 'at least 0'),
  ):
    if not (number > 0 or (number == 0 and least == 'at least 0')):
      raise Error(f'privacy: {name} is {number}, but must be {least}.')
  count_noise, z = None, noise_multiplier
  if adaptive is not None:
    if not (0 < adaptive.quantile < 1 and adaptive.rate > 0):
      raise Error(
        f'privacy: quantile is {adaptive.quantile} and clip_rate '
        f'{adaptive.rate}; a quantile is between 0 and 1, the rate above 0.'
      )
    count_noise = adaptive.count_noise
    if count_noise is None:
      count_noise = denominator / 20
    if noise_multiplier:
      z = sum_noise(noise_multiplier, count_noise)

  def init(params, key):
    del params, key
    return State(jnp.float32(clip), jnp.float32(noise_multiplier))

  def zero(params):
    return Sums(tree.zeros_like(params, jnp.float32), jnp.float32(0))

  def accumulate(sums, uploads, state, params):
    del params
    if uploads.reports is not None:
      raise Error(
        'privacy: the clients of this method send reports beside their '
        'updates, which are neither clipped nor noised: take another method.'
      )
    factor, norm = clipped(uploads.update, state.clip)
    counts = uploads.valid.astype(jnp.float32)
    below = jnp.sum(counts * ((norm <= state.clip) - 0.5))
    total = tree.weighted_sum(uploads.update, factor * counts)
    return Sums(tree.add(sums.total, total), sums.below + below)

  def finalize(sums, state, params, key):
    own, of_count = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(sums.total)
    deviation = z * state.clip
    noisy = [
      x + deviation * jax.random.normal(k, x.shape, jnp.float32)
      for x, k in zip(leaves, jax.random.split(own, len(leaves)))
    ]
    delta = tree.map_present(
      lambda x, p: (x / denominator).astype(p.dtype),
      jax.tree.unflatten(treedef, noisy),
      params,
    )
    if adaptive is not None and count_noise is not None:
      noise = count_noise * jax.random.normal(of_count, (), jnp.float32)
      share = (sums.below + noise) / denominator + 0.5
      step = jnp.exp(-adaptive.rate * (share - adaptive.quantile))
      state = state._replace(clip=state.clip * step)
    # All entries, whichever the clients trained: those depend on the clients.
    every = tree.map_present(lambda _: jnp.bool_(True), delta)
    return Aggregate(delta, trained=every), state

  return StreamingAggregator(
    init,
    zero,
    accumulate,
    finalize,
    traits=Traits(always=True, private=finalize),
    weights=lambda uploads: uploads.valid.astype(jnp.float32),
  )
