"""Joins and splits adapters of targets that share one checkpoint module.

A fused projection computes all of its parts at once, y = x W with the features
of W split among them. Separate adapters of the parts are exactly one adapter
of the whole, of the sum of their ranks:

    A = [A_1 ... A_n],    B = blockdiag(B_1, ..., B_n)

and an adapter of the whole is one of each part: A with the part's features of
B.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Factors(NamedTuple):
  """The low-rank factors of one layer: a [D, R], b [R, F] and the scale."""

  a: Any
  b: Any
  scale: Any


def join(parts: Sequence[tuple[np.ndarray, Factors]], total: int) -> Factors:
  """Returns the adapter of the whole module; a part is (features, factors).

  If scales differ, the first is kept and the other parts' B are rescaled.

  >>> one = Factors(np.ones([2, 1]), np.ones([1, 2]), 0.5)
  >>> join([(np.array([0, 1]), one), (np.array([2, 3]), one)], 4).b.tolist()
  [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
  """
  scale = parts[0][1].scale
  a = np.concatenate([factors.a for _, factors in parts], axis=1)
  b = np.zeros((a.shape[1], total), np.float32)
  start = 0
  for rows, factors in parts:
    end = start + factors.b.shape[0]
    ratio = np.float32(1.0 if factors.scale == scale else factors.scale / scale)
    b[start:end, rows] = factors.b * ratio
    start = end
  return Factors(a, b, scale)


def split(
  layers: Sequence[Factors],
  rows: Sequence[np.ndarray],
  ranks: Sequence[int] | None = None,
) -> list[list[Factors]]:
  """Splits a whole module's adapter into factors by [part][layer].

  If the adapter is a `join` of parts of these `ranks` (None: equal ranks), each
  part gets its own block; otherwise every part gets all of A.
  """
  rank, num = layers[0].a.shape[1], len(rows)
  sizes = ranks or [rank // num] * num
  ends = np.cumsum(sizes)
  blocks = [slice(end - size, end) for end, size in zip(ends, sizes)]

  def joined(layer):
    if layer.a.shape[1] != rank or ends[-1] != rank:
      return False
    for own, features in zip(blocks, rows):
      b = layer.b[:, features].copy()
      # Zero factors (an untrained adapter) may be of parts or of the whole.
      if ranks is None and not b[own].any():
        return False
      b[own] = 0
      if b.any():
        return False
    return True

  if not all(map(joined, layers)):
    blocks = [slice(None)] * num
  return [
    [Factors(x.a[:, own], x.b[own][:, features], x.scale) for x in layers]
    for own, features in zip(blocks, rows)
  ]
