"""Examples to arrays: the batches of a round [K, S, B, T], rows for evaluation.

Every shape is the same in every round, so that a round compiles once. A row
never holds texts of two clients, and what a client trains on depends on the
seed, the round and its id, not on who else takes part.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.types import Batch, Cohort, Draw, Error, Example

_ORDER = 201  # purpose of the random stream: the order of a client's examples

Examples = Sequence[Sequence[Example]]  # [N] clients, each any number of texts


def cohorts(
  examples: Examples,
  *,
  num_steps: int,
  batch_size: int,
  max_length: int,
  epochs: int | None = None,
  weight_by: str = 'examples',
  packing: bool = False,
  pad_id: int = 0,
  seed: int = 0,
  profiles: Any = None,
) -> Callable[[Draw, int], Cohort]:
  """How a draw becomes a cohort: `(draw, round) -> Cohort` in NumPy.

  A client's examples form an endless stream of passes, each pass all of them
  once in a new random order. The stream is cut into steps of B rows; a batch
  may hold the end of one pass and the beginning of the next. After `epochs`
  passes (`None`: never) the remaining rows and steps are padding, zero in every
  field.

  Without packing a row is one example. With packing the rows of a step are
  filled first-fit: an example goes to the first row that has room for it
  (segment 1, 2, ..., positions restart), and the first example that fits
  nowhere begins the next step. So a step takes as much of the stream as fits in
  B rows of T tokens, in order, and drops nothing.

  The weight of a client that reports is
    'examples'  n_k, how many training examples it has, used or not (FedAvg,
                arXiv 1602.05629, Alg. 1)
    'tokens'    the number of tokens with a loss in this round's batches
    'uniform'   1
  Padding and clients that drop out are not valid, weigh 0, and their batches
  are zero. Of texts with labels 'tokens' counts the labels; a label of -1 is
  padding.

  Args:
    examples: the training examples of each of N clients.
    num_steps: S, local steps a round.
    batch_size: B, rows a step.
    max_length: T, tokens a row.
    epochs: passes over its examples that a client makes a round at most.
    weight_by: 'examples', 'tokens' or 'uniform'.
    packing: several examples a row.
    pad_id: token on padding.
    seed: of the order.
    profiles: capacities, a pytree of [N, ...], carried to `Cohort.profiles` as
      [K, ...]; a row of padding has client 0's.

  Raises:
    Error: a number below 1, an unknown `weight_by`, a client without an
      example, an example without tokens or longer than `max_length`, some
      examples with labels and some without, labels with packing.

  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> build = cohorts([[text], [text, text]], num_steps=2, batch_size=1,
  ...                 max_length=4, epochs=1)
  >>> cohort = build(Draw(np.array([0, 1, -1]), np.array([1, 1, 0], bool)), 0)
  >>> cohort.batches.tokens.shape, cohort.weight.tolist()
  ((3, 2, 1, 4), [1.0, 2.0, 0.0])
  >>> cohort.batches.loss_mask.sum((1, 2, 3)).tolist()
  [2, 4, 0]
  """
  S, B, T = num_steps, batch_size, max_length
  for name, value in (
    ('num_steps', S), ('batch_size', B), ('max_length', T),
    ('epochs', 1 if epochs is None else epochs),
  ):  # fmt: skip
    _at_least_one(name, value)
  if weight_by not in ('examples', 'tokens', 'uniform'):
    raise Error(
      f'weight_by is {weight_by!r}: it is one of examples, tokens, uniform.'
    )
  _check(examples, T)
  for client, own in enumerate(examples):
    if not own:
      raise Error(f'client {client} has no example to train on.')
  kind = _kind(examples)
  if packing and kind.labels:
    raise Error('packing puts several texts in a row; a row has one label.')

  def fill(batch: Batch, client: int, round: int) -> None:
    """The steps of one client, written into views [S, B, T]."""
    stream = _stream(examples[client], epochs, (seed, _ORDER, round, client))
    if packing:
      _fill_packed(batch, stream)
    else:
      for slot, example in zip(np.ndindex(S, B), stream):
        _write(batch, slot, 0, 1, example)

  def build(draw: Draw, round: int) -> Cohort:
    ids = np.asarray(draw.ids, np.int32)
    if ids.max(initial=-1) >= len(examples):
      raise Error(
        f'client {ids.max()} was drawn from a population of {len(examples)}.'
      )
    valid = np.asarray(draw.reports, bool) & (ids >= 0)
    batches = _empty((len(ids), S, B, T), pad_id, kind)
    weight = np.zeros(len(ids), np.float32)
    for k in np.flatnonzero(valid):
      row = jax.tree.map(lambda x, k=k: x[k], batches)
      fill(row, int(ids[k]), int(round))
      if weight_by == 'examples':
        weight[k] = len(examples[ids[k]])
      elif weight_by == 'tokens':
        learned = row.loss_mask if row.label is None else row.label >= 0
        weight[k] = np.count_nonzero(learned)
      else:
        weight[k] = 1
    held = () if profiles is None else profiles
    return Cohort(
      ids=ids,
      batches=batches,
      weight=weight,
      valid=valid,
      profiles=jax.tree.map(lambda x: np.asarray(x)[np.maximum(ids, 0)], held),
      started=None if draw.started is None else np.asarray(draw.started),
    )

  return build


def by_size(
  draw: Draw, cohort: Cohort, *, num_rows: int = 1
) -> tuple[Draw, Cohort]:
  """The same clients, those with most to compute first.

  Blocks of neighbours are then alike, and end together: a block runs the steps
  and the width of its largest client. Clients are ordered by steps with a text,
  then by their longest row, and dealt out to `num_rows` rows of devices in
  turn, so that all rows have about as much to do. Which client stands where
  changes nothing but rounding.

  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> build = cohorts([[text], [text, text]], num_steps=2, batch_size=1,
  ...                 max_length=4, epochs=1)
  >>> draw = Draw(np.array([0, -1, 1]), np.array([1, 0, 1], bool))
  >>> by_size(draw, build(draw, 0))[0].ids.tolist()
  [1, 0, -1]
  """
  num = len(draw.ids)
  used = np.asarray(cohort.batches.segments) > 0  # [K, S, B, T]
  last = lambda some: np.max(some * (np.arange(some.shape[1]) + 1), axis=1)
  steps, width = last(used.any((2, 3))), last(used.any((1, 2)))
  order = np.lexsort((np.arange(num), -width, -steps))
  each = -(-num // num_rows)
  dealt = np.append(order, np.full(each * num_rows - num, -1))
  dealt = dealt.reshape(each, num_rows).T.ravel()
  dealt = dealt[dealt >= 0]
  place = lambda x: np.asarray(x)[dealt]
  return jax.tree.map(place, draw), jax.tree.map(place, cohort)


def max_targets(
  examples: Examples,
  *,
  batch_size: int,
  max_length: int,
  epochs: int | None = None,
  packing: bool = False,
) -> int:
  """The most tokens with a loss that any step [B, T] of `cohorts` can hold.

  Without packing this is exact: some order reaches it. B rows are the last j
  examples of a pass, whole passes, and the first of another, so with C(i) the
  sum of a client's i largest counts it is the largest, over clients and j, of
  C(j) + q C(n) + C(r) with B - j = q n + r. With packing it is
  B floor(T max c / l), c of the l tokens of an example having a loss: a bound.

  Batches of many clients mixed (`rows`) hold at most as much as one client who
  owns all examples, `[[every example]]`, with `epochs=1`.

  Args and errors as in `cohorts`.

  >>> text = Example(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], bool))
  >>> max_targets([[text]], batch_size=3, max_length=8)
  6
  >>> max_targets([[text]], batch_size=3, max_length=8, epochs=1)
  2
  """
  _at_least_one('batch_size', batch_size)
  _check(examples, max_length)
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


class Rows(NamedTuple):
  """Batches of one width, and whose each row is.

  >>> Rows(batches=None, owners=np.array([[0, 0, -1]])).owners.shape
  (1, 3)
  """

  batches: Batch  # [M, B, T]
  owners: np.ndarray  # [M, B] int32 client ids, -1 on padding


def rows(
  examples: Examples,
  *,
  batch_size: int,
  max_length: int,
  owners: Sequence[int] | np.ndarray | None = None,
  buckets: Sequence[int] = (),
  pad_id: int = 0,
) -> list[Rows]:
  """Every example once, one a row, in batches for evaluation.

  Rows are sorted by length (ties by owner) and grouped by width: a row is as
  wide as the smallest of `buckets` and `max_length` that holds it, so that
  little is computed on padding. There is one group a width in use, narrowest
  first; without buckets, one group.

  Args:
    examples: of each client.
    batch_size: B; the last batch of a group is filled with padding.
    max_length: T of the widest group.
    owners: the id to write for each client; its place by default.
    buckets: widths below `max_length`.
    pad_id: token on padding.

  Raises:
    Error: as `cohorts`, or `owners` of another length than `examples`.

  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> short = Example(text.tokens[:2], text.loss_mask[:2])
  >>> groups = rows([[text], [short, text]], batch_size=2, max_length=4,
  ...               buckets=[2])
  >>> [(group.batches.tokens.shape, group.owners.tolist()) for group in groups]
  [((1, 2, 2), [[1, -1]]), ((1, 2, 4), [[0, 1]])]
  """
  _at_least_one('batch_size', batch_size)
  _check(examples, max_length)
  names = range(len(examples)) if owners is None else owners
  if len(names) != len(examples):
    raise Error(f'{len(names)} owners are given for {len(examples)} clients.')
  widths = sorted({b for b in buckets if 0 < b < max_length} | {max_length})
  grouped: dict[int, list[tuple[int, Example]]] = {w: [] for w in widths}
  pairs = [(o, x) for o, own in zip(names, examples) for x in own]
  for owner, example in sorted(pairs, key=lambda p: len(p[1].tokens)):
    width = next(w for w in widths if len(example.tokens) <= w)
    grouped[width].append((owner, example))
  groups, kind = [], _kind(examples)
  for width, members in grouped.items():
    if not members:
      continue
    num = -(-len(members) // batch_size)
    batches = _empty((num, batch_size, width), pad_id, kind)
    owner = np.full((num, batch_size), -1, np.int32)
    for slot, (name, example) in zip(np.ndindex(num, batch_size), members):
      _write(batches, slot, 0, 1, example)
      owner[slot] = name
    groups.append(Rows(batches, owner))
  return groups


# ------------------------------------------------------------------- parts --


def _stream(
  own: Sequence[Example], epochs: int | None, key: tuple[int, ...]
) -> Iterator[Example]:
  rng = np.random.default_rng(key)
  done = 0
  while epochs is None or done < epochs:
    for i in rng.permutation(len(own)):
      yield own[i]
    done += 1


def _fill_packed(batch: Batch, stream: Iterator[Example]) -> None:
  """First-fit of a stream into the rows [B, T] of one step after another."""
  S, B, T = batch.tokens.shape
  step, used, texts = 0, [0] * B, [0] * B
  for example in stream:
    length = len(example.tokens)
    row = next((b for b in range(B) if used[b] + length <= T), None)
    if row is None:
      step, used, texts, row = step + 1, [0] * B, [0] * B, 0
      if step == S:
        return
    texts[row] += 1
    _write(batch, (step, row), used[row], texts[row], example)
    used[row] += length


def _write(
  batch: Batch,
  slot: tuple[int, ...],
  start: int,
  segment: int,
  example: Example,
) -> None:
  length = len(example.tokens)
  at = (*slot, slice(start, start + length))
  batch.tokens[at] = example.tokens
  batch.loss_mask[at] = example.loss_mask
  # Nothing of its own text stands before the first token.
  batch.loss_mask[(*slot, start)] = False
  batch.segments[at] = segment
  batch.positions[at] = np.arange(length)
  if batch.label is not None:
    batch.label[slot] = example.label
  if batch.types is not None and example.types is not None:
    batch.types[at] = example.types


class _Kind(NamedTuple):
  """Which of the optional fields of `Batch` the examples need."""

  labels: bool
  types: bool


def _kind(examples: Examples) -> _Kind:
  have = {example.label is not None for own in examples for example in own}
  if len(have) > 1:
    raise Error('some examples have a label and some have none.')
  types = any(x.types is not None for own in examples for x in own)
  return _Kind(have == {True}, types)


def _empty(shape: tuple[int, ...], pad_id: int, kind: _Kind) -> Batch:
  return Batch(
    tokens=np.full(shape, pad_id, np.int32),
    loss_mask=np.zeros(shape, bool),
    segments=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    label=np.full(shape[:-1], -1, np.int32) if kind.labels else None,
    types=np.zeros(shape, np.int32) if kind.types else None,
  )


def _at_least_one(name: str, value: int) -> None:
  if value < 1:
    raise Error(f'{name} is {value}: it is a whole number of at least 1.')


def _check(examples: Examples, max_length: int) -> None:
  for client, own in enumerate(examples):
    for i, example in enumerate(own):
      length = len(example.tokens)
      if not 1 <= length <= max_length:
        raise Error(
          f'example {i} of client {client} has {length} tokens: at least 1 and '
          f'at most max_length={max_length} are allowed.'
        )
      if len(example.loss_mask) != length:
        raise Error(
          f'example {i} of client {client} has {length} tokens, but a loss '
          f'mask of {len(example.loss_mask)}.'
        )
