"""Turns examples into arrays: one builder for each kind of batch.

A `Collate` reads all examples of a run once, which determine the fields of the
batch, and returns a function from rows to arrays: `rows` is a list of M rows,
each a list of its examples (none: padding; several: packed texts), and every
array of the returned batch has the first axis M. All calls with the same M
return the same shapes and structure.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_llm import batching
from fedjax_llm.types import (
  Batch,
  Either,
  Eithers,
  Error,
  Example,
  Image,
  Images,
  ImagesWithTexts,
  ImageWithText,
  Pair,
  Pairs,
)

Rows = Sequence[Sequence[Any]]  # [M] rows of examples
# (all examples, width T, pad_id) -> (rows -> batch of [M, ...])
Collate = Callable[[Sequence[Any], int, int], Callable[[Rows], Any]]


def by_kind(
  examples: Sequence[Any], width: int, pad_id: int = 0
) -> Callable[[Rows], Any]:
  """Returns the collating function for the type of the examples.

  `Example`, `Pair`, `Image` and `ImageWithText` are supported.

  Raises:
    Error: examples of different types, or of an unknown type.

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> by_kind([text], 3)([[text], []]).segments.tolist()
  [[1, 1, 0], [0, 0, 0]]
  """
  kinds = {type(example) for example in examples} or {Example}
  known = {Example: texts, Pair: pairs, Image: images}
  known[ImageWithText] = images_with_texts
  kind = kinds.pop()
  if kinds:
    names = ' and '.join(sorted(x.__name__ for x in {kind, *kinds}))
    raise Error(f'examples are of different kinds, {names}; use one a run.')
  if kind not in known:
    names = ', '.join(x.__name__ for x in known)
    raise Error(
      f'examples of the kind {kind.__name__} need a collate of their task; '
      f'without one they are {names}.'
    )
  return known[kind](examples, width, pad_id)


def texts(
  examples: Sequence[Example], width: int, pad_id: int = 0
) -> Callable[[Rows], Batch]:
  """Returns a function from rows of texts to a `Batch` [M, T].

  The batch has labels if the examples have them.

  Raises:
    Error: some examples have a label and some have none.

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> texts([text], 5)([[text, text]]).segments.tolist()
  [[1, 1, 2, 2, 0]]
  """
  have = {example.label is not None for example in examples}
  if len(have) > 1:
    raise Error('some examples have a label and some have none.')
  labels = have == {True}
  types = any(example.types is not None for example in examples)

  def build(rows: Rows) -> Batch:
    shape = (len(rows), width)
    batch = Batch(
      tokens=np.full(shape, pad_id, np.int32),
      loss_mask=np.zeros(shape, bool),
      segments=np.zeros(shape, np.int32),
      positions=np.zeros(shape, np.int32),
      label=np.full(shape[:1], -1, np.int32) if labels else None,
      types=np.zeros(shape, np.int32) if types else None,
    )
    for place, row in enumerate(rows):
      start = 0
      for segment, example in enumerate(row, 1):
        _write(batch, place, start, segment, example)
        start += len(example.tokens)
    return batch

  return build


def pairs(
  examples: Sequence[Pair], width: int, pad_id: int = 0
) -> Callable[[Rows], Pairs]:
  """Returns a function from rows of preferences to `Pairs` of batches [M, T].

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> pair = Pair(text, text, reference_chosen=-0.5)
  >>> pairs([pair], 3)([[pair], []]).reference_chosen.tolist()
  [-0.5, 0.0]
  """
  chosen = texts([pair.chosen for pair in examples], width, pad_id)
  rejected = texts([pair.rejected for pair in examples], width, pad_id)
  others = [pair.mismatched for pair in examples if pair.mismatched is not None]
  mismatched = texts(others, width, pad_id) if others else None

  def build(rows: Rows) -> Pairs:
    of = lambda name: [[getattr(pair, name) for pair in row] for row in rows]
    number = lambda name: _stacked(of(name), np.float32(0))
    if mismatched is None:
      third = (None, None)
    else:
      third = mismatched(of('mismatched')), number('reference_mismatched')
    return Pairs(
      chosen=chosen(of('chosen')),
      rejected=rejected(of('rejected')),
      reference_chosen=number('reference_chosen'),
      reference_rejected=number('reference_rejected'),
      mismatched=third[0],
      reference_mismatched=third[1],
    )

  return build


def images(
  examples: Sequence[Image], width: int = 0, pad_id: int = 0
) -> Callable[[Rows], Images]:
  """Returns a function from rows of pictures to `Images` [M, H, W, C].

  Raises:
    Error: pictures of different shapes.

  >>> picture = Image(np.ones((2, 2, 1), np.float32), label=3)
  >>> batch = images([picture])([[picture], []])
  >>> batch.pixels.shape, batch.label.tolist(), batch.present.tolist()
  ((2, 2, 2, 1), [3, -1], [True, False])
  """
  del width, pad_id  # of texts
  empty = _empty_pixels(examples)

  def build(rows: Rows) -> Images:
    label = lambda image: -1 if image.label is None else image.label
    labels = [[label(image) for image in row] for row in rows]
    return Images(
      pixels=_stacked([[image.pixels for image in row] for row in rows], empty),
      label=_stacked(labels, np.int32(-1)),
      present=np.array([len(row) > 0 for row in rows], bool),
    )

  return build


def images_with_texts(
  examples: Sequence[ImageWithText], width: int, pad_id: int = 0
) -> Callable[[Rows], ImagesWithTexts]:
  """Returns a function from rows of pictures and texts to `ImagesWithTexts`.

  Raises:
    Error: pictures of different shapes.

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> seen = ImageWithText(np.ones((2, 2, 1), np.float32), text)
  >>> batch = images_with_texts([seen], 3)([[seen]])
  >>> batch.pixels.shape, batch.text.tokens.shape
  ((1, 2, 2, 1), (1, 3))
  """
  empty = _empty_pixels(examples)
  text = texts([example.text for example in examples], width, pad_id)

  def build(rows: Rows) -> ImagesWithTexts:
    return ImagesWithTexts(
      pixels=_stacked([[x.pixels for x in row] for row in rows], empty),
      text=text([[x.text for x in row] for row in rows]),
    )

  return build


def either(
  examples: Sequence[Either], width: int, pad_id: int = 0
) -> Callable[[Rows], Eithers]:
  """Returns a function from rows of pictures or texts to `Eithers`.

  Raises:
    Error: pictures of different shapes.

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> seen = Either(np.ones((2, 2, 1), np.float32), None, 3)
  >>> batch = either([seen], 3)([[seen], [Either(None, text, 1)], []])
  >>> batch.pixels.shape, batch.pictured.tolist(), batch.worded().tolist()
  ((3, 2, 2, 1), [True, False, False], [False, True, False])
  """
  shown = [x for x in examples if x.pixels is not None]
  empty = _empty_pixels(shown) if shown else np.zeros((0, 0, 0), np.uint8)
  text = texts([x.text for x in examples if x.text is not None], width, pad_id)

  def build(rows: Rows) -> Eithers:
    having = lambda name: [
      [getattr(x, name) for x in row if getattr(x, name) is not None]
      for row in rows
    ]
    return Eithers(
      pixels=_stacked(having('pixels'), empty),
      pictured=np.array([bool(own) for own in having('pixels')], bool),
      text=text(having('text')),
      label=_stacked(having('label'), np.int32(-1)),
    )

  return build


def check(examples: Sequence[Sequence[Any]], max_length: int) -> None:
  """Checks that the texts of every client's examples fit into T columns.

  Raises:
    Error: a text without tokens or longer than `max_length`, or a loss mask of
      another length.

  >>> text = Example(np.arange(2, dtype=np.int32), np.array([0, 1], bool))
  >>> check([[text]], max_length=2)
  """
  for client, own in enumerate(examples):
    for i, example in enumerate(own):
      for text in batching.texts_of(example):
        length = len(text.tokens)
        if not 1 <= length <= max_length:
          raise Error(
            f'example {i} of client {client} has {length} tokens: at least 1 '
            f'and at most max_length={max_length} are allowed.'
          )
        if len(text.loss_mask) != length:
          raise Error(
            f'example {i} of client {client} has {length} tokens, but a loss '
            f'mask of {len(text.loss_mask)}.'
          )


def _write(
  batch: Batch, row: int, start: int, segment: int, example: Example
) -> None:
  length = len(example.tokens)
  at = (row, slice(start, start + length))
  batch.tokens[at] = example.tokens
  batch.loss_mask[at] = example.loss_mask
  # The first token has no earlier token of its text to be predicted from.
  batch.loss_mask[row, start] = False
  batch.segments[at] = segment
  batch.positions[at] = np.arange(length)
  if batch.label is not None:
    batch.label[row] = example.label
  if batch.types is not None and example.types is not None:
    batch.types[at] = example.types


def _empty_pixels(examples: Sequence[Any]) -> np.ndarray:
  """Returns zeros of the shape that all pictures share."""
  shapes = sorted({np.shape(example.pixels) for example in examples})
  if len(shapes) != 1:
    raise Error(
      'pictures need one shape [H, W, C] for all of a run; there are '
      f'{", ".join(map(str, shapes)) or "none"}.'
    )
  return np.zeros(shapes[0], np.asarray(examples[0].pixels).dtype)


def _stacked(rows: Rows, empty: Any) -> np.ndarray:
  """Stacks the only value of each row, `empty` for rows without: [M, ...]."""
  out = np.broadcast_to(empty, (len(rows), *np.shape(empty))).copy()
  for place, row in enumerate(rows):
    if len(row) > 1:
      raise Error('only texts without labels can be packed into one row.')
    if row:
      out[place] = row[0]
  return out
