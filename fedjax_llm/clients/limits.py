"""Bounds the tokens with a loss in a step: `max_targets`, `bounds`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm import batching
from fedjax_llm.data import collate as collates
from fedjax_llm.types import Error

Examples = Sequence[Sequence[Any]]  # [N] clients, each any number of examples


def max_targets(
  examples: Examples,
  *,
  batch_size: int,
  max_length: int,
  epochs: int | None = None,
  packing: bool = False,
) -> int:
  """Returns the most tokens with a loss in any step [B, T] of `cohorts`.

  Without packing this is exact: some order reaches it. B rows are the last j
  examples of a pass, whole passes, and the first of another, so with C(i) the
  sum of a client's i largest counts it is the largest, over clients and j, of
  C(j) + q C(n) + C(r) with B - j = q n + r. With packing it is
  B floor(T max c / l), c of the l tokens of an example having a loss: a bound.

  A batch that mixes clients (`rows`) holds at most as many as a batch of one
  client with all examples, `[[every example]]`, with `epochs=1`.

  Args and errors as in `cohorts`.

  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], bool))
  >>> max_targets([[text]], batch_size=3, max_length=8)
  6
  >>> max_targets([[text]], batch_size=3, max_length=8, epochs=1)
  2
  """
  at_least_one('batch_size', batch_size)
  collates.check(examples, max_length)
  B, T = batch_size, max_length
  largest = 0
  for own in examples:
    if not own:
      continue
    count = np.array([np.count_nonzero(x.loss_mask[1:]) for x in own])
    if packing:
      length = np.array([len(x.tokens) for x in own])
      largest = max(largest, B * int(np.max(T * count // length)))
      continue
    n = len(own)
    top = np.concatenate([[0], np.cumsum(np.sort(count)[::-1])])
    if epochs == 1:
      largest = max(largest, int(top[min(B, n)]))
      continue
    j = np.arange(min(B, n) + 1)
    q, r = np.divmod(B - j, n)
    largest = max(largest, int(np.max(top[j] + q * top[n] + top[r])))
  return largest


def bounds(examples: Examples, **sizes: Any) -> tuple[int | None, ...]:
  """Returns `max_targets` for each text of an example, of a pair for two.

  None where no token is learned, as in texts that are classified. Examples
  without any text count nothing.

  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], bool))
  >>> bounds([[text]], batch_size=3, max_length=8)
  (6,)
  """
  texts = [[batching.texts_of(example) for example in own] for own in examples]
  texts = [[some for some in own if some] for own in texts]
  texts = [own for own in texts if own]
  numbers = {len(some) for own in texts for some in own}
  if not numbers:
    return ()
  if len(numbers) != 1:
    raise Error(
      'the examples of a run hold the same number of texts each, not '
      f'{", ".join(map(str, sorted(numbers)))}.'
    )
  sides = range(numbers.pop())
  limits = (
    max_targets([[some[i] for some in own] for own in texts], **sizes)
    for i in sides
  )
  return tuple(number or None for number in limits)


def at_least_one(name: str, value: int) -> None:
  """Raises an `Error` for a number below one."""
  if value < 1:
    raise Error(f'{name} is {value}: it is a whole number of at least 1.')
