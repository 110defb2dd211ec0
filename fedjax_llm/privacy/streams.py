"""Noise that cancels in part over rounds: three matrices of DP-FTRL.

With the sums x_t of the rounds, C x + n is private, n independent noise of the
deviation z clip |C|, and the server adds y = C^-1 n to the sums. The builders
return a `Stream`: `banded` and `buffered` compute y row by row, `tree` from the
noises of the nodes of a binary tree.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from fedjax_llm.types import Error

MATRICES = ('banded', 'blt', 'tree')


class Stream(NamedTuple):
  """The noise of one leaf over rounds.

  >>> banded(2).sensitivity == column(2)
  True
  """

  sensitivity: float  # of k turns, divided by sqrt(k)
  size: int  # M, arrays of the leaf's shape that are kept
  # (past [M, ...], round, key, deviation) -> (noise [...], past [M, ...])
  step: Callable[[jax.Array, Any, jax.Array, float], tuple[Any, jax.Array]]


def named(
  matrix: str,
  *,
  bands: int = 1,
  buffers: int = 3,
  num_rounds: int = 1,
  separation: int = 1,
  turns: int = 1,
) -> Stream:
  """Returns a stream by its name: banded, blt or tree.

  Args:
    matrix: its name.
    bands: of 'banded'.
    buffers: of 'blt', whose decays and scales are those of `optimal`.
    num_rounds, separation, turns: of 'blt' and 'tree', see `tree`.

  Raises:
    Error: another name, or as the builders.

  >>> named('tree', num_rounds=4).size
  3
  """
  at = dict(num_rounds=num_rounds, separation=separation, turns=max(turns, 1))
  if matrix == 'banded':
    return banded(bands)
  if matrix == 'tree':
    return tree(**at)
  if matrix == 'blt':
    if not 1 <= buffers <= 8:
      raise Error(f'privacy.buffers is {buffers}: it must be from 1 to 8.')
    decays, scales = optimal(**at, buffers=buffers)
    return buffered(decays.tolist(), scales.tolist(), **at)
  raise Error(
    f'privacy.matrix is {matrix!r}: it must be one of {", ".join(MATRICES)}.'
  )


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


def banded(bands: int) -> Stream:
  """Returns y_t = n_t - sum_(0 < i < b) c_i y_(t-i), C with b bands.

  A client whose turns are at least b rounds apart meets columns of C that do
  not overlap, so k turns change C x by at most sqrt(k) |c| times the clip norm
  (Choquette-Choo et al. 2023, arXiv 2306.08153).

  Raises:
    Error: no band.

  >>> banded(3).size
  2
  """
  if bands < 1:
    raise Error(f'privacy.bands is {bands}: it must be at least 1.')
  weight = jnp.asarray(coefficients(bands)[1:], jnp.float32)
  scale = column(bands)

  def step(past, number, key, deviation):
    del number
    fresh = deviation * scale * jax.random.normal(key, past.shape[1:])
    noise = fresh - jnp.tensordot(weight, past, 1)
    return noise, jnp.concatenate([noise[None], past])[: bands - 1]

  return Stream(scale, bands - 1, step)


def tree(num_rounds: int, *, separation: int = 1, turns: int = 1) -> Stream:
  """Returns y_t = S_t - S_(t-1), S_t the noises of the nodes that sum to t.

  The nodes of a binary tree over the rounds are released, each with noise of
  its own, and the prefix 1 ... t is the sum of one node for each 1 in the
  binary form of t (Kairouz et al. 2021, DP-FTRL, arXiv 2103.00039, without
  Honaker's estimate from all nodes). A node of 2^l rounds holds at most m_l =
  min(k, ceil(2^l / b)) of a client's k turns, so k turns change all nodes by at
  most sqrt(k sum_l m_l) times the clip norm.

  Args:
    num_rounds: T.
    separation: b, the rounds between two turns of a client, at least.
    turns: k, the most turns of one client.

  Raises:
    Error: a number below 1.

  >>> round(tree(4).sensitivity ** 2, 4)  # a turn is in nodes of 1, 2, 4 rounds
  3.0
  """
  for name, value in (('num_rounds', num_rounds), ('separation', separation),
                      ('turns', turns)):  # fmt: skip
    if value < 1:
      raise Error(f'tree: {name} is {value}: it must be at least 1.')
  levels = num_rounds.bit_length()
  scale = math.sqrt(
    sum(min(turns, -(-(2**level) // separation)) for level in range(levels))
  )

  def step(past, number, key, deviation):
    # Round t completes the nodes of its lowest ones: past [l] holds the noise
    # of the node that stands for bit l of t.
    t = number + 1
    shape = past.shape[1:]
    bits = lambda value: (value >> jnp.arange(levels)) & 1
    lowest = jnp.argmax(bits(t))
    fresh = deviation * scale * jax.random.normal(key, shape)
    here = (jnp.arange(levels) == lowest).reshape(-1, *[1] * len(shape))
    below = (jnp.arange(levels) < lowest).reshape(here.shape)
    new = jnp.where(here, fresh, jnp.where(below, 0.0, past))
    return jnp.sum(new, 0) - jnp.sum(past, 0), new

  return Stream(scale, levels, step)


def buffered(
  decays: Sequence[float],
  scales: Sequence[float],
  *,
  num_rounds: int,
  separation: int = 1,
  turns: int = 1,
) -> Stream:
  """Returns y_t = n_t - sum_j w_j s_j with s_j <- d_j s_j + y_t: BLT.

  C is lower triangular and Toeplitz with c_0 = 1, c_i = sum_j w_j d_j^(i-1)
  (McMahan et al. 2024, arXiv 2408.08868, algorithm 3). Its coefficients are not
  negative and do not grow, so of all turns at least b rounds apart those in the
  rounds 0, b, 2 b, ... change C x most (theorem 2 of Kalinin and Lampert 2024,
  arXiv 2405.13763).

  Args:
    decays: d, from 0 to 1.
    scales: w, not negative.
    num_rounds, separation, turns: see `tree`.

  Raises:
    Error: decays or scales out of range, or coefficients that grow.

  >>> one = buffered([0.5], [0.5], num_rounds=3)
  >>> round(one.sensitivity ** 2, 4)  # 1 + 1 / 4 + 1 / 16
  1.3125
  """
  d, w = np.asarray(decays, np.float64), np.asarray(scales, np.float64)
  if d.shape != w.shape or d.ndim != 1 or not ((d >= 0) & (d <= 1)).all():
    raise Error(
      f'buffered: decays={list(decays)} are numbers from 0 to 1, as many as '
      f'scales={list(scales)}.'
    )
  if not (w >= 0).all() or w.sum() > 1:
    raise Error(
      f'buffered: scales={list(scales)} must not be negative, and their sum at '
      'most 1.'
    )
  scale = math.sqrt(
    max(
      worst(blt(d, w, num_rounds), separation, k) / k
      for k in range(1, turns + 1)
    )
  )
  decay, weight = jnp.asarray(d, jnp.float32), jnp.asarray(w, jnp.float32)

  def step(past, number, key, deviation):
    del number
    fresh = deviation * scale * jax.random.normal(key, past.shape[1:])
    noise = fresh - jnp.tensordot(weight, past, 1)
    return noise, past * decay.reshape(-1, *[1] * (past.ndim - 1)) + noise

  return Stream(scale, len(d), step)


def blt(decays: np.ndarray, scales: np.ndarray, num_rounds: int) -> np.ndarray:
  """Returns the coefficients c_0 ... c_(T-1) of `buffered`, float64.

  >>> blt(np.array([0.5]), np.array([0.5]), 4).tolist()
  [1.0, 0.5, 0.25, 0.125]
  """
  powers = np.arange(num_rounds - 1)[:, None]
  return np.concatenate([[1.0], (decays**powers * scales).sum(1)])


def worst(coefs: np.ndarray, separation: int, turns: int) -> float:
  """Returns max |C x|^2 over k turns b rounds apart; see `buffered`.

  >>> worst(np.array([1.0, 0.5, 0.25]), separation=2, turns=2)
  2.8125
  """
  total = np.zeros(len(coefs))
  for start in range(0, min(turns * separation, len(coefs)), separation):
    total[start:] += coefs[: len(coefs) - start]
  return float(total @ total)


def error(coefs: np.ndarray) -> float:
  """Returns the largest variance of a prefix sum of C^-1 n, n of variance 1.

  >>> error(np.array([1.0, 0.0, 0.0]))  # independent noise
  3.0
  """
  inverse = np.zeros(len(coefs))
  inverse[0] = 1.0
  for t in range(1, len(coefs)):
    inverse[t] = -(coefs[1 : t + 1] @ inverse[:t][::-1])
  return float((np.cumsum(inverse) ** 2).sum())


@functools.lru_cache(maxsize=16)
def optimal(
  num_rounds: int, *, separation: int = 1, turns: int = 1, buffers: int = 3
) -> tuple[np.ndarray, np.ndarray]:
  """Returns decays and scales of `buffered` with a small error in all rounds.

  The largest variance of a prefix sum, times the squared sensitivity, is
  minimised from one start by Nelder and Mead: the error of arXiv 2408.08868,
  not its optimiser.

  >>> d, w = optimal(16, buffers=2)
  >>> c = blt(d, w, 16)
  >>> bool(worst(c, 1, 1) * error(c) < 0.5 * error(np.eye(16)[0]))
  True
  """

  def unpacked(x):
    d = special.expit(x[:buffers])
    share = np.exp(x[buffers:-1] - x[buffers:-1].max())
    return d, special.expit(x[-1]) * share / share.sum()

  def loss(x):
    c = blt(*unpacked(x), num_rounds)
    return math.log(worst(c, separation, turns) * error(c))

  begin = np.concatenate([np.linspace(-1, 4, buffers), np.zeros(buffers + 1)])
  best = optimize.minimize(
    loss, begin, method='Nelder-Mead', options={'maxiter': 200 * buffers}
  )
  d, w = unpacked(best.x)
  return d.round(6), np.floor(w * 1e6) / 1e6
