"""The metrics of a run: a JSON object a round, a progress bar, a table."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.run import trackers
from fedjax_llm.run.records import check_record
from fedjax_llm.types import Error, RoundInfo


class Recorder(NamedTuple):
  """Functions that write the metrics of a run.

  `write(round, metrics)` appends one line to `metrics.jsonl` and forces it to
  the disk; `close(finished)` ends the runs at tracking services.
  """

  write: Callable[[int, Mapping[str, Any]], None]
  close: Callable[[bool], None]


def recorder(
  workdir: str,
  keep: int = -1,
  *,
  tensorboard: bool = True,
  track: Callable[[list[dict[str, Any]]], Sequence[trackers.Tracker]]
  | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> Recorder:
  """Opens `workdir/metrics.jsonl`, cut back to the records up to round `keep`.

  Keys are sorted, floats are written exactly, and numbers that are not finite
  become null: a resumed file equals one that was never interrupted, byte for
  byte, but for the fields under `time/`. A last line torn by a killed run is
  dropped. `workdir/metrics.csv` and TensorBoard files get the scalars.

  Args:
    workdir: is made if absent.
    keep: the round of the checkpoint that is resumed; -1 starts a new file.
    tensorboard: whether to write `workdir/tensorboard`.
    track: a function of the kept records that starts tracking services
      (`trackers.tracking`), which get the scalars too.
    say: called with a sentence if records of earlier rounds are missing.

  Raises:
    Error: the file is damaged before its last line, its rounds do not ascend,
      it lacks round `keep`, or a line cannot be written (also because the file
      was removed or changed meanwhile).

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   record = recorder(workdir, tensorboard=False)
  ...   record.write(1, {'local/loss': np.float32(0.5), 'clients/out': ['a']})
  ...   print(open(f'{workdir}/metrics.jsonl').read().strip())
  {"clients/out": ["a"], "local/loss": 0.5, "round": 1}
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  with trackers.saving(path):
    os.makedirs(workdir, exist_ok=True)
  _cut(path, keep)
  kept = read(path)
  if missing := _missing(kept, keep):
    say(f'{path} has no record of {missing}: reports lack it.')
  size = [os.path.getsize(path)]
  row = trackers.sheet(os.path.join(workdir, 'metrics.csv'), kept)
  board = None
  if tensorboard:
    board = trackers.board(os.path.join(workdir, 'tensorboard'), keep)
  services = () if track is None else track(kept)

  def write(round: int, metrics: Mapping[str, Any]) -> None:
    text = line(round, metrics)
    there = os.path.exists(path)
    changed = os.path.isfile(path) and os.path.getsize(path) != size[0]
    if not there or changed:
      raise Error(
        f'{path} was removed or changed while this run was at work, so the run '
        'ends: put the file back; the same command goes on from there.'
      )
    with trackers.saving(path):
      with open(path, 'ab') as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    size[0] += len(text.encode())
    record = json.loads(text)
    row(record)
    if board is not None:
      board(int(round), record)
    for service in services:
      service.write(int(round), record)

  def close(finished: bool) -> None:
    for service in services:
      service.close(finished)

  return Recorder(write, close)


def line(round: int, metrics: Mapping[str, Any]) -> str:
  """Returns one line of `metrics.jsonl`, its end included: see `recorder`.

  >>> line(1, {'local/loss': float('nan'), 'clients/out': ('a',)})
  '{"clients/out": ["a"], "local/loss": null, "round": 1}\\n'
  """
  record = _jsonable({**metrics, 'round': int(round)})
  return json.dumps(record, sort_keys=True, allow_nan=False) + '\n'


def read(path: str) -> list[dict[str, Any]]:
  """Returns the records of a `metrics.jsonl` without a torn last line."""
  return [record for record, _ in _lines(path)]


def _lines(path: str) -> list[tuple[dict[str, Any], bytes]]:
  if not os.path.exists(path):
    return []
  with open(path, 'rb') as file:
    lines = file.read().split(b'\n')
  if not lines[-1]:
    lines.pop()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if type(record.get('round')) is not int or record['round'] < 0:
        raise ValueError('no round')
    except (ValueError, AttributeError, RecursionError) as error:
      if number == len(lines):
        break
      raise Error(f'{path}:{number} is no record of a round.') from error
    check_record(record, f'{path}:{number}')
    if records and record['round'] <= records[-1][0]['round']:
      raise Error(
        f'{path}:{number} is of round {record["round"]}, after one of round '
        f'{records[-1][0]["round"]}: rounds must ascend.'
      )
    records.append((record, line + b'\n'))
  return records


def _missing(records: Sequence[Mapping[str, Any]], last: int) -> str:
  """Returns the rounds up to `last` without a record, as text ('' for none)."""
  missing = sorted({*range(last + 1)} - {x['round'] for x in records})
  if not missing:
    return ''
  some = ', '.join(map(str, missing[:5]))
  more = f' and {len(missing) - 5} more' if len(missing) > 5 else ''
  return f'round{"s" if len(missing) > 1 else ""} {some}{more}'


def _cut(path: str, keep: int) -> None:
  kept = [(r, line) for r, line in _lines(path) if r['round'] <= keep]
  if keep > 0 and (not kept or kept[-1][0]['round'] != keep):
    last = kept[-1][0]['round'] if kept else 'none'
    raise Error(
      f'{path}: the checkpoint is of round {keep}, but the last record before'
      f' it is of round {last}; put the file back, or take a new workdir.'
    )
  text = b''.join(line for _, line in kept)
  with trackers.saving(path):
    with contextlib.suppress(FileNotFoundError):
      os.remove(f'{path}.new')
    with open(f'{path}.new', 'xb') as file:  # not through a link
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(f'{path}.new', path)


def _jsonable(x: Any) -> Any:
  if isinstance(x, Mapping):
    return {str(k): _jsonable(v) for k, v in x.items()}
  if hasattr(x, 'tolist'):  # NumPy and JAX arrays and scalars
    x = x.tolist()
  if isinstance(x, list | tuple):
    return [_jsonable(v) for v in x]
  if isinstance(x, float) and not math.isfinite(x):
    return None
  return x


def summarise(info: RoundInfo) -> dict[str, Any]:
  """Returns the record of a round: Python numbers and lists by name.

  Byte counts are summed in 64 bits; a scalar becomes a float, or an int if it
  is a whole number; other arrays become lists.

  >>> count = np.full((2, 3), 2**30, np.int32)
  >>> who = np.ones(2, bool)
  >>> metrics = {'local/loss': np.float32(2)}
  >>> summarise(RoundInfo(who, who, count, 0 * count, metrics))
  {'local/loss': 2.0, 'uploads/bytes': 6442450944, 'downloads/bytes': 0}
  """
  info = jax.device_get(info)
  record: dict[str, Any] = {}
  for name, value in info.metrics.items():
    if np.ndim(value):
      record[name] = np.asarray(value).tolist()
    else:
      item = np.asarray(value).item()
      record[name] = item if isinstance(item, float) else int(item)
  count = lambda x: int(np.sum(x, dtype=np.int64))
  record['uploads/bytes'] = count(info.bytes_up)
  record['downloads/bytes'] = count(info.bytes_down)
  return record


# ----------------------------------------------------------------- terminal --


class Progress(NamedTuple):
  """Functions of a progress bar.

  `update(round, loss, speed, heldout=None, more=())` is called after every
  round, with the held-out loss of rounds with an evaluation and texts to print
  after the speed; `write(text)` prints a line above the bar; `close()` ends it.
  """

  update: Callable[..., None]
  write: Callable[[str], None]
  close: Callable[[], None]


def progress(
  num_rounds: int,
  start: int = 0,
  *,
  unit: str = 'tokens',
  every: float = 10.0,
  file: Any = None,
  clock: Callable[[], float] = time.monotonic,
) -> Progress:
  """Returns a bar with round, loss, speed in units a second and the time left.

  Where `file` (default: standard error) is no terminal, it prints a plain line
  at most every `every` seconds and one for the last round, so that logs stay
  readable. The estimate of the time left leaves out the first round, which
  compiles, once there is a second one.
  """
  file = sys.stderr if file is None else file
  bar = None
  if file.isatty():
    import tqdm

    bar = tqdm.tqdm(
      total=num_rounds,
      initial=start,
      file=file,
      bar_format='{desc}|{bar:20}| {n_fmt}/{total_fmt}{postfix}',
      desc='round',
    )
  marks: list[tuple[int, float]] = [(start, clock())]
  printed = [-math.inf]

  tested = ['']  # the last held-out loss, as text

  def update(
    round: int,
    loss: float,
    speed: float,
    heldout: float | None = None,
    more: Sequence[str] = (),
  ) -> None:
    now = clock()
    since, began = marks[-1]
    seconds = (now - began) / max(round - since, 1)
    if len(marks) == 1:
      marks.append((round, now))
    left = _clock_time(seconds * (num_rounds - round))
    if heldout is not None:
      tested[0] = f'held-out {heldout:.4f}, '
    after = ', '.join([f'{speed:,.0f} {unit}/s', *more, f'{left} left'])
    status = f'loss {loss:.4f}, {tested[0]}{after}'
    if bar is not None:
      bar.set_postfix_str(status, refresh=False)
      bar.update(round - bar.n)
    elif now - printed[0] >= every or round == num_rounds:
      printed[0] = now
      print(f'round {round}/{num_rounds}: {status}', file=file, flush=True)

  def write(text: str) -> None:
    if bar is not None:
      bar.write(text, file=file)
    else:
      print(text, file=file, flush=True)

  def close() -> None:
    if bar is not None:
      bar.close()

  return Progress(update, write, close)


def _clock_time(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  short = f'{minutes:02d}:{seconds:02d}'
  return f'{hours}:{short}' if hours else short


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
  """Returns a text table; numbers are right-aligned, floats with four digits.

  >>> print(table([('loss', 2.5), ('rounds', 10)], ('', 'before')))
          before
  ------  ------
  loss    2.5000
  rounds      10
  """
  cell = lambda x: f'{x:.4f}' if isinstance(x, float) else str(x)
  cells = [list(header), *([cell(x) for x in row] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
  # The header is aligned like its column.
  right = [
    any(isinstance(row[i], int | float) for row in rows)
    for i in range(len(header))
  ]
  lines = [
    '  '.join(
      x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right)
    ).rstrip()
    for line in cells
  ]
  lines.insert(1, '  '.join('-' * w for w in widths))
  return '\n'.join(lines)


def human_bytes(n: int) -> str:
  """Returns a number of bytes as text in decimal units.

  >>> human_bytes(999), human_bytes(1_843_200), human_bytes(184 * 10**9)
  ('999 B', '1.84 MB', '184 GB')
  """
  if n < 1000:
    return f'{n} B'
  size, units = float(n), ['kB', 'MB', 'GB', 'TB', 'PB', 'EB']
  for unit in units:
    size /= 1000
    if size < 999.5 or unit == units[-1]:
      break
  digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
  return f'{size:.{digits}f} {unit}'
