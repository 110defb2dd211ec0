"""What a handful of seeds says about a claim: an interval, and a word."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

AGREES, CONTRADICTS, CANNOT_TELL = 'agrees', 'contradicts', 'cannot tell'


class Claim(NamedTuple):
  """'This number is above its bound', of one number a seed.

  The numbers are paired where two runs are compared: differences of runs of
  the same seed. `published` says whether a paper makes the claim; the others
  are checks of our own, and do not count in the verdict.
  """

  text: str
  values: Sequence[float]
  bound: float = 0.0
  published: bool = True


class Interval(NamedTuple):
  mean: float
  low: float
  high: float


class Outcome(NamedTuple):
  """What a trend found: claims, numbers to draw, settings to tell."""

  claims: Sequence[Claim]
  measured: Mapping[str, Any]
  settings: Mapping[str, Any]


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """Student's t interval of the mean of n independent numbers.

  mean +- t s / sqrt(n), with t the (1 + confidence) / 2 quantile of n - 1
  degrees of freedom and s the sample's standard deviation. One number says
  nothing: its interval is infinite.
  """
  x = np.asarray(values, float)
  mean = float(np.mean(x))
  if len(x) < 2:
    return Interval(mean, -math.inf, math.inf)
  from scipy import stats  # comes with jax

  t = stats.t.ppf((1 + confidence) / 2, len(x) - 1)
  half = float(t * np.std(x, ddof=1) / math.sqrt(len(x)))
  return Interval(mean, mean - half, mean + half)


def judge(claim: Claim) -> str:
  """The interval lies above the bound, below it, or holds it."""
  found = interval(claim.values)
  if not all(map(math.isfinite, (found.low, found.high))):
    return CANNOT_TELL
  if found.low > claim.bound:
    return AGREES
  return CONTRADICTS if found.high < claim.bound else CANNOT_TELL


def overall(words: Sequence[str]) -> str:
  """One contradiction contradicts; all have to agree to agree."""
  if CONTRADICTS in words:
    return CONTRADICTS
  done = words and all(word == AGREES for word in words)
  return AGREES if done else CANNOT_TELL


def slope(x: Sequence[float], y: Sequence[float]) -> float:
  """The exponent p of y ~ x^p, by least squares in logarithms."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def told(outcome: Outcome) -> dict[str, Any]:
  """The outcome with its verdict, as JSON."""
  claims = []
  for claim in outcome.claims:
    found = interval(claim.values)
    finite = [x if math.isfinite(x) else None for x in found]
    claims.append(
      {
        'claim': claim.text,
        'published': claim.published,
        'verdict': judge(claim),
        'bound': claim.bound,
        'mean': finite[0],
        'interval_95': finite[1:],
        'values': [float(v) for v in claim.values],
      }
    )
  words = [c['verdict'] for c in claims if c['published']]
  return {
    'verdict': overall(words),
    'claims': claims,
    'settings': dict(outcome.settings),
    'measured': outcome.measured,
  }


def sentences(found: Mapping[str, Any]) -> str:
  """`told`, to be read."""
  lines = [f'Verdict: {found["verdict"]}.']
  for claim in found['claims']:
    low, high = claim['interval_95']
    span = (
      'one seed only' if low is None else f'95 %: {low:+.4g} .. {high:+.4g}'
    )
    who = '' if claim['published'] else ' (a check of ours)'
    lines.append(
      f'  {claim["verdict"]}: {claim["claim"]}{who}: {claim["mean"]:+.4g}, '
      f'{span}, bound {claim["bound"]:g}, {len(claim["values"])} seeds'
    )
  return '\n'.join(lines)
