"""Functions on batches of any kind: sizes, padding, widths and bounds.

They return counts and masks, or a changed batch.

A batch is one of the kinds in `types` (`Batch`, `Pairs`, `Images`,
`ImagesWithTexts`), a user's own kind with the same four methods, or a pytree
whose leaves are of such kinds. A pytree with other leaves is of an unknown kind
and counts as full. The texts of a batch are the `Batch` nodes in it, at any
depth.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.types import Batch, Bound, Error, Example

_METHODS = ('real', 'places', 'used', 'learned')


def kinds(batches: Any) -> list[Any]:
  """Returns the batches of known kinds in a pytree; [] if it has other leaves.

  >>> kinds({'x': np.ones(2)})
  []
  """
  is_kind = lambda x: all(hasattr(x, name) for name in _METHODS)
  leaves = jax.tree.leaves(batches, is_leaf=is_kind)
  return leaves if all(map(is_kind, leaves)) else []


def texts(batches: Any) -> list[Batch]:
  """Returns the token arrays in a batch, in the order of its fields.

  >>> ones = np.ones((2, 4), np.int32)
  >>> len(texts({'a': Batch(ones, ones > 0, ones, ones), 'b': ones}))
  1
  """
  leaves = jax.tree.leaves(batches, is_leaf=_is_text)
  return list(filter(_is_text, leaves))


def texts_of(example: Any) -> list[Example]:
  """Returns the texts in an example of any kind, in the order of its fields.

  >>> from fedjax_llm.types import Pair
  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> len(texts_of(text)), len(texts_of(Pair(text, text)))
  (1, 2)
  """
  if isinstance(example, Example):
    return [example]
  is_text = lambda x: isinstance(x, Example)
  return list(filter(is_text, jax.tree.leaves(example, is_leaf=is_text)))


def length(example: Any) -> int:
  """Returns the number of tokens of the longest text; 1 if there is no text.

  >>> length(Example(np.arange(3, dtype=np.int32), np.ones(3, bool)))
  3
  """
  return max((len(text.tokens) for text in texts_of(example)), default=1)


def real(batches: Any) -> Any:
  """Returns True for steps that are not all padding; None if unknown.

  The axes of the mask are those before B: [S] of [S, B, ...].

  >>> ones = np.ones((2, 1, 4), np.int32)
  >>> real(Batch(ones, ones > 0, ones * [[[1]], [[0]]], ones)).tolist()
  [True, False]
  """
  masks = [batch.real() for batch in kinds(batches)]
  some = masks[0] if masks else None
  for mask in masks[1:]:
    some = some | mask
  return some


def used(batches: Any) -> Any:
  """Counts the places of each step that are not padding; None if unknown.

  >>> ones = np.ones((2, 1, 4), np.int32)
  >>> used(Batch(ones, ones > 0, ones * [1, 1, 1, 0], ones)).tolist()
  [3, 3]
  """
  counts = [batch.used() for batch in kinds(batches)]
  return sum(counts[1:], start=counts[0]) if counts else None


def learned(batches: Any) -> Any:
  """Counts the terms of the loss in each step; None if unknown.

  >>> ones = np.ones((2, 1, 4), np.int32)
  >>> learned(Batch(ones, ones * [0, 1, 1, 0] > 0, ones, ones)).tolist()
  [2, 2]
  """
  counts = [batch.learned() for batch in kinds(batches)]
  return sum(counts[1:], start=counts[0]) if counts else None


def places(batches: Any) -> int | None:
  """Counts the places of one step, padding included; None if unknown.

  >>> ones = np.ones((2, 1, 4), np.int32)
  >>> places(Batch(ones, ones > 0, ones, ones)), places(ones)
  (4, None)
  """
  counts = [batch.places() for batch in kinds(batches)]
  return sum(counts) if counts else None


def axes(batches: Any) -> tuple[int, int, int]:
  """Returns K, S and the number of places of one step of a cohort's batches.

  In batches of an unknown kind a place is a row.

  >>> ones = np.ones((5, 3, 2, 4), np.int32)
  >>> axes(Batch(ones, ones > 0, ones, ones)), axes(ones)
  ((5, 3, 8), (5, 3, 2))
  """
  shape = np.shape(jax.tree.leaves(batches)[0])
  return shape[0], shape[1], places(batches) or (*shape, 1)[2]


# ------------------------------------------------------------------- widths --


def width(batches: Any) -> int:
  """Returns the number of columns of the widest text; 0 if there is no text.

  >>> ones = np.ones((2, 4), np.int32)
  >>> width(Batch(ones, ones > 0, ones, ones)), width(ones)
  (4, 0)
  """
  return max((text.segments.shape[-1] for text in texts(batches)), default=0)


def narrowed(batches: Any, width: int) -> Any:
  """Returns the batch with its texts cut to `width` columns.

  >>> ones = np.ones((2, 4), np.int32)
  >>> narrowed(Batch(ones, ones > 0, ones, ones), 3).tokens.shape
  (2, 3)
  """
  return _each_array(lambda x: x[..., :width], batches)


def widened(batches: Any, width: int) -> Any:
  """Returns the batch with columns of padding up to `width`, in NumPy.

  >>> ones = np.ones((2, 4), np.int32)
  >>> widened(Batch(ones, ones > 0, ones, ones), 6).segments[0].tolist()
  [1, 1, 1, 1, 0, 0]
  """

  def fill(x):
    missing = width - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])

  return _each_array(fill, batches)


def _each_array(change: Callable[[Any], Any], batches: Any) -> Any:
  """Applies `change` to the arrays [..., B, T] of every text."""

  def text(x):
    if not _is_text(x):
      return x
    along = x.segments.ndim  # a label has no columns
    return jax.tree.map(lambda y: change(y) if y.ndim == along else y, x)

  return jax.tree.map(text, batches, is_leaf=_is_text)


# ------------------------------------------------------------------- bounds --


def bounds(batches: Any) -> tuple[int | None, ...]:
  """Returns the bound of each text: see `bounded`.

  >>> ones = np.ones((2, 4), np.int32)
  >>> bounds(Batch(ones, ones > 0, ones, ones))
  (None,)
  """
  return tuple(text.bound for text in texts(batches))


def most(several: Sequence[Any]) -> tuple[int | None, ...]:
  """Returns the bounds that hold for all of several batches.

  >>> ones = np.ones((2, 4), np.int32)
  >>> batch = Batch(ones, ones > 0, ones, ones)
  >>> most([bounded(batch), bounded(batch, [7])]), most([batch, bounded(batch)])
  ((7,), (None,))
  """
  sides = zip(*map(bounds, several), strict=True)
  return tuple(None if None in side else max(side) for side in sides)


def bounded(batches: Any, sizes: Sequence[int | None] | None = None) -> Any:
  """Returns the batch with a bound on the tokens with a loss in one step.

  A loss computes logits at that many places of [B, T]. Only tokens after the
  first column count: the first has no token before it.

  Args:
    batches: NumPy arrays.
    sizes: a bound for each text of the batch (None: every place); by default
      the largest number in any of its steps.

  Raises:
    Error: a step holds more than its bound, or `sizes` are too few or many.

  >>> ones = np.ones((2, 4), np.int32)
  >>> batch = Batch(ones, ones > 0, ones, ones)
  >>> bounded(batch).bound, bounded(batch, [7]).bound
  (6, 7)
  """
  leaves, structure = jax.tree.flatten(batches, is_leaf=_is_text)
  places = [i for i, leaf in enumerate(leaves) if _is_text(leaf)]
  most = [_targets(leaves[i]) for i in places]
  sizes = most if sizes is None else sizes
  if len(sizes) != len(places):
    raise Error(
      f'there are {len(sizes)} bounds for {len(places)} texts of a batch.'
    )
  for i, number, size in zip(places, most, sizes, strict=True):
    if size is not None and number > size:
      raise Error(
        f'a step holds {number} tokens with a loss, more than the bound of its '
        f'batch, {size}.'
      )
    bound = None if size is None else Bound(size)
    leaves[i] = leaves[i]._replace(bound=bound)
  return jax.tree.unflatten(structure, leaves)


def _targets(text: Batch) -> int:
  mask = np.asarray(text.loss_mask)[..., 1:]
  return int(np.max(np.count_nonzero(mask, (-2, -1)), initial=0))


def _is_text(x: Any) -> bool:
  return isinstance(x, Batch)
