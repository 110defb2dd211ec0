"""The files of a store: a base of rows and journals of changes to it.

    base.json            the round that the base is of, how many rows it has,
                         and the leaves of a row
    base.ids, base.rows  which clients, and their rows at that round
    journal_00000012     rows that changed up to round 12 since the journal (or
                         base) before it, which it names, and a checksum

A journal becomes visible by renaming a file that is complete and on the disk.
The base is written only from journals that stay until it is complete. So a
process may be killed at any byte.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.types import Error

_CHECKSUM = 32  # bytes of SHA-256 at the end of a journal

# -------------------------------------------------------------------- base --


class Base(NamedTuple):
  round: int  # the base is complete at this round
  folding: int  # above `round` while journals up to here are being moved in
  num_rows: int


def read_base(
  folder: pathlib.Path, leaves: list, at_round: int, *, create: bool = True
) -> Base:
  """The base of a store, checked against this run; a new one at round 0."""
  path = folder / 'base.json'
  if not path.exists():
    if at_round:
      raise Error(
        f'{folder} holds no client state of round {at_round}: the run cannot '
        'go on without it.'
      )
    base = Base(0, 0, 0)
    if create:
      _write_base(folder, base, leaves)
    return base
  try:
    found = json.loads(path.read_text())
    base = Base(found['round'], found['folding'], found['num_rows'])
    found = found['leaves']
  except (ValueError, KeyError, TypeError):
    raise Error(
      f'{path} is damaged: it is no description of a store.'
    ) from None
  if found != leaves:
    raise Error(
      f'{path} is of client state {found}, but this run keeps '
      f'{leaves}: use another directory.'
    )
  if at_round < base.folding:
    raise Error(
      f'{folder} has given up rounds before {base.folding} and cannot be '
      f'opened at round {at_round}.'
    )
  return base


def _write_base(folder: pathlib.Path, base: Base, leaves: list) -> None:
  path = folder / 'base.json'
  text = json.dumps({**base._asdict(), 'leaves': leaves}, indent=1)
  with _writing(path):
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: file.write(text.encode()))


def read_ids(folder: pathlib.Path, base: Base) -> dict[int, int]:
  """Client id -> slot; a dictionary in the order of the slots."""
  if not base.num_rows:
    return {}
  path = folder / 'base.ids'
  found = path.read_bytes() if path.exists() else b''
  if len(found) < 8 * base.num_rows:
    raise Error(
      f'{path} is damaged: it has {len(found)} bytes for {base.num_rows} ids.'
    )
  ids = np.frombuffer(found, np.int64, count=base.num_rows)
  return {client: slot for slot, client in enumerate(ids.tolist())}


def map_rows(folder: pathlib.Path, num_rows: int, row_bytes: int) -> np.ndarray:
  """The rows of the base, [num_rows, row_bytes], read from the disk on use."""
  if not num_rows:
    return np.zeros((0, row_bytes), np.uint8)
  path = folder / 'base.rows'
  size = path.stat().st_size if path.exists() else 0
  if size < num_rows * row_bytes:
    raise Error(
      f'{path} is damaged: it has {size} bytes, and {num_rows} rows of '
      f'{row_bytes} belong there.'
    )
  return np.memmap(path, np.uint8, mode='r', shape=(num_rows, row_bytes))


def fold(
  folder: pathlib.Path,
  base: Base,
  slots: dict[int, int],
  old: list['Journal'],
  leaves: list,
  row_bytes: int,
) -> tuple[Base, dict[int, int]]:
  """Moves the oldest journals into the base; they may be removed afterwards.

  Until the base is complete, `folding` says so on the disk, and the journals
  hold every row that may be half-written.
  """
  rows = overlay(old)
  grown = dict(slots)
  for client in rows:
    grown.setdefault(client, len(grown))
  placed = sorted((grown[client], *where) for client, where in rows.items())
  ids = np.array(list(grown)[len(slots) :], np.int64)
  last = old[-1].round
  _write_base(folder, base._replace(folding=last), leaves)
  _update(
    folder / 'base.rows',
    ((slot * row_bytes, held[i].data) for slot, held, i in placed),
  )
  _update(folder / 'base.ids', [(8 * len(slots), ids.data)])
  base = Base(round=last, folding=last, num_rows=len(grown))
  _write_base(folder, base, leaves)
  return base, grown


def _update(path: pathlib.Path, parts: Iterable[tuple[int, Any]]) -> None:
  """Writes (offset, bytes) into a file and waits for the disk.

  Written, not mapped: a full disk is then an error and not a bus error.
  """
  with _writing(path):
    path.touch()
    with path.open('r+b') as file:
      for offset, data in parts:
        file.seek(offset)
        file.write(data)
      file.flush()
      os.fsync(file.fileno())


# ---------------------------------------------------------------- journals --


class Journal(NamedTuple):
  round: int
  previous: int  # the commit or base that it changes
  path: pathlib.Path
  ids: np.ndarray  # [n] int64
  rows: np.ndarray  # [n, bytes] uint8, mapped


def write(
  folder: pathlib.Path,
  round: int,
  previous: int,
  changed: Mapping[int, np.ndarray],
  row_bytes: int,
) -> pathlib.Path:
  """A journal of rows by client id, there and safe when this returns."""
  ids = sorted(changed)
  head = {'round': round, 'previous': previous, 'num_rows': len(ids)}
  parts = [
    (json.dumps({**head, 'row_bytes': row_bytes}) + '\n').encode(),
    np.array(ids, np.int64).data,
    *(changed[client].data for client in ids),
  ]

  def content(file):
    checksum = hashlib.sha256()
    for part in parts:
      checksum.update(part)
      file.write(part)
    file.write(checksum.digest())

  path = folder / f'journal_{round:08d}'
  with _writing(path):
    _replace(path, content)
  return path


def read(path: pathlib.Path, row_bytes: int, check: bool = True) -> Journal:
  """An intact journal; Error names the file and what is wrong with it."""
  try:
    with path.open('rb') as file:
      line = file.readline(4096)
      head = json.loads(line)
      if head['row_bytes'] != row_bytes:
        raise ValueError('its rows have another size')
      num = head['num_rows']
      size = len(line) + num * (8 + row_bytes) + _CHECKSUM
      if path.stat().st_size != size:
        raise ValueError(f'{path.stat().st_size} bytes instead of {size}')
      if check and not _intact(file, size - _CHECKSUM):
        raise ValueError('its checksum does not fit')
      file.seek(len(line))
      ids = np.frombuffer(file.read(8 * num), np.int64)
  except FileNotFoundError:
    raise Error(f'{path} is missing.') from None
  except (ValueError, KeyError, TypeError) as e:
    raise Error(f'{path} is damaged: {e}.') from None
  rows = np.zeros((0, row_bytes), np.uint8)
  if num:
    start = len(line) + 8 * num
    shape = (num, row_bytes)
    rows = np.memmap(path, np.uint8, mode='r', offset=start, shape=shape)
  return Journal(head['round'], head['previous'], path, ids, rows)


def _intact(file: io.BufferedReader, size: int) -> bool:
  file.seek(0)
  checksum = hashlib.sha256()
  while size:
    part = file.read(min(size, 1 << 20))
    checksum.update(part)
    size -= len(part)
  return file.read() == checksum.digest()


def read_chain(
  folder: pathlib.Path, base: Base, at_round: int, row_bytes: int
) -> list[Journal]:
  """The journals that lead from the base to `at_round`, oldest first."""
  chain, round = [], at_round
  while round > base.round:
    path = folder / f'journal_{round:08d}'
    found = read(path, row_bytes)
    if found.round != round or not base.round <= found.previous < round:
      raise Error(
        f'{path} is damaged: it leads from round {found.previous} to '
        f'{found.round}.'
      )
    chain.append(found)
    round = found.previous
  return chain[::-1]


def overlay(journals: list[Journal]) -> dict[int, tuple[np.ndarray, int]]:
  """Where each client's last row is: client id -> (rows, index)."""
  return {
    client: (journal.rows, i)
    for journal in journals
    for i, client in enumerate(journal.ids.tolist())
  }


def discard(folder: pathlib.Path, keep: list[Journal]) -> None:
  """Removes what was never committed, was undone, or is in the base."""
  kept = {journal.path for journal in keep}
  # Newest first: what is left if this is interrupted is still a chain.
  for path in sorted(folder.glob('journal_*'), reverse=True):
    if path not in kept:
      path.unlink()
  (folder / 'base.json.part').unlink(missing_ok=True)


# -------------------------------------------------------------------- disk --


def _replace(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
  """A new content for a file, all of it or nothing, safe on the disk."""
  part = path.with_name(path.name + '.part')
  try:
    with part.open('wb') as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except OSError:
    part.unlink(missing_ok=True)
    raise
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Tells an error of the disk in a sentence."""
  try:
    yield
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise Error(f'{path} cannot be written: the disk is full.') from e
    raise Error(f'{path} cannot be written: {e.strerror or e}.') from e
