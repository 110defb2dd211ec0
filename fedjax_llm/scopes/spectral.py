"""A policy that groups clients by the subspaces of their reported factors.

`by_subspace` returns a policy for `server.planned`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm.types import Error, Reports


def by_subspace(
  most: int, first_rounds: int, cluster_rounds: int
) -> Callable[[int, Reports, Any], dict[str, Any]]:
  """Returns HiLoRA's policy: three tiers in turn, and clusters after the first.

      d_ij = mean over matrices of 1 - ||U_i' U_j||_F^2 / R,
      affinity = exp(-d_ij^2 / (2 sigma^2)),
      clusters by the eigenvectors of its normalised Laplacian, in the number of
      2 to `most` with the largest gap between eigenvalues

  U_i are orthonormal bases of the reported factors. It writes the entries
  'tier' [N] (0, 1, 2), 'cluster' [N], and 'due' [N]: the next round's reports
  are read. sigma is the median distance, and the eigenvectors' rows are grouped
  by k-means from the farthest rows: the paper leaves both open. Clients without
  a report get the largest cluster; of fewer than three reports there is one
  cluster. The reports are sequences of arrays [N, M, R, F] of M matrices each.

  Raises:
    Error: `most` below two, a tier without a round.

  >>> rows = np.eye(3)[[0, 0, 1, 1]]  # the outputs that four clients change
  >>> reports = Reports([rows[:, None, None]], np.ones(4, int))
  >>> old = dict(tier=np.zeros(4), cluster=np.zeros(4), due=np.ones(4))
  >>> new = by_subspace(2, first_rounds=1, cluster_rounds=1)(1, reports, old)
  >>> new['cluster'].tolist(), new['tier'].tolist()
  ([0, 0, 1, 1], [1, 1, 1, 1])
  """
  if most < 2:
    raise Error(f'by_subspace: most={most} must be at least 2.')
  for name, value in (
    ('first_rounds', first_rounds),
    ('cluster_rounds', cluster_rounds),
  ):
    if value < 1:
      raise Error(f'by_subspace: {name}={value} must be at least 1.')

  def policy(round: int, reports: Reports, profiles: Any) -> dict[str, Any]:
    size = len(reports.round)
    tier = int(round >= first_rounds) + int(
      round >= first_rounds + cluster_rounds
    )
    plan = {
      **profiles,
      'tier': np.full(size, tier, np.int32),
      'due': np.full(size, round == first_rounds - 1),
    }
    if round != first_rounds:
      return plan
    seen = np.flatnonzero(reports.round >= 0)
    groups = np.zeros(len(seen), np.int32)
    if len(seen) > 2:
      apart = distances([np.asarray(x)[seen] for x in reports.values])
      groups = groups_of(apart, min(most, len(seen) - 1))
    largest = int(np.bincount(groups, minlength=1).argmax())
    cluster = np.full(size, largest, np.int32)
    cluster[seen] = groups
    return {**plan, 'cluster': cluster}

  return policy


def distances(values: Any) -> np.ndarray:
  """Returns the mean of 1 - ||U_i' U_j||^2 / R, [n, n], of [n, M, R, F] each.

  U_i are the left singular vectors of a client's factor transposed. Factors of
  rank below R are as near to themselves as their rank allows.

  >>> x = np.eye(2)[:, None, None]
  >>> distances([x]).tolist()
  [[0.0, 1.0], [1.0, 0.0]]
  """
  total, count = 0.0, 0
  for x in values:
    x = np.asarray(x, np.float64)
    rank = x.shape[-2]
    _, s, v = np.linalg.svd(x, full_matrices=False)
    top = np.maximum(s[..., :1], 1e-30)
    v = v * (s > 1e-9 * top)[..., None]  # [n, M, R, F]
    alike = np.einsum('imrf,jmsf->mijrs', v, v)
    total = total + np.sum(alike**2, (0, 3, 4)) / rank
    count += x.shape[1]
  apart = np.clip(1 - total / count, 0, None)
  np.fill_diagonal(apart, 0)
  return apart


def groups_of(apart: np.ndarray, most: int) -> np.ndarray:
  """Returns spectral clusters [n], numbered by their first members.

  >>> x = np.array([0.0, 0.01, 0.9, 0.91])
  >>> groups_of(np.abs(x - x[:, None]), most=3).tolist()
  [0, 0, 1, 1]
  """
  size = len(apart)
  sigma = max(np.median(apart[~np.eye(size, dtype=bool)]), 1e-12)
  near = np.exp(-(apart**2) / (2 * sigma**2))
  root = 1 / np.sqrt(near.sum(1))
  values, vectors = np.linalg.eigh(np.eye(size) - root[:, None] * near * root)
  gaps = np.diff(values)[1:most]  # after 2, 3, ... clusters
  num = 2 + int(np.argmax(gaps))
  rows = vectors[:, :num]
  rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
  labels = _means(rows, num)
  first = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
  order = {
    label: i for i, label in enumerate(sorted(first, key=first.__getitem__))
  }
  return np.array([order[label] for label in labels.tolist()], np.int32)


def _means(rows: np.ndarray, num: int) -> np.ndarray:
  """Returns the labels of k-means that starts from rows far from each other."""
  centres = [rows[0]]
  apart = lambda centre: np.sum((rows - centre) ** 2, -1)
  while len(centres) < num:
    centres.append(rows[np.argmax(np.min([apart(c) for c in centres], 0))])
  labels = np.zeros(len(rows), int)
  for _ in range(50):
    labels = np.argmin([apart(c) for c in centres], 0)
    centres = [
      rows[labels == i].mean(0) if (labels == i).any() else c
      for i, c in enumerate(centres)
    ]
  return labels
