"""Epsilon of Poisson-sampled Gaussian rounds, by the package dp-accounting.

`epsilon` and `noise_multiplier` return numbers. The package is imported where
it is used (extra `dp`).
"""

import functools
import math
from typing import Any

from fedjax_llm.types import Error

ACCOUNTANTS = ('rdp', 'pld')

# Whole orders: the others are slow, and close to q = 1 do not converge.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)


def package() -> Any:
  """Returns the module `dp_accounting`.

  >>> package().__name__
  'dp_accounting'

  Raises:
    Error: it is not installed.
  """
  try:
    import dp_accounting
  except ImportError as error:
    raise Error(
      'privacy counts epsilon with the package dp-accounting, which is not '
      "installed: pip install 'fedjax_llm[dp]'."
    ) from error
  return dp_accounting


def _event(rate: float, noise: float) -> Any:
  dp = package()
  gaussian = dp.GaussianDpEvent(noise)
  return gaussian if rate == 1 else dp.PoissonSampledDpEvent(rate, gaussian)


def _fresh(accountant: str) -> Any:
  dp = package()
  if accountant == 'rdp':
    return dp.rdp.RdpAccountant(_ORDERS)
  if accountant == 'pld':
    return dp.pld.PLDAccountant()
  raise Error(
    f'privacy.accountant is {accountant!r}: it must be one of '
    f'{", ".join(ACCOUNTANTS)}.'
  )


@functools.lru_cache(maxsize=4096)
def _epsilon(accountant, noise, rate, rounds, delta) -> float:
  composed = _fresh(accountant).compose(_event(rate, noise), rounds)
  return float(composed.get_epsilon(delta))


def epsilon(
  *,
  noise_multiplier: float,
  rate: float,
  num_rounds: int,
  delta: float,
  overflow: float = 0.0,
  accountant: str = 'rdp',
) -> float:
  """Returns epsilon of a number of rounds, infinite if there is none.

  A neighbour differs by one client, whose update is there or not. Each round
  is a Gaussian mechanism on a Poisson sample.

  Args:
    noise_multiplier: z, the deviation of the noise over the clip norm.
    rate: q, the probability that a client is drawn.
    num_rounds: T; zero rounds have epsilon 0.
    delta: of the guarantee.
    overflow: p, a bound on the probability that a round draws more clients than
      it has rows, and cuts the sample. Such a round is counted as broken: of
      delta, (1 + e^epsilon) T p is set aside for it.
    accountant: 'rdp' (fast) or 'pld' (tighter, slower).

  >>> at = dict(rate=0.1, num_rounds=100, delta=1e-5)
  >>> round(epsilon(noise_multiplier=2.0, **at), 2)
  2.59

  Raises:
    Error: the package is not installed, or the accountant has another name.
  """
  if num_rounds == 0:
    return 0.0
  if noise_multiplier <= 0:
    return math.inf
  at = functools.partial(
    _epsilon, accountant, float(noise_multiplier), float(rate), int(num_rounds)
  )
  first = at(delta)
  if not overflow or not math.isfinite(first):
    return first
  most = first + 0.1
  if most > 500:
    return math.inf
  aside = (1 + math.exp(most)) * num_rounds * overflow
  if aside >= delta:
    return math.inf
  second = at(delta - aside)
  return second if second <= most else math.inf


_spent = epsilon  # an argument of `noise_multiplier` has this name


@functools.lru_cache(maxsize=256)
def noise_multiplier(
  *,
  epsilon: float,
  delta: float,
  rate: float,
  num_rounds: int,
  overflow: float = 0.0,
  accountant: str = 'rdp',
) -> float:
  """Returns the smallest noise multiplier z of an epsilon, up to 0.1 percent.

  The arguments are those of the function `epsilon`; z is found by bisection
  from above, so that the epsilon of the result is at most the target.

  >>> z = noise_multiplier(epsilon=3.0, delta=1e-5, rate=0.1, num_rounds=100)
  >>> round(z, 2)
  1.8

  Raises:
    Error: the package is not installed, or no z up to 10,000 suffices.
  """

  def reached(noise):
    value = _spent(
      noise_multiplier=noise,
      rate=rate,
      num_rounds=num_rounds,
      delta=delta,
      overflow=overflow,
      accountant=accountant,
    )
    return value <= epsilon

  high = 1.0
  while not reached(high):
    high *= 2
    if high > 1e4:
      raise Error(
        f'privacy.epsilon is {epsilon:g}: no noise reaches it over '
        f'{num_rounds} rounds with delta={delta:g}; raise clients.cohort_size, '
        'if rounds overflow, or epsilon.'
      )
  low = high / 2 if high > 1 else 0.0
  while high - low > 1e-3 * high:
    middle = (low + high) / 2
    low, high = (low, middle) if reached(middle) else (middle, high)
  return high


def skellam_epsilon(
  *, noise_multiplier: float, grid: float, num_rounds: int, delta: float
) -> float:
  """Returns epsilon of sums with Skellam noise, over a number of rounds.

  A neighbour's message is there or is zero: a whole-number vector of norm at
  most D = `grid`, so that its sum of magnitudes is at most D^2. The noise has
  the variance v = (z D)^2 an entry, and order a (a whole number) the divergence

      a D^2 / (2 v) + ((2 a - 1) D^2 + 6 D^2) / (4 v^2)

  at most (Agarwal et al. 2021, arXiv 2110.04995, theorem 3.5). Rounds add up;
  the sampling of clients is not counted.

  >>> at = dict(grid=1000.0, num_rounds=10, delta=1e-5)
  >>> exact = epsilon(noise_multiplier=4.0, rate=1.0, num_rounds=10, delta=1e-5)
  >>> round(skellam_epsilon(noise_multiplier=4.0, **at) / exact, 4)
  1.0

  Raises:
    Error: the package is not installed.
  """
  if num_rounds == 0:
    return 0.0
  if noise_multiplier <= 0:
    return math.inf
  variance = (noise_multiplier * grid) ** 2
  curve = [
    num_rounds * skellam_divergence(order, grid, grid**2, variance)
    for order in _ORDERS
  ]
  return float(package().rdp.compute_epsilon(_ORDERS, curve, delta)[0])


def skellam_divergence(
  order: int, norm: float, magnitudes: float, variance: float
) -> float:
  """Returns a bound on the Renyi divergence of a shifted Skellam noise.

  Args:
    order: a whole number above 1.
    norm: the Euclidean norm of the shift, a vector of whole numbers.
    magnitudes: its sum of magnitudes.
    variance: of the noise, an entry.

  >>> skellam_divergence(2, 1.0, 1.0, 10.0)
  0.1225
  """
  first = order * norm**2 / (2 * variance)
  second = ((2 * order - 1) * norm**2 + 6 * magnitudes) / (4 * variance**2)
  return first + min(second, 3 * magnitudes / (2 * variance))
