"""FedHDS: coresets by two levels of clustering (extra `select`).

Qin et al. 2024, arXiv 2410.10926.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedjax_llm.data.selection.types import Examples, Features, Selection
from fedjax_llm.types import Error

Cluster = Callable[[np.ndarray], np.ndarray]  # [n, D] -> [n] labels, -1 noise


def fed_hds(min_cluster: int = 2) -> Selection:
  """Returns the selection of FedHDS: an example for each group of clusters.

      client k:  groups G_kj of its features (HDBSCAN), centroids c_kj
      server:    groups of all centroids (HDBSCAN), one centroid of each
      client k:  keeps, for each of its centroids that was chosen, the example
                 nearest to it

  Qin et al. 2024, arXiv 2410.10926. Only centroids are sent. An example's
  features are the last state of its last token under the frozen model, computed
  once before training; the paper fuses those of several layers and selects
  again in every round. Of a group at the server the centroid nearest to the
  group's mean is chosen. Where the paper is silent: centroids outside of every
  group (noise) are groups of their own, a client whose examples form no group
  has one group of all, and a client of which nothing was chosen keeps the
  example nearest to its first centroid, as every client has to train.

  Args:
    min_cluster: the smallest group, of HDBSCAN.

  Raises:
    Error: a group below two; when it runs, no package scikit-learn.

  >>> fed_hds(1)
  Traceback (most recent call last):
  fedjax_llm.types.Error: selection.min_cluster is 1; it must be at least 2.
  """
  if min_cluster < 2:
    raise Error(
      f'selection.min_cluster is {min_cluster}; it must be at least 2.'
    )

  def prepare(
    examples: Examples, features: Features, seed: int
  ) -> list[np.ndarray]:
    del seed
    own = [np.asarray(features(some), np.float64) for some in examples]
    return two_levels(own, hdbscan(min_cluster))

  return Selection(prepare=prepare)


def two_levels(
  features: Sequence[np.ndarray], cluster: Cluster
) -> list[np.ndarray]:
  """Returns the places of the examples that each client keeps.

  Args:
    features: [n, D] of each client.
    cluster: labels of rows; -1 belongs to no group.

  >>> halves = lambda x: (x[:, 0] > 5).astype(int)
  >>> ann, bob = np.array([[0.0], [1], [2], [9]]), np.array([[1], [1.5], [2]])
  >>> [kept.tolist() for kept in two_levels([ann, bob], halves)]
  [[1, 3], [1]]
  """
  centroids, owners, nearest = [], [], []
  for client, own in enumerate(features):
    for center in _centers(own, cluster):
      centroids.append(center)
      owners.append(client)
      nearest.append(_nearest(own, center))
  points = np.stack(centroids)
  labels = _groups(points, cluster)
  chosen = set()
  for label in np.unique(labels[labels >= 0]):
    group = np.flatnonzero(labels == label)
    chosen.add(int(group[_nearest(points[group], points[group].mean(0))]))
  chosen |= set(np.flatnonzero(labels < 0).tolist())
  kept = []
  for client in range(len(features)):
    own = [i for i, owner in enumerate(owners) if owner == client]
    mine = {nearest[i] for i in own if i in chosen} or {nearest[own[0]]}
    kept.append(np.array(sorted(mine), np.int64))
  return kept


def hdbscan(min_cluster: int) -> Cluster:
  """Returns HDBSCAN of scikit-learn as a function of points, [n, D] -> [n]."""
  try:
    from sklearn.cluster import (  # pyright: ignore[reportMissingImports]
      HDBSCAN,
    )
  except ImportError as error:
    raise Error(
      'selection.name=fed_hds needs the package scikit-learn: install the '
      'extra `select`.'
    ) from error

  def cluster(points: np.ndarray) -> np.ndarray:
    if len(points) < min_cluster:  # all noise; the package raises here
      return np.full(len(points), -1)
    return HDBSCAN(min_cluster_size=min_cluster, copy=True).fit_predict(points)

  return cluster


def _groups(points: np.ndarray, cluster: Cluster) -> np.ndarray:
  """Returns labels, of which fewer than three points have none."""
  if len(points) < 3:
    return np.full(len(points), -1)
  return np.asarray(cluster(points))


def _centers(own: np.ndarray, cluster: Cluster) -> list[np.ndarray]:
  labels = _groups(own, cluster)
  groups = [own[labels == i] for i in np.unique(labels[labels >= 0])]
  return [group.mean(0) for group in groups or [own]]


def _nearest(points: np.ndarray, center: np.ndarray) -> int:
  return int(np.argmin(((points - center) ** 2).sum(-1)))
