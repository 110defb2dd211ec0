"""Cohorts: arrays of examples for training rounds and for evaluation.

`cohorts` returns a function from a draw to the batches of a round, [K, S, B,
T]; `rows` returns batches for evaluation.

Every shape is the same in every round, so that a round compiles once. A row
never holds texts of two clients, and a client's batches depend on the seed,
the round and its id, not on the other clients that take part.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import batching
from fedjax_llm.clients.limits import Examples, at_least_one
from fedjax_llm.clients.limits import bounds as bounds
from fedjax_llm.clients.limits import max_targets as max_targets
from fedjax_llm.data import collate as collates
from fedjax_llm.types import Cohort, Draw, Error, Example

# Purposes of random streams: the order of a client's examples, their samples.
_ORDER, _DRAWN = 201, 202


def cohorts(
  examples: Examples,
  *,
  num_steps: int,
  batch_size: int,
  max_length: int,
  epochs: int | None = None,
  weight_by: str = 'examples',
  packing: bool = False,
  rate: float | None = None,
  pad_id: int = 0,
  seed: int = 0,
  profiles: Any = None,
  collate: collates.Collate = collates.by_kind,
  length: Callable[[Any], int] = batching.length,
  orders: Any = None,
  mixed: bool = False,
  sizes: Callable[[int, int], int] | None = None,
) -> Callable[[Draw, int], Cohort]:
  """Returns a function `(draw, round) -> Cohort` of NumPy arrays.

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

  With a rate, a step holds each example of the client on its own with that
  probability, and a step that would hold more than B examples holds none: the
  samples that example-level privacy counts.

  The weight of a client that reports is
    'examples'  n_k, the number of its training examples, used or not (FedAvg,
                arXiv 1602.05629, Alg. 1)
    'tokens'    the number of tokens with a loss in this round's batches
    'uniform'   1
  Padding and clients that drop out are not valid, weigh 0, and their batches
  are zero. 'tokens' counts what the batch's kind returns from `learned`: labels
  of texts with labels and of images (-1 is padding), pairs of pairs.

  Args:
    examples: the training examples of each of N clients.
    num_steps: S, local steps a round.
    batch_size: B, rows a step.
    max_length: T, tokens a row.
    epochs: passes over its examples that a client makes a round at most.
    weight_by: 'examples', 'tokens' or 'uniform'.
    packing: several examples a row.
    rate: the probability of an example in a step; None: passes.
    pad_id: token on padding.
    seed: of the order.
    profiles: capacities, a pytree of [N, ...], carried to `Cohort.profiles` as
      [K, ...]; a row of padding has client 0's.
    collate: rows of examples to arrays, the task's.
    length: `(example) -> int`, its tokens in a packed row, the task's.
    orders: the examples of each pass (`data.selection`); by default all of
      them, in a random order.
    mixed: a step may hold any of the client's rows, as rows are chosen later.
    sizes: `(client, round) -> int`, n_k of a round; None: of all examples.

  Raises:
    Error: a number below 1, an unknown `weight_by`, a client without an
      example, an example without tokens or longer than `max_length`, some
      examples with labels and some without, packing of other examples than
      texts without labels.

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
    at_least_one(name, value)
  if weight_by not in ('examples', 'tokens', 'uniform'):
    raise Error(
      f'weight_by is {weight_by!r}: it is one of examples, tokens, uniform.'
    )
  if rate is not None and not 0 < rate <= 1:
    raise Error(
      f'example_rate is {rate}: it is a probability above 0 and at most 1.'
    )
  if rate is not None and (packing or epochs is not None):
    raise Error(
      'privacy draws each example of a step on its own: leave cohort.packing '
      'and cohort.epochs out.'
    )
  collates.check(examples, T)
  for client, own in enumerate(examples):
    if not own:
      raise Error(f'client {client} has no example to train on.')
  everything = [example for own in examples for example in own]
  assemble = collate(everything, T, pad_id)
  if packing and not all(map(_may_be_packed, everything)):
    raise Error('packing puts several texts in a row; a row has one label.')
  limits = bounds(
    # An example that comes alone fills a step with copies of itself.
    [[one] for one in everything] if orders or mixed else examples,
    batch_size=B,
    max_length=T,
    epochs=None if orders or mixed else epochs,
    packing=packing,
  )

  def fill(client: int, round: int) -> list[list[Any]]:
    """Returns the rows of one client, [S * B]."""
    if rate is not None:
      key = (seed, _DRAWN, round, client)
      return _sampled(examples[client], rate, S, B, key)
    rng = np.random.default_rng((seed, _ORDER, round, client))
    passes = None if orders is None else orders.passes(client, round, rng)
    stream = _stream(examples[client], epochs, rng, passes)
    if packing:
      return _packed(stream, (S, B, T), length)
    rows = [[example] for example in itertools.islice(stream, S * B)]
    return rows + [[] for _ in range(S * B - len(rows))]

  def build(draw: Draw, round: int) -> Cohort:
    ids = np.asarray(draw.ids, np.int32)
    if ids.max(initial=-1) >= len(examples):
      raise Error(
        f'client {ids.max()} was drawn from a population of {len(examples)}.'
      )
    valid = np.asarray(draw.reports, bool) & (ids >= 0)
    rows: list[list[Any]] = []
    for k, client in enumerate(ids):
      mine = fill(int(client), int(round)) if valid[k] else [[]] * (S * B)
      if draw.steps is not None:  # the rest is padding
        mine[int(draw.steps[k]) * B :] = (
          [[]] * max(S - int(draw.steps[k]), 0) * B
        )
      rows += mine
    batches = jax.tree.map(
      lambda x: x.reshape(len(ids), S, B, *x.shape[1:]), assemble(rows)
    )
    batches = _bounded(batches, limits)
    weight = np.zeros(len(ids), np.float32)
    if weight_by == 'examples':
      size = sizes or (lambda client, round: len(examples[client]))
      weight[valid] = [size(int(i), int(round)) for i in ids[valid]]
    elif weight_by == 'tokens':
      weight[valid] = _learned(batches)[valid]
    else:
      weight[valid] = 1
    held = () if profiles is None else profiles
    own = jax.tree.map(lambda x: np.asarray(x)[np.maximum(ids, 0)], held)
    named = isinstance(held, dict) or not jax.tree.leaves(held)
    if draw.tier is not None and named:
      own = {**(own or {}), 'tier': np.asarray(draw.tier, np.int32)}
    return Cohort(
      ids=ids,
      batches=batches,
      weight=weight,
      valid=valid,
      profiles=own,
      started=None if draw.started is None else np.asarray(draw.started),
    )

  return build


def by_size(
  draw: Draw, cohort: Cohort, *, num_rows: int = 1
) -> tuple[Draw, Cohort]:
  """Returns the same draw and cohort, clients with the most work first.

  Clients of one block then have about the same work: a block runs the steps and
  the width of its largest client. Clients are ordered by steps that are not
  padding, then by their longest row, and dealt out to `num_rows` rows of
  devices in turn, so that all rows have about the same work. The order of the
  clients changes nothing but rounding.

  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> build = cohorts([[text], [text, text]], num_steps=2, batch_size=1,
  ...                 max_length=4, epochs=1)
  >>> draw = Draw(np.array([0, -1, 1]), np.array([1, 0, 1], bool))
  >>> by_size(draw, build(draw, 0))[0].ids.tolist()
  [1, 0, -1]
  """
  num = len(draw.ids)
  last = lambda some: np.max(some * (np.arange(some.shape[1]) + 1), axis=1)
  real = batching.real(cohort.batches)  # [K, S]
  steps = np.zeros(num) if real is None else last(np.asarray(real))
  width = np.zeros(num)
  for text in batching.texts(cohort.batches):
    there = np.asarray(text.segments) > 0  # [K, S, B, T]
    width = np.maximum(width, last(there.any((1, 2))))
  order = np.lexsort((np.arange(num), -width, -steps))
  each = -(-num // num_rows)
  dealt = np.append(order, np.full(each * num_rows - num, -1))
  dealt = dealt.reshape(each, num_rows).T.ravel()
  dealt = dealt[dealt >= 0]
  place = lambda x: np.asarray(x)[dealt]
  return jax.tree.map(place, draw), jax.tree.map(place, cohort)


class Rows(NamedTuple):
  """Batches of one width, and the client of each row.

  >>> Rows(batches=None, owners=np.array([[0, 0, -1]])).owners.shape
  (1, 3)
  """

  batches: Any  # Batch [M, B, T], or another kind
  owners: np.ndarray  # [M, B] int32 client ids, -1 on padding


def rows(
  examples: Examples,
  *,
  batch_size: int,
  max_length: int,
  owners: Sequence[int] | np.ndarray | None = None,
  buckets: Sequence[int] = (),
  pad_id: int = 0,
  collate: collates.Collate = collates.by_kind,
  length: Callable[[Any], int] = batching.length,
  limits: Sequence[int | None] | None = None,
) -> list[Rows]:
  """Returns every example once, one a row, in batches for evaluation.

  Rows are sorted by length (ties by owner) and grouped by width: a row is as
  wide as the smallest of `buckets` and `max_length` that holds it, to save
  computation on padding. There is one group for each width in use, narrowest
  first; without buckets, one group.

  Args:
    examples: of each client.
    batch_size: B; the last batch of a group is filled with padding.
    max_length: T of the widest group.
    owners: the id to write for each client; its place by default.
    buckets: widths below `max_length`.
    pad_id: token on padding.
    collate: rows of examples to arrays, the task's.
    length: `(example) -> int`, its tokens, the task's.
    limits: the bound of each text of a batch (`bounds`); by default none.

  Raises:
    Error: as `cohorts`, a batch above its bound, or `owners` of another length
      than `examples`.

  >>> text = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  >>> short = Example(text.tokens[:2], text.loss_mask[:2])
  >>> groups = rows([[text], [short, text]], batch_size=2, max_length=4,
  ...               buckets=[2])
  >>> [(group.batches.tokens.shape, group.owners.tolist()) for group in groups]
  [((1, 2, 2), [[1, -1]]), ((1, 2, 4), [[0, 1]])]
  """
  at_least_one('batch_size', batch_size)
  collates.check(examples, max_length)
  names = range(len(examples)) if owners is None else owners
  if len(names) != len(examples):
    raise Error(f'there are {len(names)} owners for {len(examples)} clients.')
  widths = sorted({b for b in buckets if 0 < b < max_length} | {max_length})
  grouped: dict[int, list[tuple[int, Any]]] = {w: [] for w in widths}
  pairs = [(o, x) for o, own in zip(names, examples) for x in own]
  for owner, example in sorted(pairs, key=lambda p: length(p[1])):
    width = next(w for w in widths if length(example) <= w)
    grouped[width].append((owner, example))
  groups, everything = [], [example for _, example in pairs]
  for width, members in grouped.items():
    if not members:
      continue
    num = -(-len(members) // batch_size)
    missing = num * batch_size - len(members)
    filled = [[example] for _, example in members] + [[]] * missing
    batches = jax.tree.map(
      lambda x, num=num: x.reshape(num, batch_size, *x.shape[1:]),
      collate(everything, width, pad_id)(filled),
    )
    if limits is not None:
      batches = _bounded(batches, limits)
    owner = np.full(num * batch_size, -1, np.int32)
    owner[: len(members)] = [name for name, _ in members]
    groups.append(Rows(batches, owner.reshape(num, batch_size)))
  return groups


# ------------------------------------------------------------------- parts --


def _stream(
  own: Sequence[Any],
  epochs: int | None,
  rng: np.random.Generator,
  passes: Iterator[np.ndarray] | None = None,
) -> Iterator[Any]:
  done = 0
  while epochs is None or done < epochs:
    for i in rng.permutation(len(own)) if passes is None else next(passes):
      yield own[i]
    done += 1


def _sampled(
  own: Sequence[Any], rate: float, S: int, B: int, key: tuple[int, ...]
) -> list[list[Any]]:
  """Returns rows [S * B]: Poisson samples, empty ones in place of too large."""
  rng = np.random.default_rng(key)
  rows: list[list[Any]] = []
  for _ in range(S):
    drawn = np.flatnonzero(rng.random(len(own)) < rate)
    if len(drawn) > B:
      drawn = drawn[:0]
    rows += [[own[int(i)]] for i in drawn] + [[]] * (B - len(drawn))
  return rows


def _packed(
  stream: Iterator[Any],
  shape: tuple[int, int, int],
  length: Callable[[Any], int],
) -> list[list[Any]]:
  """Returns rows [S * B]: a stream packed first-fit into one step at a time."""
  S, B, T = shape
  rows: list[list[Any]] = [[] for _ in range(S * B)]
  step, used = 0, [0] * B
  for example in stream:
    size = length(example)
    row = next((b for b in range(B) if used[b] + size <= T), None)
    if row is None:
      step, used, row = step + 1, [0] * B, 0
      if step == S:
        break
    rows[step * B + row].append(example)
    used[row] += size
  return rows


def _bounded(batches: Any, limits: Sequence[int | None]) -> Any:
  """Returns batches with bounds if they hold as many texts as the limits."""
  if len(batching.texts(batches)) != len(limits):
    return batches
  return batching.bounded(batches, limits)


def _may_be_packed(example: Any) -> bool:
  return isinstance(example, Example) and example.label is None


def _learned(batches: Any) -> np.ndarray:
  """Returns the number of terms of each client's loss, [K]."""
  terms = batching.learned(batches)
  if terms is None:
    raise Error(
      "cohort.weight_by='tokens': this kind of batch does not "
      "count its terms of the loss; choose 'examples' or 'uniform'."
    )
  return np.asarray(terms).sum(-1)
