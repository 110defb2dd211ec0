"""Texts of several runs in arrays of one shape."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import batching
from fedjax_llm.experiment import Tests
from fedjax_llm.types import Cohort


def stacked(
  cohorts: Sequence[Cohort],
  num: int,
  length: int,
  bounds: Sequence[int | None],
) -> Cohort:
  """Cohorts [U, K, ...] of `num` rows: the last stands for those not there.

  Rows of texts are filled up to `length` with padding, and get the same
  `bounds`; both change nothing but rounding.
  """
  full = [*cohorts, *[cohorts[-1]] * (num - len(cohorts))]

  def wide(cohort: Cohort) -> Cohort:
    batches = batching.widened(cohort.batches, length)
    return cohort._replace(batches=batching.bounded(batches, bounds))

  return jax.tree.map(lambda *xs: np.stack(xs), *map(wide, full))


def alike(tests: Sequence[Tests]) -> list[Tests]:
  """The same texts in groups of the same shapes, so that one program tests.

  Batches of padding, rows of nobody, are added where others have more.

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
  found: list[list[Any]] = [[] for _ in several]
  for width in widths:
    there = [own[width] for own in by_width if width in own]
    depth = max(len(owner) for _, owner in there)
    bounds = batching.most([batch for batch, _ in there])
    for i, own in enumerate(by_width):
      if own:  # who has no text at all is not tested
        found[i].append(_deep(own.get(width), there[0], depth, bounds))
  return found


def _deep(
  group: Any, other: Any, depth: int, bounds: Sequence[int | None]
) -> Any:
  """A group of `depth` batches; None has none, of the shapes of another."""
  batch, owner = group or jax.tree.map(lambda x: np.asarray(x)[:0], other)
  fill = lambda x, value: np.concatenate(
    [x, np.full((depth - len(x), *np.shape(x)[1:]), value, x.dtype)]
  )
  full = jax.tree.map(lambda x: fill(x, 0), batch)
  return batching.bounded(full, bounds), fill(owner, -1)
