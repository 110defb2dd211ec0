"""Puts the texts of several runs into arrays of one shape."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import batching
from fedjax_llm.run.experiment import Tests
from fedjax_llm.types import Cohort


def stacked(
  cohorts: Sequence[Cohort],
  num: int,
  length: int,
  bounds: Sequence[int | None],
) -> Cohort:
  """Returns cohorts [U, K, ...] as `num` rows; missing rows repeat the last.

  Rows of texts are padded to `length`, and get the same `bounds`; both change
  results only by rounding.
  """
  full = [*cohorts, *[cohorts[-1]] * (num - len(cohorts))]

  def wide(cohort: Cohort) -> Cohort:
    batches = batching.widened(cohort.batches, length)
    return cohort._replace(batches=batching.bounded(batches, bounds))

  return jax.tree.map(lambda *xs: np.stack(xs), *map(wide, full))


def alike(tests: Sequence[Tests]) -> list[Tests]:
  """Returns the same texts in groups of equal shapes, for one program.

  Batches of padding, without owners, are added where other runs have more.

  >>> from fedjax_llm.types import Batch
  >>> def test(num):
  ...   x = np.ones((num, 1, 8), np.int32)
  ...   batch = batching.bounded(Batch(x, x > 0, x, x), [num + 6])
  ...   return Tests([(batch, np.zeros((num, 1), np.int32))], [], [])
  >>> found = alike([test(1), test(2)])
  >>> [owners.tolist() for _, owners in found[0].heldout]
  [[[0], [-1]]]
  >>> [x.heldout[0][0].bound for x in found]
  [8, 8]
  """
  filled = {
    kind: _filled([getattr(test, kind) for test in tests])
    for kind in ('heldout', 'new', 'common')
  }
  return [
    Tests(**{kind: own[i] for kind, own in filled.items()})
    for i in range(len(tests))
  ]


def _filled(several: Sequence[Sequence[Any]]) -> list[list[Any]]:
  by_width = [
    {batching.width(batch): (batch, owner) for batch, owner in groups}
    for groups in several
  ]
  widths = sorted({width for own in by_width for width in own})
  result: list[list[Any]] = [[] for _ in several]
  for width in widths:
    there = [own[width] for own in by_width if width in own]
    depth = max(len(owner) for _, owner in there)
    bounds = batching.most([batch for batch, _ in there])
    for i, own in enumerate(by_width):
      if own:  # a run without texts is not evaluated
        result[i].append(_deep(own.get(width), there[0], depth, bounds))
  return result


def _deep(
  group: Any, other: Any, depth: int, bounds: Sequence[int | None]
) -> Any:
  """Returns a group padded to `depth` batches; None becomes padding only."""
  batch, owner = group or jax.tree.map(lambda x: np.asarray(x)[:0], other)
  fill = lambda x, value: np.concatenate(
    [x, np.full((depth - len(x), *np.shape(x)[1:]), value, x.dtype)]
  )
  full = jax.tree.map(lambda x: fill(x, 0), batch)
  return batching.bounded(full, bounds), fill(owner, -1)
