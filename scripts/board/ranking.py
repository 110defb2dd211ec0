"""Ranks of methods over tasks: Friedman's test and Nemenyi's distance.

Demsar 2006, "Statistical Comparisons of Classifiers over Multiple Data Sets",
JMLR 7, sections 3.2.2 and 3.2.3.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Test(NamedTuple):
  """The mean rank of each method, and whether the ranks differ."""

  ranks: np.ndarray  # [k], 1 is best
  chi2: float
  p: float
  distance: float  # of Nemenyi, at 5 %


def ranks(values: np.ndarray, largest: bool | Sequence[bool]) -> np.ndarray:
  """Returns the rank of each method in each task, [N, k]; ties share theirs.

  Args:
    values: a row a task, a column a method.
    largest: of each task, whether large values are good.
  """
  good = np.broadcast_to(largest, (len(values),))[:, None]
  return stats.rankdata(np.where(good, -values, values), axis=1)


def distance(num_methods: int, num_tasks: int, alpha: float = 0.05) -> float:
  """Returns the critical difference of two mean ranks.

  CD = q_alpha sqrt(k (k + 1) / (6 N)),  q of the studentized range / sqrt 2
  """
  q = stats.studentized_range.ppf(1 - alpha, num_methods, np.inf) / math.sqrt(2)
  return float(q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_tasks)))


def test(values: np.ndarray, largest: bool | Sequence[bool]) -> Test:
  """Returns Friedman's test of values [N tasks, k methods], N >= 2, k >= 3."""
  each = ranks(values, largest)
  number, k = each.shape
  chi2, p = stats.friedmanchisquare(*each.T)
  return Test(each.mean(0), float(chi2), float(p), distance(k, number))


def cliques(means: np.ndarray, cd: float) -> list[tuple[float, float]]:
  """Returns the longest intervals of mean ranks that a distance cannot tell.

  Only intervals with two or more methods.
  """
  order = np.sort(means)
  result: list[tuple[float, float]] = []
  for i, low in enumerate(order):
    high = order[order <= low + cd].max()
    if high > low and (not result or high > result[-1][1]):
      result.append((float(order[i]), float(high)))
  return result


def paired(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
  """Returns the mean difference by seed and half of its 95 % t interval."""
  apart = np.subtract(own, other)
  if len(apart) < 2:
    return float(apart.mean()), math.nan
  spread = apart.std(ddof=1) / math.sqrt(len(apart))
  return float(apart.mean()), float(stats.t.ppf(0.975, len(apart) - 1) * spread)
