"""Files that other programs read: TensorBoard's events, a table as CSV."""

import contextlib
import csv
import io
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedjax_llm.types import Error


def board(folder: str, keep: int) -> Callable[[int, Mapping[str, Any]], None]:
  """Writes scalars as TensorBoard's events.

  It writes in the calling thread: the library's own writer is a thread that
  ends on a full disk and leaves the program waiting for ever. Events of rounds
  after `keep`, which are computed again, are hidden.
  """
  import tensorboardX.proto.event_pb2
  import tensorboardX.proto.summary_pb2
  from tensorboardX.record_writer import masked_crc32c

  events: Any = tensorboardX.proto.event_pb2
  summaries: Any = tensorboardX.proto.summary_pb2
  name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
  path = os.path.join(folder, name)

  def append(**fields: Any) -> None:
    event = events.Event(wall_time=time.time(), **fields)
    data = event.SerializeToString()
    size = struct.pack('<Q', len(data))
    crc = lambda x: struct.pack('<I', masked_crc32c(x))
    with saving(path):
      os.makedirs(folder, exist_ok=True)
      with open(path, 'ab') as file:
        file.write(size + crc(size) + data + crc(data))

  def write(round: int, record: Mapping[str, Any]) -> None:
    values = [
      summaries.Summary.Value(tag=name, simple_value=value)
      for name, value in record.items()
      if isinstance(value, int | float) and name != 'round'
    ]
    append(step=round, summary=summaries.Summary(value=values))

  append(file_version='brain.Event:2')
  if keep >= 0:
    start = events.SessionLog(status=events.SessionLog.START)
    append(step=keep + 1, session_log=start)
  return write


def sheet(
  path: str, records: Iterable[Mapping[str, Any]]
) -> Callable[[Mapping[str, Any]], None]:
  """Writes the scalars of each round as a row of a CSV file.

  The file always equals the table of all records: it is rewritten from
  `records` at the start, and when a round adds a column. A cell is empty where
  a round has no such metric, or no finite number.

  >>> import tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'metrics.csv')
  >>> write = sheet(path, [{'round': 0, 'evals/new/loss': 6.5}])
  >>> write({'round': 1, 'local/loss': 5.25, 'evals/new/clients': {'a': 1}})
  >>> print(open(path).read().strip())
  round,evals/new/loss,local/loss
  0,6.5,
  1,,5.25
  """
  rows: list[dict[str, Any]] = []
  columns: list[str] = []

  def text(lines: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(lines)
    return out.getvalue()

  def line(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(column) for column in columns]

  def add(record: Mapping[str, Any]) -> bool:
    """Adds a record; returns True if it has new columns."""
    scalar = int | float | None
    row = {k: v for k, v in record.items() if isinstance(v, scalar)}
    rows.append(row)
    names = {*columns, *row} - {'round'}
    known = len(columns)
    columns[:] = ['round', *sorted(names)]
    return len(columns) > known

  def whole() -> None:
    fresh = f'{path}.new'
    with saving(path):
      with contextlib.suppress(FileNotFoundError):
        os.remove(fresh)
      with open(fresh, 'x', encoding='utf-8', newline='') as file:
        file.write(text([columns, *map(line, rows)]))
      os.replace(fresh, path)

  def write(record: Mapping[str, Any]) -> None:
    if add(record):
      whole()
      return
    with saving(path), open(path, 'a', encoding='utf-8', newline='') as file:
      file.write(text([line(rows[-1])]))

  for record in records:
    add(record)
  whole()
  return write


@contextlib.contextmanager
def saving(path: str):
  """Turns an `OSError`, such as a full disk, into an `Error`, as a context."""
  try:
    yield
  except OSError as error:
    raise Error(
      f'{path} cannot be written: {error.strerror}; the same command goes on'
      ' from the last checkpoint.'
    ) from error
