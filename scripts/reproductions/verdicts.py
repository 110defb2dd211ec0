"""Judges claims by a few seeds: a confidence interval and a verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

AGREES, CONTRADICTS, CANNOT_TELL = 'agrees', 'contradicts', 'cannot tell'


class Claim(NamedTuple):
  """The claim that the mean of `values`, one for each seed, is above a bound.

  To compare two runs, the values are differences of runs of the same seed.
  `published` is True if a paper makes the claim; the others are our own checks
  and do not count in the verdict.
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
  """The result of a trend: claims, numbers to draw, settings to report."""

  claims: Sequence[Claim]
  measured: Mapping[str, Any]
  settings: Mapping[str, Any]


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """Computes Student's t interval of the mean of n independent numbers.

  mean +- t s / sqrt(n), with t the (1 + confidence) / 2 quantile of n - 1
  degrees of freedom and s the sample's standard deviation. The interval of one
  number is infinite.
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
  """Returns the verdict of a claim: its interval is above the bound or not.

  Above: agrees; below: contradicts; around it: cannot tell.
  """
  span = interval(claim.values)
  if not all(map(math.isfinite, (span.low, span.high))):
    return CANNOT_TELL
  if span.low > claim.bound:
    return AGREES
  return CONTRADICTS if span.high < claim.bound else CANNOT_TELL


def overall(words: Sequence[str]) -> str:
  """Returns 'contradicts' if any claim does, 'agrees' if all claims do."""
  if CONTRADICTS in words:
    return CONTRADICTS
  done = words and all(word == AGREES for word in words)
  return AGREES if done else CANNOT_TELL


def slope(x: Sequence[float], y: Sequence[float]) -> float:
  """Fits the exponent p of y ~ x^p by least squares in logarithms."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def told(outcome: Outcome) -> dict[str, Any]:
  """Returns the outcome with its verdicts as a dict for JSON."""
  claims = []
  for claim in outcome.claims:
    span = interval(claim.values)
    finite = [x if math.isfinite(x) else None for x in span]
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


def sentences(result: Mapping[str, Any]) -> str:
  """Formats the result of `told` as text."""
  lines = [f'Verdict: {result["verdict"]}.']
  for claim in result['claims']:
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
