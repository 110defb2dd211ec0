"""The table of clients that join after training: `run.newcomers`."""

import re
from collections.abc import Sequence

from fedjax_llm.report.runs import Run
from fedjax_llm.report.tables import Table

_FIELD = re.compile(r'evals/newcomers/(steps|alone)_(\d+)/loss')


def table(runs: Sequence[Run]) -> list[Table]:
  """Returns a table of the last such evaluation of each run, or []."""
  rows, columns = [], []
  for run in runs:
    for record in reversed(run.records):
      values = {
        (kind, int(steps)): value
        for field, value in record.items()
        if (match := _FIELD.fullmatch(field))
        for kind, steps in [match.groups()]
      }
      if values:
        rows.append((run.label, values))
        columns += [key for key in values if key not in columns]
        break
  if not rows:
    return []
  columns.sort(key=lambda key: (key[0] == 'alone', key[1]))
  words = lambda kind, steps: (
    'as served' if (kind, steps) == ('steps', 0)
    else f'{"alone, " if kind == "alone" else ""}{steps} steps'
  )  # fmt: skip
  many = len(runs) > 1
  header = ['run', *(words(*key) for key in columns)]
  cells = [[label, *(one.get(key) for key in columns)] for label, one in rows]
  return [
    Table(
      'newcomers',
      f'Held-out loss in nats per {runs[0].unit} of clients that never train, '
      'after local steps from the served model, and from the start alone.',
      header if many else header[1:],
      cells if many else [row[1:] for row in cells],
      of_runs=many,
    )
  ]
