"""Stores whose rows an earlier version of the project wrote in another form.

`open` returns a `Store` with rows of the present form.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm.clients import disk, store
from fedjax_llm.clients.store import Store
from fedjax_llm.types import ClientState


def open(
  directory: str | os.PathLike,
  template: ClientState,
  earlier: ClientState,
  upgrade: Callable[[ClientState], ClientState],
  *,
  at_round: int,
  mine: bool = True,
  read_only: bool = False,
) -> Store:
  """Opens a store of the present form, or of an earlier one.

  A store of the earlier form is written anew at `at_round`, in a folder beside
  it that then takes its place, and is removed only after that: if this is
  interrupted, the next call goes on.
  All rows are in memory meanwhile, and other rounds are given up. A store that
  is read only stays as it is, and its rows are upgraded as they are read.

  Args:
    directory: of this store alone.
    template: the state of a client without a row, in the present form.
    earlier: the same in the earlier form.
    upgrade: states [K, ...] of the earlier form -> states of the present one.
    at_round: the round of the server's checkpoint.
    mine: as in `store.open`.
    read_only: as in `store.open`.

  Raises:
    Error: see `store.open`.

  >>> import tempfile
  >>> old = ClientState(local=np.float32(0))
  >>> new = ClientState(local={'sum': np.float32(0), 'count': np.int32(0)})
  >>> upgrade = lambda states: ClientState(local={
  ...   'sum': states.local, 'count': np.ones(len(states.local), np.int32)})
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   kept = store.open(folder + '/states', old, at_round=0)
  ...   kept.scatter([4], [True], ClientState(local=np.float32([2.5])))
  ...   kept.commit(3)
  ...   kept = open(folder + '/states', new, old, upgrade, at_round=3)
  ...   rows = kept.gather([4, 5]).local
  >>> rows['sum'].tolist(), rows['count'].tolist()
  ([2.5, 0.0], [1, 0])
  """
  folder = pathlib.Path(directory)
  part = folder.with_name(folder.name + '.upgraded')
  old = folder.with_name(folder.name + '.earlier')
  if mine and part.is_dir() and not folder.exists():  # it was interrupted
    if read_only:
      folder = part
    else:
      with disk.writing(folder):
        part.rename(folder)
  options: dict[str, Any] = dict(at_round=at_round, read_only=read_only)
  if not mine or _leaves(folder) != store.leaves(earlier):
    if mine and not read_only and folder.exists():
      shutil.rmtree(old, ignore_errors=True)
    return store.open(folder, template, mine=mine, **options)
  before = store.open(folder, earlier, at_round=at_round, read_only=True)
  if read_only:
    return _viewed(before, template, upgrade, folder / 'none')
  with disk.writing(part):
    shutil.rmtree(part, ignore_errors=True)
    # A commit needs a round after the first.
    start = max(at_round - 1, 0)
    after = store.open(part, template, at_round=start, begins=True)
    ids = before.seen()
    if len(ids):
      after.scatter(ids, np.ones(len(ids), bool), upgrade(before.gather(ids)))
    after.commit(at_round)
    del before
    # Renamed, not removed: a folder that is removed is damaged meanwhile.
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
  return store.open(folder, template, at_round=at_round)


def _leaves(folder: pathlib.Path) -> Any:
  """Returns the leaves of a row as base.json lists them, None without any."""
  try:
    return json.loads((folder / 'base.json').read_text())['leaves']
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None  # `store.open` names the damage


def _viewed(
  before: Store,
  template: ClientState,
  upgrade: Callable[[ClientState], ClientState],
  nowhere: pathlib.Path,
) -> Store:
  """Returns a store in memory that upgrades the rows of another on demand."""
  memory = store.open(nowhere, template, at_round=0, read_only=True)
  waiting = set(before.seen().tolist())

  def gather(ids):
    ids = np.asarray(ids)
    need = [client for client in ids.tolist() if client in waiting]
    if need:
      states = upgrade(before.gather(need))
      memory.scatter(need, np.ones(len(need), bool), states)
      waiting.difference_update(need)
    return memory.gather(ids)

  def scatter(ids, valid, states):
    kept = np.asarray(ids)[np.asarray(valid, bool)]
    waiting.difference_update(kept.tolist())
    memory.scatter(ids, valid, states)

  def seen():
    return np.array(sorted({*waiting, *memory.seen().tolist()}), np.int64)

  return memory._replace(gather=gather, scatter=scatter, seen=seen)
