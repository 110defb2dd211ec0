"""Nearest texts by their vectors, for prompts with examples in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm.types import Error


def nearest(
  queries: Any, pool: Any, num: int, allowed: Any = None
) -> list[list[int]]:
  """Returns the places in a pool that are nearest to each query, nearest first.

  Nearness is the cosine of two vectors; of equal ones the earlier place wins.

  Args:
    queries: [n, E].
    pool: [m, E].
    num: places a query, at most.
    allowed: [n, m], False where a place is not for a query; None: all are.

  Raises:
    Error: vectors of another number of axes or entries, or that are not finite.

  >>> nearest([[1.0, 0.0]], [[0.0, 1.0], [2.0, 1.0], [3.0, 0.0]], 2)
  [[2, 1]]
  >>> nearest([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], 2, [[False, True]])
  [[1]]
  """
  first, second = (np.asarray(x, np.float64) for x in (queries, pool))
  for x in (first, second):
    if x.ndim != 2 or x.shape[1] != first.shape[-1]:
      raise Error(
        f'vectors of texts are {list(x.shape)}: they must be [texts, E], with '
        'one E for all.'
      )
    if not np.isfinite(x).all():
      raise Error('vectors of texts have values that are not finite.')
  size = lambda x: np.linalg.norm(x, axis=1, keepdims=True)
  unit = lambda x: x / np.maximum(size(x), 1e-12)
  cosines = unit(first) @ unit(second).T  # [n, m]
  if allowed is not None:
    cosines = np.where(np.asarray(allowed, bool), cosines, -np.inf)
  order = np.argsort(-cosines, axis=1, kind='stable')[:, :num]
  return [
    [int(j) for j in row if np.isfinite(cosines[i, j])]
    for i, row in enumerate(order)
  ]


def joined(
  parts: Sequence[Sequence[int]],
  last: Sequence[int],
  start: Sequence[int],
  room: int,
) -> tuple[list[int], int]:
  """Returns tokens of texts before those of the last one, and their number.

  The tokens `start`, with which every text begins, stand once. Texts that do
  not fit into `room` tokens are left out from the left; where none fits, the
  last one stays as it is.

  >>> joined([[1, 5, 5], [1, 6]], [1, 7], start=[1], room=4)
  ([1, 6, 7], 1)
  """
  bare = lambda x: list(x[len(start) :] if list(x[: len(start)]) == [*start]
                        else x)  # fmt: skip
  kept, tokens = 0, bare(last)
  for part in reversed(parts):
    longer = [*bare(part), *tokens]
    if len(start) + len(longer) > room:
      break
    kept, tokens = kept + 1, longer
  return ([*start, *tokens] if kept else list(last)), kept
