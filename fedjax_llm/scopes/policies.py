"""Policies: plans that the host makes for every client between rounds.

Builders return a policy `(round, reports, profiles) -> profiles` on NumPy
arrays of all N clients, for `server.planned`. It is a pure function, so a
resumed run makes the same plan.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_llm.types import Error, Reports

# Purposes of the random streams: scores before any report.
_FIRST, _DRAWN = 301, 302


def knapsack(
  value: np.ndarray, size: np.ndarray, most: np.ndarray, budget: int
) -> np.ndarray:
  """Returns how many of each of M items to take, [M] int32: a bounded knapsack.

      max sum_m value_m n_m   with  sum_m size_m n_m <= budget,
                                    n_m whole, 0 <= n_m <= most_m

  Item m has a value, a size and at most `most[m]` copies. The result is exact,
  by dynamic programming over the budget in units of the sizes' greatest common
  divisor: log2(most) steps an item, each over all units.

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
  """Returns a policy that gives ranks to each client's most important weights.

      max sum_m I_km r_km   with  sum_m sizes_m r_km <= budgets_k,
                                  0 <= r_km <= most_m

  where I_km is the importance of weight m that client k reported
  (`weight_importance`). A client that has never reported draws its I at random,
  so that together the clients try all weights. A client that did not report in
  the round before keeps its ranks.

  Args:
    sizes, most: parameters of one rank of each weight, and its number of ranks,
      [M] each (`allotment.rank_sizes`).
    budgets: parameters that each client can train, [N].
    seed: of the importances that are drawn before the first report.

    Returns:
      A policy that writes the entry 'ranks' [N, M] of the profiles.

  Raises:
    Error: a budget below the parameters of the smallest rank.

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


def assignment(
  score: np.ndarray, per_expert: int, least: int, most: int
) -> np.ndarray:
  """Returns the clients that each expert chooses, booleans [E, N].

      max sum_ej score_ej z_ej  with  sum_j z_ej = per_expert,
                                      least <= sum_e z_ej <= most,  z in {0, 1}

  The result is exact: the constraints are those of a flow, so every vertex of
  the linear program has whole numbers, and the simplex method ends at a vertex.

  Raises:
    Error: no choice satisfies the bounds.

  >>> score = np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1]])
  >>> assignment(score, 1, least=1, most=2).astype(int).tolist()
  [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
  """
  import scipy.optimize
  import scipy.sparse

  num, clients = np.shape(score)
  check_bounds(num, clients, per_expert, least, most)
  experts = scipy.sparse.kron(
    scipy.sparse.eye_array(num), np.ones((1, clients)), format='csr'
  )
  held = scipy.sparse.kron(
    np.ones((1, num)), scipy.sparse.eye_array(clients), format='csr'
  )
  solved = scipy.optimize.linprog(
    -np.ravel(score),
    A_ub=scipy.sparse.vstack([held, -held]),
    b_ub=np.repeat([most, -least], clients),
    A_eq=experts,
    b_eq=np.full(num, per_expert),
    bounds=(0, 1),
    method='highs-ds',
  )
  chosen = np.asarray(solved.x).reshape(num, clients) > 0.5
  assert np.abs(solved.x - chosen.ravel()).max() < 1e-6, solved.message
  return chosen


def check_bounds(
  num: int, clients: int, per_expert: int, least: int, most: int
) -> None:
  """Raises `Error` if no assignment of experts satisfies the bounds.

  >>> check_bounds(30, 10, per_expert=2, least=2, most=8)
  """
  held, most = num * per_expert, min(most, num)
  if not 1 <= per_expert <= clients:
    raise Error(
      f'algorithm.clients_per_expert is {per_expert}; an expert chooses from '
      f'1 to all {clients} clients.'
    )
  if not clients * least <= held <= clients * most:
    raise Error(
      f'algorithm.num_experts is {num}: with {per_expert} clients each they '
      f'fill {held} places, and {clients} clients hold {clients * least} to '
      f'{clients * most}, {least} to {most} each.'
    )


def by_affinity(
  *, per_expert: int = 2, least: int = 2, most: int = 8, seed: int = 0
) -> Callable[[int, Reports, Any], Mapping[str, np.ndarray]]:
  """Returns a policy: every weight's experts choose the clients they suit best.

      score_ej = softmax over clients j of <v_e, u_j> / sqrt(R)

  where u_j is the embedding of its tokens that client j last reported and v_e
  the mean of the embeddings of expert e that its holders then reported
  (`local.embeddings`). `assignment` turns the scores into a choice. Before the
  first report the scores are drawn. A client or an expert without any report
  has the embedding zero.

  Args:
    per_expert: clients that each expert chooses.
    least, most: experts that each client gets.
    seed: of the scores that are drawn before the first report.

    Returns:
      A policy that writes the entry 'experts' [N, M, E] of the profiles.

  >>> last = {'experts': np.zeros((2, 1, 2, 1)), 'tokens': np.ones((2, 1, 1)),
  ...         'held': np.ones((2, 1, 2))}
  >>> last['tokens'][1], last['experts'][:, :, 0] = -1, 1  # expert 0 is like 0
  >>> policy = by_affinity(per_expert=1, least=1, most=1)
  >>> plan = {'experts': np.zeros((2, 1, 2), bool)}
  >>> plan = policy(1, Reports(last, np.array([1, 1])), plan)
  >>> plan['experts'][:, 0].astype(int).tolist()
  [[1, 0], [0, 1]]
  """

  def policy(round: int, reports: Reports, profiles: Any):
    if round and not (reports.round == round).any():
      return profiles  # no new report
    clients, places, num = np.shape(profiles['experts'])
    if not round:
      rng = np.random.default_rng((seed, _DRAWN))
      alike = rng.random((places, num, clients))
    else:
      latest = {n: np.asarray(x, float) for n, x in reports.values.items()}
      of = np.maximum(latest['held'].sum(0), 1)[..., None]  # [M, E, 1]
      experts = latest['experts'].sum(0) / of
      rank = experts.shape[-1]
      alike = np.einsum('mer,nmr->men', experts, latest['tokens']) / rank**0.5
    score = np.exp(alike - alike.max(-1, keepdims=True))
    score /= score.sum(-1, keepdims=True)
    chosen = np.stack([assignment(s, per_expert, least, most) for s in score])
    return {**profiles, 'experts': np.moveaxis(chosen, -1, 0)}

  return policy
