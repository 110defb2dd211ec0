"""The table of a sweep: means, intervals and differences over seeds."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.run import builders, metrics
from fedjax_llm.types import Error

LEVEL = 0.95


class Interval(NamedTuple):
  """A mean over seeds; half the width of its interval (None: one seed)."""

  mean: float
  half: float | None
  num: int  # the number of seeds


class Row(NamedTuple):
  """The results of one setting, a row of the table."""

  words: Mapping[str, str]  # its fields
  value: Interval | None  # the metric; None: no run has finished
  baseline: Mapping[str, str]  # the fields of the setting it is compared with
  difference: Interval | None  # paired by seed; None: it is the baseline
  up: float | None  # uploaded bytes of a run, a mean over seeds
  down: float | None
  seconds: float | None
  failed: tuple[str, ...]  # the errors of runs that ended early


def interval(
  values: Sequence[float] | np.ndarray, level: float = LEVEL
) -> Interval | None:
  """Returns the mean m of n values and its interval by Student's t:

      m +- t_{n-1, (1 + level) / 2} s / sqrt(n),
      s^2 = sum (x - m)^2 / (n - 1)

  for values drawn independently from a normal distribution (Student
  1908, "The probable error of a mean").

  >>> mean, half, num = interval([1.0, 2.0, 3.0])
  >>> mean, round(half, 3), num
  (2.0, 2.484, 3)
  """
  if not len(values):
    return None
  x = np.asarray(values, np.float64)
  if len(x) == 1:
    return Interval(float(x[0]), None, 1)
  import scipy.special

  t = float(scipy.special.stdtrit(len(x) - 1, (1 + level) / 2))
  half = t * float(np.std(x, ddof=1)) / math.sqrt(len(x))
  return Interval(float(np.mean(x)), half, len(x))


def last(records: Sequence[Mapping[str, Any]], metric: str) -> float | None:
  """Returns a metric after the last round; None if it is not finite.

  Raises:
    Error: the last record lacks it; the message names the nearest metric.
  """
  record = records[-1]
  number = lambda x: x is None or isinstance(x, int | float)  # null: NaN
  known = [k for k, x in record.items() if number(x) and k != 'round']
  if metric not in known:
    near = builders.nearest(metric, known)
    raise Error(f'--metric {metric}: no run has this metric {near}.')
  return None if record[metric] is None else float(record[metric])


def rows(
  words: Sequence[Mapping[str, str]],
  compared: Sequence[int],
  results: Sequence[Sequence[Sequence[Mapping[str, Any]] | str]],
  metric: str,
) -> list[Row]:
  """Returns one row for each setting.

  Args:
    words: the fields of each setting.
    compared: the index of the setting that each is compared with.
    results: for each setting and seed, the records of a run, or the error that
      ended it early. All settings have the same seeds.
    metric: the metric that is compared, after the last round.
  """
  values = [
    [None if isinstance(run, str) else last(run, metric) for run in own]
    for own in results
  ]
  unknown = f'{metric} is not finite after the last round.'
  table = []
  for place, own in enumerate(results):
    other = compared[place]
    pairs = [
      a - b
      for a, b in zip(values[place], values[other])
      if a is not None and b is not None
    ]
    done = [run for run in own if not isinstance(run, str)]
    mean = lambda fields, done=done: _mean(
      [sum(r.get(f) or 0 for r in run for f in fields) for run in done]
    )
    table.append(
      Row(
        words=words[place],
        value=interval([x for x in values[place] if x is not None]),
        baseline=words[other],
        difference=None if other == place else interval(pairs),
        up=mean(['uploads/bytes']),
        down=mean(['downloads/bytes']),
        seconds=mean(['time/data', 'time/round', 'time/evals']),
        failed=tuple(
          run if isinstance(run, str) else unknown
          for run, value in zip(own, values[place])
          if value is None
        ),
      )
    )
  return table


def curve(
  runs: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> list[tuple[int, Interval]]:
  """Returns a metric's intervals by round, for rounds that all runs have."""
  by_round: dict[int, list[float]] = {}
  for run in runs:
    for record in run:
      value = record.get(metric)
      if isinstance(value, int | float):
        by_round.setdefault(record['round'], []).append(float(value))
  return [
    (number, mean)
    for number, values in sorted(by_round.items())
    if len(values) == len(runs) and (mean := interval(values))
  ]


def _mean(values: Sequence[float]) -> float | None:
  return float(np.mean(values)) if values else None


# ------------------------------------------------------------------ on paper --


def markdown(
  rows: Sequence[Row], names: Mapping[str, str], metric: str, num_seeds: int
) -> str:
  """Returns the table in Markdown; `names` are the short names of fields."""
  level = f'{100 * LEVEL:.0f} %'
  several = num_seeds > 1
  what = f'{metric} ({level})' if several else metric
  header = [*(names[f] for f in rows[0].words), what]
  if len(rows) > 1:
    header.append('against the baseline')
  header += ['up', 'down', 'seconds']
  bases = {_key(row.baseline) for row in rows}
  lines = []
  for row in rows:
    cells = list(row.words.values())
    cells.append('none' if row.value is None else _spell(row.value))
    if len(rows) > 1:
      if row.difference is not None:
        cells.append(_spell(row.difference, signed=True))
      else:
        cells.append('baseline' if _key(row.words) in bases else '')
    cells += [
      '' if row.up is None else metrics.human_bytes(round(row.up)),
      '' if row.down is None else metrics.human_bytes(round(row.down)),
      '' if row.seconds is None else f'{row.seconds:.1f}',
    ]
    lines.append(cells)
  notes = []
  if several:
    notes.append(
      f"Means over {num_seeds} seeds with {level} intervals (Student's t); "
      'differences are paired by seed.'
    )
  for row in rows:
    if row.failed:
      setting = ', '.join(f'{names[f]}={w}' for f, w in row.words.items())
      what = f'{len(row.failed)} of {num_seeds} runs do not count'
      notes.append(f'{setting}: {what}: {row.failed[0]}')
  return '\n'.join([_pipes([header, *lines], len(rows[0].words)), '', *notes])


def _pipes(cells: Sequence[Sequence[str]], num_left: int) -> str:
  """Returns a Markdown table with aligned columns."""
  safe = [[c.replace('|', '\\|') for c in row] for row in cells]
  widths = [max(len(row[i]) for row in safe) for i in range(len(safe[0]))]
  left = [i < num_left for i in range(len(widths))]
  rule = [
    '-' * max(w, 3) if side else '-' * max(w - 1, 2) + ':'
    for w, side in zip(widths, left)
  ]
  widths = [max(w, 3) for w in widths]
  straight = lambda row: [
    c.ljust(w) if side else c.rjust(w) for c, w, side in zip(row, widths, left)
  ]
  lines = [straight(safe[0]), rule, *map(straight, safe[1:])]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _key(words: Mapping[str, str]) -> tuple[str, ...]:
  return tuple(words.values())


def _spell(mean: Interval, signed: bool = False) -> str:
  """Returns a mean as text, with the digits that its interval justifies.

  >>> _spell(Interval(5.54321, 0.0123, 5)), _spell(Interval(-2e-5, 3e-6, 5))
  ('5.543 ± 0.012', '-0.0000200 ± 0.0000030')
  """
  digits = 4
  if mean.half:
    digits = min(max(1 - math.floor(math.log10(mean.half)), 0), 8)
  sign = '+' if signed else ''
  text = f'{mean.mean:{sign}.{digits}f}'
  return text if mean.half is None else f'{text} ± {mean.half:.{digits}f}'


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Returns the rows as JSON values."""
  plain = lambda x: x._asdict() if isinstance(x, Interval) else x
  return [
    {field: plain(x) for field, x in row._asdict().items()} for row in rows
  ]


def as_csv(rows: Sequence[Row]) -> str:
  """Returns the rows as CSV; a cell without a value is empty."""
  fields = list(rows[0].words)
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  numbers = ['mean', 'half', 'num']
  writer.writerow(
    [
      *fields,
      *numbers,
      *(f'difference_{name}' for name in numbers),
      *('up', 'down', 'seconds', 'failed'),
    ]
  )
  for row in rows:
    parts = [
      ['', '', ''] if x is None else ['' if v is None else v for v in x]
      for x in (row.value, row.difference)
    ]
    rest = ['' if x is None else x for x in (row.up, row.down, row.seconds)]
    line = [*row.words.values(), *parts[0], *parts[1], *rest, len(row.failed)]
    writer.writerow(line)
  return out.getvalue()
