"""Audits of a claimed epsilon, from one run with canaries.

Each of m canaries takes part or not by a coin. From the results of the run an
auditor guesses the coins of the r canaries that it is surest of. Under
(epsilon, delta) it cannot guess too well, so many right guesses refute an
epsilon.
"""

import math
from typing import NamedTuple

import numpy as np

from fedjax_llm.types import Error


class Guesses(NamedTuple):
  """The guesses of an audit: `correct` of `made` coins of `canaries`.

  >>> Guesses(canaries=10, made=4, correct=3).made
  4
  """

  canaries: int  # m
  made: int  # r
  correct: int  # v


def guesses(scores: np.ndarray, present: np.ndarray, made: int) -> Guesses:
  """Returns the guesses of an auditor that trusts scores.

  The r / 2 canaries of the highest scores are guessed to take part, the r / 2
  of the lowest scores not (Steinke et al. 2023, arXiv 2305.08846, algorithm 1);
  equal scores are ordered by place, whatever the truth.

  Args:
    scores: [m], higher where a canary seems to take part.
    present: [m] bool, the truth.
    made: r, an even number from 2 to m.

  Raises:
    Error: r is odd or out of range; scores that are not finite.

  >>> guesses(np.array([3.0, 0.1, -1.0, 0.2]), np.array([1, 0, 0, 1]) > 0, 2)
  Guesses(canaries=4, made=2, correct=2)
  """
  scores, present = np.asarray(scores, np.float64), np.asarray(present, bool)
  if made % 2 or not 2 <= made <= len(scores):
    raise Error(
      f'guesses: made={made} must be an even number from 2 to {len(scores)}, '
      'the number of canaries.'
    )
  if not np.isfinite(scores).all():
    raise Error('guesses: a score is not finite.')
  order = np.argsort(-scores, kind='stable')
  half = made // 2
  right = present[order[:half]].sum() + (~present[order[-half:]]).sum()
  return Guesses(len(scores), made, int(right))


def p_value(result: Guesses, epsilon: float, delta: float) -> float:
  """Returns the largest probability of so many right guesses under a claim.

      beta + 2 m delta alpha,  W ~ Binomial(r, e^epsilon / (1 + e^epsilon)),
      beta = P(W >= v),  alpha = max_i P(v > W >= v - i) / i

  (Steinke et al. 2023, arXiv 2305.08846, theorem 5.2 and appendix D).

  >>> p_value(Guesses(1, 1, 1), epsilon=0.0, delta=0.0)
  0.5
  """
  m, r, v = result
  rate = 1 / (1 + math.exp(-epsilon))
  count = np.arange(r + 1)
  choose = [
    math.lgamma(r + 1) - math.lgamma(k + 1) - math.lgamma(r - k + 1)
    for k in range(r + 1)
  ]
  # log(1 - rate) without cancellation.
  less = -epsilon - math.log1p(math.exp(-epsilon))
  logs = np.array(choose) + count * math.log(rate) + (r - count) * less
  mass = np.exp(logs)
  beta = float(mass[v:].sum())
  alpha = 0.0
  if v:
    below = np.cumsum(mass[:v][::-1])  # P(v > W >= v - i), i = 1 ... v
    alpha = float(np.max(below / np.arange(1, v + 1)))
  return min(1.0, beta + 2 * m * delta * alpha)


def epsilon_lower_bound(
  result: Guesses, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
  """Returns the largest epsilon that the guesses refute; 0 if they refute none.

  With probability `confidence` the mechanism is not (epsilon, delta)-private
  for any smaller epsilon. If all r guesses are right and delta = 0 it is

      log(q / (1 - q)),  q = (1 - confidence)^(1 / r)

  the most that r guesses can show.

  Raises:
    Error: a confidence outside of (0, 1), a delta outside of [0, 1), or more
      right guesses than guesses.

  >>> round(epsilon_lower_bound(Guesses(100, 100, 100)), 3)
  3.493
  >>> epsilon_lower_bound(Guesses(100, 100, 55))
  0.0
  """
  if not 0 < confidence < 1 or not 0 <= delta < 1:
    raise Error(
      f'epsilon_lower_bound: confidence={confidence} must be above 0 and below '
      f'1, and delta={delta} at least 0 and below 1.'
    )
  if not 0 <= result.correct <= result.made <= result.canaries:
    raise Error(
      f'epsilon_lower_bound: {result.correct} right of {result.made} guesses '
      f'on {result.canaries} canaries is not possible.'
    )
  refuted = lambda epsilon: p_value(result, epsilon, delta) <= 1 - confidence
  if not refuted(0.0):
    return 0.0
  low, high = 0.0, 1.0
  while refuted(high):
    low, high = high, 2 * high
    if high > 64:
      return low
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if refuted(middle) else (low, middle)
  return low
