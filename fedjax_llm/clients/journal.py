"""The files of a store: a base of rows, and journals of changes to the rows.

The functions read, write and check these files; `store` uses them.

    base.json            the base's round, its number of rows, the leaves of a
                         row, and checksums of itself and of base.ids
    base.ids, base.rows  the clients' ids, and their rows at that round
    base.sums            a checksum of each of these rows and its client's id
    journal_00000012     rows that changed up to round 12 since the journal (or
                         base) before it, the round of that one, and a checksum

A journal becomes visible by renaming a file that is complete and on the disk.
The base is written only from journals that stay until it is complete. So the
files stay usable if a process is killed at any byte.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.clients import disk
from fedjax_llm.types import Error

_CHECKSUM = 32  # bytes of SHA-256 at the end of a journal
_ROW_SUM = 16  # bytes of BLAKE2b of a row
_ADVICE = 'take the folder back from a copy, or begin in another workdir'

# -------------------------------------------------------------------- base --


class Base(NamedTuple):
  """The content of base.json: the base's round, size and checksum."""

  round: int  # the base is complete at this round
  folding: int  # above `round` while journals up to here are being moved in
  num_rows: int
  ids_sha256: str | None = None  # of the rows' ids; None: of an older format

  @property
  def summed(self) -> bool:
    """Returns True if every row has a checksum in base.sums."""
    return self.ids_sha256 is not None


def read_base(
  folder: pathlib.Path,
  leaves: list,
  at_round: int,
  *,
  create: bool = True,
  begins: bool = False,
) -> Base:
  """Returns a store's base, checked against this run; a new one at round 0.

  With `begins` a new one is made at any round.

  Raises:
    Error: base.json is damaged, missing after round 0, of other leaves, or its
      base is newer than `at_round`.
  """
  path = folder / 'base.json'
  if not path.exists():
    if at_round and not begins:
      raise Error(
        f'{folder} holds no client state of round {at_round}: the run cannot '
        'continue without it.'
      )
    base = Base(at_round, at_round, 0, _ids_sum(b''))
    if create:
      with disk.writing(path):
        folder.mkdir(parents=True, exist_ok=True)
      _write_base(folder, base, leaves)
    return base
  try:
    content = json.loads(path.read_text())
    sha256 = content.pop('sha256', None)
    if sha256 is not None and sha256 != _content_sum(content):
      raise ValueError
    stored = content.pop('leaves')
    base = Base(**content)
    numbers = (base.round, base.folding, base.num_rows)
    if any(type(x) is not int or x < 0 for x in numbers):
      raise ValueError
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise Error(f'{path} is damaged: it does not describe a store.') from None
  if stored != leaves:
    raise Error(
      f'{path} is of client state {stored}, but this run keeps '
      f'{leaves}: use another directory.'
    )
  if at_round < base.folding:
    raise Error(
      f'{folder} has given up rounds before {base.folding} and cannot be '
      f'opened at round {at_round}.'
    )
  return base


def _content_sum(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _ids_sum(ids: bytes) -> str:
  return hashlib.sha256(ids).hexdigest()


def _write_base(folder: pathlib.Path, base: Base, leaves: list) -> None:
  path = folder / 'base.json'
  content = {**base._asdict(), 'leaves': leaves}
  content['sha256'] = _content_sum(content)
  text = json.dumps(content, indent=1)
  with disk.writing(path):
    disk.replace(path, lambda file: file.write(text.encode()))


def read_ids(folder: pathlib.Path, base: Base) -> dict[int, int]:
  """Returns client id -> slot, a dictionary in the order of the slots."""
  if not base.num_rows:
    return {}
  path = folder / 'base.ids'
  content = path.read_bytes() if path.exists() else b''
  if len(content) < 8 * base.num_rows:
    raise Error(
      f'{path} is damaged: it has {len(content)} bytes for {base.num_rows} ids.'
    )
  ids = np.frombuffer(content, np.int64, count=base.num_rows)
  slots = {client: slot for slot, client in enumerate(ids.tolist())}
  intact = min(slots) >= 0 and len(slots) == base.num_rows
  if base.summed:
    intact = base.ids_sha256 == _ids_sum(ids.tobytes())
  if not intact:
    raise Error(f'{path} is damaged: its checksum does not fit; {_ADVICE}.')
  return slots


def map_rows(folder: pathlib.Path, num_rows: int, row_bytes: int) -> np.ndarray:
  """Returns the base's rows, [num_rows, row_bytes], as a memory map."""
  return _mapped(folder / 'base.rows', num_rows, row_bytes)


def map_sums(folder: pathlib.Path, base: Base) -> np.ndarray | None:
  """Returns the rows' checksums, [num_rows, 16]; None in an older format."""
  if not base.summed:
    return None
  return _mapped(folder / 'base.sums', base.num_rows, _ROW_SUM)


def _mapped(path: pathlib.Path, num_rows: int, row_bytes: int) -> np.ndarray:
  if not num_rows:
    return np.zeros((0, row_bytes), np.uint8)
  size = path.stat().st_size if path.exists() else 0
  if size < num_rows * row_bytes:
    raise Error(
      f'{path} is damaged: it has {size} bytes, but must hold {num_rows} rows '
      f'of {row_bytes} bytes.'
    )
  return np.memmap(path, np.uint8, mode='r', shape=(num_rows, row_bytes))


def row_sum(client: int, row: np.ndarray) -> bytes:
  """Returns the checksum of a client's row [bytes]."""
  checksum = hashlib.blake2b(digest_size=_ROW_SUM)
  checksum.update(client.to_bytes(8, 'little', signed=True))
  checksum.update(np.ascontiguousarray(row).data)
  return checksum.digest()


def check_row(
  folder: pathlib.Path, client: int, row: np.ndarray, expected: np.ndarray
) -> None:
  """Raises `Error` if a row of the base does not match its checksum."""
  if row_sum(client, row) != expected.tobytes():
    raise Error(
      f'{folder / "base.rows"} is damaged: the checksum of client {client} '
      f'does not fit; {_ADVICE}.'
    )


def fold(
  folder: pathlib.Path,
  base: Base,
  slots: dict[int, int],
  old: list['Journal'],
  leaves: list,
  row_bytes: int,
) -> tuple[Base, dict[int, int]]:
  """Moves the oldest journals into the base; they may be removed afterwards.

  Until the base is complete, base.json holds `folding` above its round, and the
  journals hold every row that may be half-written.

  Returns:
    The new base, and its client id -> slot.
  """
  if base.num_rows and not base.summed:
    _add_sums(folder, base, slots, row_bytes)
  rows = overlay(old)
  grown = dict(slots)
  for client in rows:
    grown.setdefault(client, len(grown))
  placed = sorted((grown[client], *where) for client, where in rows.items())
  ids = np.array(list(grown)[len(slots) :], np.int64)
  last = old[-1].round
  for name, size in (('rows', row_bytes), ('ids', 8), ('sums', _ROW_SUM)):
    path = folder / f'base.{name}'
    # A file that was removed meanwhile must not be created again with holes.
    if base.num_rows:
      _mapped(path, base.num_rows, size)
  before = _ids_sum(np.array(list(slots), np.int64).tobytes())
  base = base._replace(ids_sha256=before)
  _write_base(folder, base._replace(folding=last), leaves)
  _update(
    folder / 'base.rows',
    ((slot * row_bytes, held[i].data) for slot, held, i in placed),
  )
  _update(
    folder / 'base.sums',
    (
      (grown[client] * _ROW_SUM, row_sum(client, held[i]))
      for client, (held, i) in rows.items()
    ),
  )
  _update(folder / 'base.ids', [(8 * len(slots), ids.data)])
  sha256 = _ids_sum(np.array(list(grown), np.int64).tobytes())
  base = Base(last, last, len(grown), sha256)
  _write_base(folder, base, leaves)
  return base, grown


def _add_sums(
  folder: pathlib.Path, base: Base, slots: dict[int, int], row_bytes: int
) -> None:
  """Writes the checksums that a store of an older format lacks."""
  held = map_rows(folder, base.num_rows, row_bytes)
  _update(
    folder / 'base.sums',
    (
      (slot * _ROW_SUM, row_sum(client, held[slot]))
      for client, slot in slots.items()
    ),
  )


def _update(path: pathlib.Path, parts: Iterable[tuple[int, Any]]) -> None:
  """Writes (offset, bytes) into a file and waits for the disk.

  It writes and does not map: a full disk then raises instead of a bus error.
  """
  with disk.writing(path):
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)
    with os.fdopen(os.open(path, flags, 0o666), 'r+b') as file:
      for offset, data in parts:
        file.seek(offset)
        file.write(data)
      file.flush()
      os.fsync(file.fileno())


# ---------------------------------------------------------------- journals --


class Journal(NamedTuple):
  """One journal: the rows that changed between two commits."""

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
  """Writes a journal of rows by client id to the disk; returns its path."""
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
  with disk.writing(path):
    disk.replace(path, content)
  return path


def read(path: pathlib.Path, row_bytes: int, check: bool = True) -> Journal:
  """Returns a journal from its file.

  Raises:
    Error: the file is missing or damaged; it names the file and the fault.
  """
  try:
    with path.open('rb') as file:
      line = file.readline(4096)
      head = json.loads(line)
      if head['row_bytes'] != row_bytes:
        raise ValueError('its rows have another size')
      numbers = [head[x] for x in ('num_rows', 'round', 'previous')]
      if any(type(x) is not int or x < 0 for x in numbers):
        raise ValueError('its first line lacks whole numbers')
      num = numbers[0]
      size = len(line) + num * (8 + row_bytes) + _CHECKSUM
      if path.stat().st_size != size:
        raise ValueError(f'{path.stat().st_size} bytes instead of {size}')
      if check and not _intact(file, size - _CHECKSUM):
        raise ValueError('its checksum does not fit')
      file.seek(len(line))
      ids = np.frombuffer(file.read(8 * num), np.int64)
  except FileNotFoundError:
    raise Error(f'{path} is missing.') from None
  except (ValueError, KeyError, TypeError, RecursionError) as e:
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
  """Returns the journals from the base to `at_round`, oldest first."""
  chain, round = [], at_round
  while round > base.round:
    path = folder / f'journal_{round:08d}'
    journal = read(path, row_bytes)
    if journal.round != round or not base.round <= journal.previous < round:
      raise Error(
        f'{path} is damaged: it holds the changes from round '
        f'{journal.previous} to {journal.round}.'
      )
    chain.append(journal)
    round = journal.previous
  return chain[::-1]


def overlay(journals: list[Journal]) -> dict[int, tuple[np.ndarray, int]]:
  """Returns the place of each client's last row: client id -> (rows, index)."""
  return {
    client: (journal.rows, i)
    for journal in journals
    for i, client in enumerate(journal.ids.tolist())
  }


def discard(folder: pathlib.Path, keep: list[Journal]) -> None:
  """Removes journals that are not in `keep`: undone, or already in the base."""
  kept = {journal.path for journal in keep}
  # Newest first: if this is interrupted, the rest is still a chain.
  for path in sorted(folder.glob('journal_*'), reverse=True):
    if path not in kept:
      path.unlink()
  (folder / 'base.json.part').unlink(missing_ok=True)
