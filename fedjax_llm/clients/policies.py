"""Policies: what the host decides for every client between rounds.

A policy is `(round, reports, profiles) -> profiles` on NumPy arrays of all N
clients, for `server.planned`: a pure function, so that a resumed run decides
the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_llm.types import Error, Reports

_FIRST = 301  # purpose of the random stream: scores before any report


def knapsack(
  value: np.ndarray, size: np.ndarray, most: np.ndarray, budget: int
) -> np.ndarray:
  """How many of each of M things to take, of which there are `most`.

      max sum_m value_m n_m   with  sum_m size_m n_m <= budget,
                                    n_m whole, 0 <= n_m <= most_m

  Exact, by dynamic programming over the budget in units of the sizes' greatest
  common divisor: of M things, log2(most) steps each, over all the units.

  >>> value, size, most = np.array([3.0, 2.0]), np.array([2, 1]), [4, 2]
  >>> knapsack(value, size, np.array(most), 7).tolist()
  [3, 1]
  """
  unit = int(np.gcd.reduce(size))
  size = np.asarray(size) // unit
  room = min(int(budget) // unit, int(np.dot(size, most)))
  pieces = []  # of a thing: 1, 2, 4, ... of it, and the rest
  for m, left in enumerate(np.asarray(most).tolist()):
    number = 1
    while left > 0:
      pieces.append((m, min(number, left)))
      left, number = left - number, 2 * number
  best = np.zeros(room + 1)
  taken = np.zeros((len(pieces), room + 1), bool)
  for i, (m, number) in enumerate(pieces):
    need = int(size[m]) * number
    if need <= room:
      other = best[: room + 1 - need] + float(value[m]) * number
      taken[i, need:] = other > best[need:]
      best[need:] = np.maximum(other, best[need:])
  counts = np.zeros(len(size), np.int32)
  for i, (m, number) in reversed(list(enumerate(pieces))):
    if taken[i, room]:
      counts[m] += number
      room -= int(size[m]) * number
  return counts


def by_importance(
  sizes: np.ndarray, most: np.ndarray, budgets: np.ndarray, *, seed: int = 0
) -> Callable[[int, Reports, Any], Mapping[str, np.ndarray]]:
  """Ranks for the weights that matter most to a client, within its budget.

      max sum_m I_km r_km   with  sum_m sizes_m r_km <= budgets_k,
                                  0 <= r_km <= most_m

  where I_km is what client k reported about weight m (`weight_importance`). A
  client that has not reported draws its I, so that together the clients try
  all weights. Who has not reported in the round before keeps its ranks.

  Args:
    sizes, most: parameters of a rank, and ranks, of each weight: [M]
      (`allotment.rank_sizes`).
    budgets: parameters that each client can train, [N].
    seed: of the first draw.

  Returns:
    A policy on the entry 'ranks' [N, M] of the profiles.

  Raises:
    Error: a budget below the smallest rank.

  >>> policy = by_importance(np.array([4, 4]), np.array([2, 2]), np.array([8]))
  >>> reports = Reports(np.array([[0.1, 0.9]]), np.array([1]))
  >>> policy(1, reports, {'ranks': np.zeros((1, 2), int)})['ranks'].tolist()
  [[0, 2]]
  """
  least, poorest = int(np.min(sizes)), int(np.argmin(budgets))
  if budgets[poorest] < least:
    raise Error(
      f'profiles.choices: a budget of {budgets[poorest]} parameters is below '
      f'the {least} that one rank of the smallest weight has.'
    )

  def policy(round: int, reports: Reports, profiles: Any):
    ranks = np.array(profiles['ranks'])
    for k in np.flatnonzero(reports.round == (round or -1)).tolist():
      value = np.asarray(reports.values[k], float)
      if not round:
        value = np.random.default_rng((seed, _FIRST, k)).random(len(sizes))
      ranks[k] = knapsack(value, sizes, most, int(budgets[k]))
    return {**profiles, 'ranks': ranks}

  return policy
