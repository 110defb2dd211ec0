"""Stores: the private state of N clients on disk, by client id.

`open` returns a `Store`. It has rows only for clients that have trained.

A client's state is one row of bytes, the leaves of its `ClientState` one after
another, in the files of `journal`. Rows changed since the last commit are in
memory; the rest is read through memory maps, so neither the process nor the
disk grows with N.

A round counts only once its checkpoint is written, after `commit`, so the
store and the server's checkpoint agree on a round. `open` takes the round of
the checkpoint and ignores newer journals. `prune` moves journals into the base
once no kept checkpoint is older, so that the checkpoint before the newest can
be reopened as well.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.clients import disk, journal
from fedjax_llm.types import ClientState, Error


class Store(NamedTuple):
  """The functions of an open store.

  `gather(ids [K]) -> ClientState` of NumPy arrays [K, ...]: the rows scattered
  last, and the template for clients without a row and for padding (-1).
  `scatter(ids [K], valid [K], states)` keeps the rows that are valid and not
  padding.
  `seen()` returns the ids that have a row, ascending.
  `commit(round)` writes the rows changed since the last commit; when it
  returns, the state of this round is on the disk. It raises `Error` on a full
  disk, with the changes still in memory and the last commit intact.
  `prune(oldest_kept_round)` gives up rounds before this one.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   store = open(directory, ClientState(private=np.zeros(2)), at_round=0)
  ...   store.scatter([5], [True], ClientState(private=np.ones((1, 2))))
  ...   store.seen().tolist()
  [5]
  """

  gather: Callable[[Any], ClientState]
  scatter: Callable[[Any, Any, ClientState], None]
  seen: Callable[[], np.ndarray]
  commit: Callable[[int], None]
  prune: Callable[[int], None]


def open(
  directory: str | os.PathLike,
  template: ClientState,
  *,
  at_round: int,
  mine: bool = True,
  read_only: bool = False,
  begins: bool = False,
) -> Store:
  """Opens or creates a store as it was when `at_round` was committed.

  Commits after `at_round` are deleted, unless it is read only. A template
  without any array needs no store: nothing is written, and `seen` stays empty.

  Args:
    directory: of this store alone.
    template: the state of a client without a row, arrays without a client axis.
    at_round: the round of the server's checkpoint; 0 at the start of a run.
    mine: False in a process that leaves the store to another one: it reads and
      writes nothing.
    read_only: nothing on the disk changes, so `commit` and `prune` may not be
      called; `gather` returns the rows that were scattered.
    begins: True: where the folder holds no store, it begins at `at_round` with
      no row (an earlier version of the project kept no state here).

  Raises:
    Error: the store has no such round, is damaged (the file is named), is of
      another template, or cannot be written. From `gather`: a client's row is
      damaged. From `commit` and `prune`: the folder was removed meanwhile.

  >>> import tempfile
  >>> template = ClientState(private={'head': np.zeros(2, np.float32)})
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   store = open(directory, template, at_round=0)
  ...   new = ClientState(private={'head': np.ones((2, 2), np.float32)})
  ...   store.scatter([70_000, -1], [True, False], new)
  ...   store.commit(1)
  ...   store = open(directory, template, at_round=1)
  ...   store.gather([3, 70_000]).private['head'].tolist()
  [[0.0, 0.0], [1.0, 1.0]]
  """
  layout = _layout(template)
  row_bytes, names = layout.num_bytes, layout.describe()
  if not row_bytes or not mine:
    return _stateless(template)
  folder = pathlib.Path(directory)
  base = journal.read_base(
    folder, names, at_round, create=not read_only, begins=begins
  )
  journals = journal.read_chain(folder, base, at_round, row_bytes)
  slots = journal.read_ids(folder, base)  # id -> place in the base
  mapped = journal.map_rows(folder, len(slots), row_bytes)
  sums = journal.map_sums(folder, base)  # of the rows in the base
  checked: set[int] = set()  # clients whose row in the base is intact
  newer = journal.overlay(journals)  # id -> (rows, index), of the last journal
  opened = None
  if not read_only:
    journal.discard(folder, journals)
    opened = disk.place(folder)
  changed: dict[int, np.ndarray] = {}  # id -> row, since the last commit
  default = layout.pack_one(template)
  committed = at_round

  def row(client: int) -> np.ndarray:
    if client in changed:
      return changed[client]
    if client in newer:
      held, index = newer[client]
      return held[index]
    if client in slots:
      kept = mapped[slots[client]]
      if sums is not None and client not in checked:
        journal.check_row(folder, client, kept, sums[slots[client]])
        checked.add(client)
      return kept
    return default

  def gather(ids):
    ids = np.asarray(ids)
    out = np.empty((len(ids), row_bytes), np.uint8)
    for k, client in enumerate(ids.tolist()):
      out[k] = row(client)
    return layout.unpack(out)

  def scatter(ids, valid, states):
    ids = np.asarray(ids)
    take = np.flatnonzero(np.asarray(valid, bool) & (ids >= 0))
    if len(take):
      for client, new in zip(ids[take].tolist(), layout.pack(states, take)):
        changed[client] = new.copy()  # not a view that keeps the cohort alive

  def seen():
    return np.array(sorted({*slots, *newer, *changed}), np.int64)

  def commit(round):
    nonlocal committed, journals, newer
    round = int(round)
    if opened is None:
      raise Error(f'{folder} was opened to be read only: it cannot be written.')
    if round == committed and not changed:
      return
    if round <= committed:
      raise Error(
        f'{folder} is at round {committed} and cannot commit round {round}.'
      )
    disk.check_place(opened, journals)
    path = journal.write(folder, round, committed, changed, row_bytes)
    journals = [*journals, journal.read(path, row_bytes, check=False)]
    newer = journal.overlay(journals)
    changed.clear()
    committed = round

  def prune(oldest_kept_round):
    nonlocal base, slots, journals, newer, mapped, sums
    # A fold that was interrupted has given up its rounds already.
    limit = max(int(oldest_kept_round), base.folding)
    old = [j for j in journals if j.round <= limit]
    if not old or opened is None:
      return
    disk.check_place(opened, journals)
    base, slots = journal.fold(folder, base, slots, old, names, row_bytes)
    mapped = journal.map_rows(folder, len(slots), row_bytes)
    sums = journal.map_sums(folder, base)
    checked.clear()
    journals = journals[len(old) :]
    newer = journal.overlay(journals)
    journal.discard(folder, journals)

  return Store(gather, scatter, seen, commit, prune)


def leaves(template: ClientState) -> list:
  """Returns the leaves of a row as [name, dtype, shape] each.

  >>> leaves(ClientState(private={'head': np.zeros(2, np.float32)}))
  [['private/head', 'float32', [2]]]
  """
  return _layout(template).describe()


def _stateless(template: ClientState) -> Store:
  return Store(
    gather=lambda ids: template,
    scatter=lambda ids, valid, states: None,
    seen=lambda: np.zeros(0, np.int64),
    commit=lambda round: None,
    prune=lambda oldest_kept_round: None,
  )


# -------------------------------------------------------------------- rows --


class _Layout(NamedTuple):
  """The layout of a `ClientState` as one row of bytes."""

  treedef: Any
  leaves: list[tuple[str, np.dtype, tuple[int, ...]]]  # name, dtype, shape
  num_bytes: int

  def describe(self) -> list:
    return [
      [name, str(dtype), list(shape)] for name, dtype, shape in self.leaves
    ]

  def pack(self, states: ClientState, take: Any) -> np.ndarray:
    """Returns the rows `take` of a stack as bytes."""
    parts = []
    for x, (name, dtype, shape) in zip(
      self.treedef.flatten_up_to(states), self.leaves
    ):
      x = np.asarray(x)
      if x.dtype != dtype or x.shape[1:] != shape:
        raise Error(
          f'the client state {name} is {x.dtype}{list(x.shape[1:])} a client, '
          f'but the store holds {dtype}{list(shape)}.'
        )
      parts.append(_bytes(x[take]))
    return np.concatenate(parts, axis=1)

  def pack_one(self, state: ClientState) -> np.ndarray:
    one = jax.tree.map(lambda x: np.asarray(x)[None], state)
    return self.pack(one, slice(None))[0]

  def unpack(self, rows: np.ndarray) -> ClientState:
    leaves, start = [], 0
    for _, dtype, shape in self.leaves:
      size = int(np.prod(shape)) * dtype.itemsize
      part = np.ascontiguousarray(rows[:, start : start + size])
      leaves.append(part.view(dtype).reshape(len(rows), *shape))
      start += size
    return jax.tree.unflatten(self.treedef, leaves)


def _layout(template: ClientState) -> _Layout:
  named, treedef = jax.tree_util.tree_flatten_with_path(template)
  leaves, num_bytes = [], 0
  for path, x in named:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if jax.dtypes.issubdtype(
      getattr(x, 'dtype', np.dtype(float)), jax.dtypes.prng_key
    ):
      raise Error(f'the client state {name} is a key: keep numbers, not keys.')
    x = np.asarray(x)
    leaves.append((name, x.dtype, x.shape))
    num_bytes += x.nbytes
  return _Layout(treedef, leaves, num_bytes)


def _bytes(stack: np.ndarray) -> np.ndarray:
  """Returns a stack [K, ...] as bytes [K, bytes]."""
  if not stack.size:
    return np.zeros((len(stack), 0), np.uint8)
  flat = np.ascontiguousarray(stack).reshape(len(stack), -1)
  return flat.view(np.uint8)
