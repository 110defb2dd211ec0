"""Tables, replies side by side, and notices as sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.report import numbers
from fedjax_llm.report.runs import Run, said
from fedjax_llm.run import metrics

_WORST = 8  # the number of clients of a run that are named
_DROPPED = 'clients/dropped_out'


class Table(NamedTuple):
  """A table; its cells are text, numbers, or None for an empty cell.

  With `of_runs` the first column names runs; with `grouped` it stands once
  above the rows that share it; with `folded` the table is collapsed at first.
  """

  name: str
  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  of_runs: bool = False
  grouped: bool = False
  folded: bool = False


class Samples(NamedTuple):
  """One prompt with the client's reply and the models' replies, by model."""

  client: str
  prompt: str
  reply: str
  said: Sequence[tuple[Sequence[str], str]]


# ----------------------------------------------------------------- summary --


def summary(runs: Sequence[Run]) -> Table:
  """Returns a table with a row for each run, without empty columns."""
  columns = {
    'run': lambda run: run.label,
    'state': _state,
    'before': lambda run: _ends(run, 'served/loss')[0],
    'after': lambda run: _ends(run, 'served/loss')[1],
    'change': _change,
    'worst 10 %': _worst_tenth,
    'worse off': _worse_off,
    'new clients': lambda run: _ends(run, 'evals/new/loss')[1],
    'accuracy': lambda run: _ends(run, 'served/accuracy')[1],
    'learned': _learned,
    'up, down': _travelled,
    'time': lambda run: _clock(sum(numbers.stations(run).values())),
    'simulated time': lambda run: _clock(_ends(run, 'clock/seconds')[1] or 0),
    'simulated energy': _energy,
    'never trained': _untrained,
    'dropped out': lambda run: int(numbers.total(run, _DROPPED)) or None,
  }
  cells = {name: [tell(run) for run in runs] for name, tell in columns.items()}
  kept = [
    name
    for name, column in cells.items()
    if any(cell is not None for cell in column)
  ]
  rows = list(zip(*(cells[name] for name in kept), strict=True))
  caption = f'Held-out loss in nats per {runs[0].unit}, and what it cost.'
  return Table('summary-table', caption, kept, rows, of_runs=len(runs) > 1)


def _state(run: Run) -> str:
  last = run.config.get('num_rounds', '?')
  if run.round is None:
    return 'before its start'
  if run.finished and run.round != last:  # a run of a sweep that failed
    return f'ended in round {run.round} of {last}'
  if run.finished:
    return f'finished, {run.round} round{"s" * (run.round != 1)}'
  if run.round == 0:
    return f'before its first round, of {last}'
  return f'unfinished, round {run.round} of {last}'


def _ends(run: Run, field: str) -> tuple[float | None, float | None]:
  """Returns a field at the start and in the last record with it, or None."""
  curve = numbers.curve(run, field)
  if not curve.x:
    return None, None
  first = curve.y[0] if curve.x[0] == 0 else None
  return first, curve.y[-1] if curve.x[-1] > 0 else None


def _change(run: Run) -> float | None:
  first, last = _ends(run, 'served/loss')
  return None if first is None or last is None else last - first


def _worst_tenth(run: Run) -> float | None:
  """Returns the loss of the worst tenth of clients at the last evaluation."""
  own = _ends(run, 'evals/personal/own/client_worst_10')[1]
  shared = _ends(run, 'evals/heldout/client_worst_10')[1]
  return shared if own is None else own


def _worse_off(run: Run) -> str | None:
  """Returns the number of clients with a higher loss than before training."""
  losses = numbers.clients(run)
  if losses is None or not losses.round:
    return None
  changes = [client.change for client in numbers.worst(run)]
  worse = sum(change is not None and change > 0 for change in changes)
  return f'{worse} of {len(changes)}'


def _untrained(run: Run) -> int | None:
  """Returns the number of clients without a personal model, not evaluated."""
  field = 'evals/personal/untrained'
  counts = [r[field] for r in run.records if r['round'] and field in r]
  return counts[-1] if counts else None


def _learned(run: Run) -> str | None:
  number = numbers.total(run, 'local/tokens')
  if not number:
    return None
  amount = metrics.human_bytes(round(number)).removesuffix('B').strip()
  return f'{amount} {run.unit}s'


def _travelled(run: Run) -> str | None:
  if not run.round:
    return None
  fields = ('uploads/bytes', 'downloads/bytes')
  amount = lambda field: metrics.human_bytes(round(numbers.total(run, field)))
  return ', '.join(map(amount, fields))


def _clock(seconds: float) -> str | None:
  if not seconds:
    return None
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  hour = f'{hours}:{minutes:02d}' if hours else f'{minutes}'
  return f'{hour}:{rest:02d}'


def _energy(run: Run) -> str | None:
  """Returns the energy of the simulated devices and of their network."""
  parts = (('clock/joules', ''), ('clock/joules_network', ' of the network'))
  ends = [(_ends(run, field)[1], words) for field, words in parts]
  amounts = [f'{value / 1e3:,.1f} kJ{words}' for value, words in ends if value]
  return ', '.join(amounts) or None


def notices(runs: Sequence[Run]) -> list[str]:
  """Returns sentences on guarantees of privacy and on updates left out."""
  result = []
  for run in runs:
    if run.privacy is not None:
      result.append(_guarantee(run.label, run.privacy))
    names = dict.fromkeys(
      name
      for record in run.records
      for name in record.get('clients/not_finite_names', ())
    )
    if names:
      some = ', '.join(list(names)[:5]) + (', ...' if len(names) > 5 else '')
      result.append(
        f'{run.label}: updates of {len(names)} clients were not finite and '
        f'were left out: {some}.'
      )
  return result


def _guarantee(label: str, record: Mapping[str, Any]) -> str:
  """Returns the guarantee of a run and what this page shows beside it."""
  figures = ', '.join(
    f'{name} {record[name]:g}'
    for name in ('epsilon', 'delta')
    if isinstance(record.get(name), int | float)
  )
  unit = f' for each {record["unit"]}' if 'unit' in record else ''
  epsilon = record.get('epsilon')
  if isinstance(epsilon, int | float) and math.isfinite(epsilon):
    text = f'{label}: differential privacy{unit}, {figures}.'
  else:
    text = f'{label}: no differential privacy: privacy.json has no epsilon.'
  if limits := record.get('not covered by the guarantee'):
    text += f' Not covered, and shown here in part: {limits}'
  return text


# ----------------------------------------------------------------- clients --


def worst(runs: Sequence[Run]) -> list[Table]:
  """Returns tables of the clients with the highest losses, by name."""
  rows = []
  for run in runs:
    losses = numbers.clients(run)
    if losses is None:
      continue
    for client in numbers.worst(run, _WORST):
      after = 'not finite' if client.after is None else client.after
      row = [run.label, client.name, client.examples, None, after, None]
      if losses.round:
        row[3], row[5] = client.before, client.change
      rows.append(row)
  if not rows:
    return []
  header = ['run', 'client', 'texts', 'before', 'loss', 'change']
  many = len(runs) > 1
  kept = [0] * many + [
    i for i in range(1, 6) if any(row[i] is not None for row in rows)
  ]
  table = Table(
    'worst',
    'The clients with the highest held-out loss'
    + (', of each run.' if many else '.'),
    [header[i] for i in kept],
    [[row[i] for i in kept] for row in rows],
    of_runs=many,
    grouped=many,
  )
  return [table]


# ------------------------------------------------------ replies and configs --


def samples(runs: Sequence[Run]) -> list[Samples | str]:
  """Returns the replies to each prompt; runs with equal prompts share one."""
  expected: dict[tuple[str, str], str] = {}
  answers: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
  for run in runs:
    stored = run.samples or {}
    after = f'after round {stored.get("round", "?")}'
    if len(runs) > 1:
      after = f'{run.label}, {after}'
    for sample in stored.get('samples', ()):
      key = sample['client'], sample['prompt']
      expected[key] = sample['reply']
      replies = answers.setdefault(key, {'before': {}, 'after': {}})
      for who, title in (('before', run.label), ('after', after)):
        replies[who].setdefault(sample.get(who, ''), []).append(title)
  items: list[Samples | str] = []
  for key, replies in answers.items():
    before = list(replies['before'].items())
    shown = [
      ([f'{name}, before' for name in names], text) for text, names in before
    ]
    if len(before) == 1:  # the same for all
      shown = [(['before training'], before[0][0])]
    shown += [(names, text) for text, names in replies['after'].items()]
    items.append(Samples(*key, expected[key], shown))
  silent = [run for run in runs if not (run.samples or {}).get('samples')]
  for finished, why in ((True, 'none recorded'), (False, 'told at the end')):
    some = [run for run in silent if run.finished == finished]
    if some:
      items.append(said(f'Replies: {why}', some, runs))
  return items


def configs(runs: Sequence[Run]) -> Table | str:
  """Returns a table of the fields that differ; for a single run, of all."""
  if len(runs) == 1:
    rows = list(numbers.everything(runs[0]).items())
    caption = 'Every field, defaults included'
    header = ['field', 'value']
    return Table('config-table', caption, header, rows, folded=True)
  differ = numbers.differences(runs)
  if not differ:
    return 'The configs do not differ.'
  rows = [[field, *cells] for field, cells in differ.items()]
  header = ['field', *(run.label for run in runs)]
  return Table('differences', 'The fields that differ.', header, rows)
