"""Texts of several runs in arrays of one shape."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.experiment import Tests
from fedjax_llm.types import Cohort


def length(cohort: Cohort) -> int:
  """T, the columns of its rows."""
  return cohort.batches.tokens.shape[-1]


def stacked(cohorts: Sequence[Cohort], num: int, length: int) -> Cohort:
  """Cohorts [U, K, ...] of `num` rows: the last stands for those not there.

  Rows of texts are filled up to `length` with padding, which changes nothing
  but rounding.
  """
  full = [*cohorts, *[cohorts[-1]] * (num - len(cohorts))]

  def wide(cohort: Cohort) -> Cohort:
    missing = length - cohort.batches.tokens.shape[-1]
    along = cohort.batches.tokens.ndim  # a label has no columns
    fill = lambda x: np.pad(x, [(0, 0)] * (along - 1) + [(0, missing)])
    batches = jax.tree.map(
      lambda x: fill(x) if np.ndim(x) == along else x, cohort.batches
    )
    return cohort._replace(batches=batches)

  return jax.tree.map(lambda *xs: np.stack(xs), *map(wide, full))


def alike(tests: Sequence[Tests]) -> list[Tests]:
  """The same texts in groups of the same shapes, so that one program tests.

  Batches of padding, rows of nobody, are added where others have more.

  >>> from fedjax_llm.types import Batch
  >>> def test(num):
  ...   x = np.ones((num, 1, 8), np.int32)
  ...   group = Batch(x, x > 0, x, x), np.zeros((num, 1), np.int32)
  ...   return Tests([group], [], [], max_targets=num + 2)
  >>> found = alike([test(1), test(2)])
  >>> [owners.tolist() for _, owners in found[0].heldout]
  [[[0], [-1]]]
  >>> [x.max_targets for x in found]
  [4, 4]
  """
  most = max(test.max_targets for test in tests)
  filled = {
    kind: _filled([getattr(test, kind) for test in tests])
    for kind in ('heldout', 'new', 'common')
  }
  return [
    Tests(max_targets=most, **{kind: own[i] for kind, own in filled.items()})
    for i in range(len(tests))
  ]


def _filled(several: Sequence[Sequence[Any]]) -> list[list[Any]]:
  by_width = [
    {batch.tokens.shape[-1]: (batch, owner) for batch, owner in groups}
    for groups in several
  ]
  widths = sorted({width for own in by_width for width in own})
  found: list[list[Any]] = [[] for _ in several]
  for width in widths:
    there = [own[width] for own in by_width if width in own]
    depth = max(len(owner) for _, owner in there)
    for i, own in enumerate(by_width):
      if own:  # who has no text at all is not tested
        found[i].append(_deep(own.get(width), there[0], depth))
  return found


def _deep(group: Any, other: Any, depth: int) -> Any:
  """A group of `depth` batches; None has none, of the shapes of another."""
  batch, owner = group or jax.tree.map(lambda x: np.asarray(x)[:0], other)
  fill = lambda x, value: np.concatenate(
    [x, np.full((depth - len(x), *np.shape(x)[1:]), value, x.dtype)]
  )
  return jax.tree.map(lambda x: fill(x, 0), batch), fill(owner, -1)
