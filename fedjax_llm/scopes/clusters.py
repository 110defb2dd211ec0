"""Policies that group clients by the factors that they report.

`by_factors` returns a policy for `server.planned`; `on_flat` gives a policy on
factors the reports in which they travel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_llm.types import Error, Reports


def by_factors(
  most: int, after: int
) -> Callable[[int, Reports, Any], dict[str, Any]]:
  """Returns a policy that clusters clients once, by their reported factors b.

      d_ij = mean over matrices of 1 - cos(vec b_i, vec b_j),
      clusters by average linkage, in the number of 2 to `most` with the largest
      mean silhouette

  The clustering of FedLEASE. The reports are sequences of arrays [N, M, ...]
  of M matrices each. It writes the entries 'cluster' [N] (0 before), 'experts'
  [N], the number of clusters (0 before), and 'due' [N]: the next round's
  reports are read. Clients without a report get the largest cluster; where
  fewer than three have reported there is one cluster.

  Args:
    most: of the clusters, at least two.
    after: the number of rounds after which clients are clustered.

  Raises:
    Error: `most` below two, `after` below one.

  >>> turn = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
  >>> reports = Reports([turn[:, None]], np.array([1, 1, 1]))
  >>> old = dict(cluster=np.zeros(3), experts=np.zeros(3), due=np.ones(3))
  >>> new = by_factors(most=2, after=1)(1, reports, old)
  >>> new['cluster'].tolist(), new['experts'].tolist()
  ([0, 0, 1], [2, 2, 2])
  """
  if most < 2:
    raise Error(f'by_factors: most={most} must be at least 2.')
  if after < 1:
    raise Error(f'by_factors: after={after} must be at least 1.')

  def policy(round: int, reports: Reports, profiles: Any) -> dict[str, Any]:
    due = np.full(len(reports.round), round == after - 1)
    if round != after:
      return {**profiles, 'due': due}
    seen = np.flatnonzero(reports.round >= 0)
    groups = np.zeros(len(seen), np.int32)
    if len(seen) > 2:
      apart = distances([np.asarray(x)[seen] for x in reports.values])
      groups = best(apart, min(most, len(seen) - 1))
    num = 1 + int(groups.max(initial=0))
    largest = int(np.bincount(groups, minlength=1).argmax())
    cluster = np.full(len(reports.round), largest, np.int32)
    cluster[seen] = groups
    experts = np.full(len(cluster), num, np.int32)
    return {**profiles, 'cluster': cluster, 'experts': experts, 'due': due}

  return policy


def on_flat(
  policy: Callable[[int, Reports, Any], dict[str, Any]],
  shapes: Sequence[tuple[int, ...]],
  of: Callable[[Any], Any] = lambda values: values,
) -> Callable[[int, Reports, Any], dict[str, Any]]:
  """Returns a policy on flat reports [N, P] from one on stacks of matrices.

  Args:
    policy: reads arrays [N, M, ...] of M matrices each, as `by_factors`.
    shapes: of the leaves that are joined in a report, [..., D, F] each.
    of: returns the rows [N, P] of a report's values.

  >>> seen = lambda round, reports, profiles: [x.shape for x in reports.values]
  >>> rows = Reports(np.zeros((3, 18)), np.zeros(3))
  >>> on_flat(seen, [(2, 2, 3), (3, 2)])(0, rows, None)
  [(3, 2, 2, 3), (3, 1, 3, 2)]
  """

  def by_matrix(round: int, reports: Reports, profiles: Any) -> dict[str, Any]:
    flat, factors = of(reports.values), []
    for shape in shapes:
      size = int(np.prod(shape))
      part, flat = flat[:, :size], flat[:, size:]
      factors.append(part.reshape(len(part), -1, *shape[-2:]))
    return policy(round, reports._replace(values=factors), profiles)

  return by_matrix


def distances(values: Any) -> np.ndarray:
  """Returns the mean over matrices of 1 - cos, [n, n], of arrays [n, M, ...].

  >>> x = np.array([[[1.0, 0.0]], [[0.0, 2.0]]])
  >>> distances([x]).tolist()
  [[0.0, 1.0], [1.0, 0.0]]
  """
  total, count = 0.0, 0
  for x in values:
    flat = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
    norm = np.linalg.norm(flat, axis=-1, keepdims=True)
    flat = flat / np.where(norm > 0, norm, 1)
    total = total + np.einsum('imp,jmp->ij', flat, flat)
    count += x.shape[1]
  apart = np.clip(1 - total / count, 0, None)
  np.fill_diagonal(apart, 0)
  return apart


def best(apart: np.ndarray, most: int) -> np.ndarray:
  """Returns the clusters [n] of the largest mean silhouette, from 0 on.

  Clusters are numbered in the order of their first members.

  >>> x = np.array([0.0, 0.1, 5.0, 5.1, 9.0])
  >>> best(np.abs(x - x[:, None]), most=4).tolist()
  [0, 0, 1, 1, 2]
  """
  members = [[i] for i in range(len(apart))]
  chosen, score = np.zeros(len(apart), np.int32), -np.inf
  while len(members) > 1:
    if len(members) <= most:
      labels = np.zeros(len(apart), np.int32)
      for number, group in enumerate(sorted(members)):
        labels[group] = number
      now = _silhouette(apart, labels)
      if now >= score:  # of equal ones the fewer
        chosen, score = labels, now
    linkage = {
      (i, j): np.mean(apart[np.ix_(members[i], members[j])])
      for i in range(len(members))
      for j in range(i)
    }
    i, j = min(linkage, key=linkage.__getitem__)
    members[j] = sorted(members[j] + members.pop(i))
  return chosen


def _silhouette(apart: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean of (b - a) / max(a, b); 0 for a cluster of one."""
  scores = []
  for i, label in enumerate(labels):
    same = labels == label
    if same.sum() == 1:
      scores.append(0.0)
      continue
    a = apart[i, same].sum() / (same.sum() - 1)
    others = set(labels.tolist()) - {int(label)}
    b = min(apart[i, labels == other].mean() for other in others)
    scores.append((b - a) / max(a, b, 1e-30))
  return float(np.mean(scores))
