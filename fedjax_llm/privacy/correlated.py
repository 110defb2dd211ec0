"""The rule of correlated noise: DP-FTRL with a banded matrix mechanism.

`correlated_mean` returns a `StreamingAggregator` whose noises cancel in part
over rounds, without any assumption on how clients are sampled.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.privacy.clipping import noisy_mean
from fedjax_llm.types import Aggregate, Error, StreamingAggregator, Traits


class State(NamedTuple):
  """The state of `correlated_mean`; `past` holds the noises of the last rounds.

  >>> State(clip=0.5, noise_multiplier=1.1, past=()).clip
  0.5
  """

  clip: Any  # [] float32
  noise_multiplier: Any  # [] float32, z
  past: Any  # [b - 1, ...] float32 a leaf, the newest first


def coefficients(bands: int) -> list[float]:
  """Returns the first b coefficients of (1 - x)^(-1/2), of C below.

  c_0 = 1,  c_i = c_(i-1) (2 i - 1) / (2 i): the square root of the matrix of
  prefix sums (Fichtenberger et al. 2023, arXiv 2202.11205).

  >>> coefficients(4)
  [1.0, 0.5, 0.375, 0.3125]
  """
  result = [1.0]
  for i in range(1, bands):
    result.append(result[-1] * (2 * i - 1) / (2 * i))
  return result


def column(bands: int) -> float:
  """Returns the norm of a column of C, the sensitivity of one participation.

  >>> round(column(2), 4)
  1.118
  """
  return math.sqrt(sum(c * c for c in coefficients(bands)))


def _saturated(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns an array in another dtype, cut to its finite numbers."""
  most = float(jnp.finfo(dtype).max)
  return jnp.clip(x, -most, most).astype(dtype)


def correlated_mean(
  clip: float, noise_multiplier: float, denominator: float, bands: int
) -> StreamingAggregator:
  """Returns the rule (sum_k clip(u_k) + y_t) / denominator, y = C^-1 n.

      n_t ~ N(0, (z clip |c|)^2),    y_t = n_t - sum_(0 < i < b) c_i y_(t-i)

  C is lower triangular and Toeplitz with b bands c_0 ... c_(b-1). A client
  whose turns are at least b rounds apart meets columns of C that do not
  overlap, so k turns change C x by at most sqrt(k) |c| times the clip norm
  (Choquette-Choo et al. 2023, arXiv 2306.08153). The mechanism on all rounds is
  then one Gaussian of multiplier z / sqrt(k), the composition of k of
  multiplier z. One band is independent noise.

  Args:
    clip: the largest norm of a client's update, as in `noisy_mean`.
    noise_multiplier: z.
    denominator: a public number of clients.
    bands: b, at most the rounds between two turns of a client.

  Raises:
    Error: a number out of range.

  >>> rule = correlated_mean(1.0, 0.0, 4.0, bands=3)
  >>> rule.init({'w': jnp.zeros(2)}, jax.random.key(0)).past['w'].shape
  (2, 2)
  """
  if bands < 1:
    raise Error(f'privacy.bands is {bands}: it must be at least 1.')
  inner = noisy_mean(clip, noise_multiplier, denominator)
  deviation = noise_multiplier * clip * column(bands)
  weight = jnp.asarray(coefficients(bands)[1:], jnp.float32)

  def init(params, key):
    del key
    past = tree.map_present(
      lambda p: jnp.zeros((bands - 1, *p.shape), jnp.float32), params
    )
    return State(jnp.float32(clip), jnp.float32(noise_multiplier), past)

  def finalize(sums, state, params, key):
    own, _ = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(sums.total)
    keys = jax.random.split(own, max(len(leaves), 1))
    noises, pasts = [], []
    for x, past, k in zip(leaves, treedef.flatten_up_to(state.past), keys):
      fresh = deviation * jax.random.normal(k, x.shape, jnp.float32)
      noise = fresh - tree.weighted_sum(past, weight)
      noises.append(x + noise)
      pasts.append(jnp.concatenate([noise[None], past])[: bands - 1])
    # An outcome that is not finite would undo the round and, with it, `past`:
    # the noise of later rounds would not be C^-1 n any more.
    delta = tree.map_present(
      lambda x, p: _saturated(x / denominator, p.dtype),
      jax.tree.unflatten(treedef, noises),
      params,
    )
    every = tree.map_present(lambda _: jnp.bool_(True), delta)
    state = state._replace(past=jax.tree.unflatten(treedef, pasts))
    return Aggregate(delta, trained=every), state

  return inner._replace(
    init=init,
    finalize=finalize,
    traits=Traits(always=True, private=finalize),
  )
