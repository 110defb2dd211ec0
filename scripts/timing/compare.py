"""Held-out loss against simulated seconds and bytes, six methods, three seeds.

Eight speakers of Shakespeare's plays train a LoRA adapter on a random model.
Their devices are phones and small boards whose speeds differ by a log-normal
factor; a small model reaches a small share of a device's peak (`utilisation`).
Every method trains the same number of client rounds.
"""

import argparse
import contextlib
import datetime
import io
import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'scripts'))

import cell_files  # noqa: E402

FOLDER = ROOT / 'scripts' / 'timing'
CELLS = FOLDER / 'cells'
CLIENTS, SEEDS = 8, (0, 1, 2)
# The system of all methods.
SYSTEM = {
  'system.name': 'fleet',
  'system.devices': ('phone', 'orin_nano'),
  'system.links': ('mobile', 'broadband'),
  'system.utilisation': 1e-4,
  'system.spread': 0.7,
}
MARK = '<!-- written by scripts/time_to_loss -->'
DEADLINE = 4.0  # seconds, of the method with one

# Name: (config, client rounds a round, fields).
METHODS = {
  'FedIT, waits for all': (
    'fed_it', CLIENTS,
    {'clients.name': 'deadline', 'clients.cohort_size': CLIENTS},
  ),
  'FedIT, deadline': (
    'fed_it', CLIENTS,
    {
      'clients.name': 'deadline', 'clients.cohort_size': CLIENTS,
      'clients.seconds': DEADLINE, 'clients.partial': True,
    },
  ),
  'FedBuff': (
    'fed_buff', 4,
    {
      'clients.name': 'buffered', 'clients.cohort_size': 4,
      'clients.concurrency': CLIENTS,
    },
  ),
  'FedAsync': (
    'fed_async', 1,
    {
      'clients.name': 'buffered', 'clients.cohort_size': 1,
      'clients.concurrency': CLIENTS, 'algorithm.max_staleness': 40,
    },
  ),
  'DiLoCo': (
    'diloco', CLIENTS,
    {'clients.name': 'deadline', 'clients.cohort_size': CLIENTS},
  ),
  'Streaming DiLoCo': (
    'streaming_diloco', CLIENTS,
    {
      'clients.name': 'deadline', 'clients.cohort_size': CLIENTS,
      'algorithm.overlap': 1,
    },
  ),
}  # fmt: skip


def train(method: str, seed: int, rounds: int) -> list[dict]:
  """Trains one cell; returns its records."""
  from fedjax_llm.run import config, training
  from fedjax_llm.run.sections import SPEC

  name, each, fields = METHODS[method]
  number = rounds * CLIENTS // each
  fields = {
    **SYSTEM,
    **fields,
    'seed': seed,
    'num_rounds': number,
    'population.max_clients': CLIENTS,
    'population.new_clients': 0,
    'cohort.num_steps': 4,
    'local.learning_rate': 3e-3,
    'evals.every': max(1, CLIENTS // each),
    'evals.per_client': 4,
    'evals.samples': 0,
    'checkpoint_every': number,
  }
  words = [f'--config.{field}={value}' for field, value in fields.items()]
  with tempfile.TemporaryDirectory() as folder:
    path = f'{ROOT}/configs/methods.py:{name}'
    args = config.parse(['--config', path, '--workdir', folder, *words], SPEC)
    with contextlib.redirect_stdout(io.StringIO()):
      training.train(args)
    lines = (pathlib.Path(folder) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def curve(records: list[dict]) -> list[dict]:
  """Returns (seconds, bytes, loss) at each evaluation."""
  points, sent = [], 0.0
  for record in records:
    sent += record.get('uploads/bytes', 0) + record.get('downloads/bytes', 0)
    loss = record.get('evals/heldout/loss')
    if loss is not None:
      points.append(
        dict(seconds=record.get('clock/seconds', 0.0), bytes=sent, loss=loss)
      )
  return points


def table(cells: dict) -> str:
  """Returns the table, and names the cells that are missing."""
  first = {m: [c['curve'] for c in of] for m, of in cells.items() if of}
  ends = [points[-1]['loss'] for of in first.values() for points in of]
  if not ends:
    return 'no cell has been computed.'
  # The loss that every run reaches.
  target = max(ends)
  lines = [
    f'Held-out loss {target:.3f} nats/token, which every run reaches; means '
    'over the seeds (smallest, largest).',
    '',
    '| method | seconds to it | MB to it | loss at the end | seconds in all |',
    '|---|---|---|---|---|',
  ]
  for method, of in first.items():
    hits = [next(p for p in points if p['loss'] <= target) for points in of]
    last = [points[-1] for points in of]

    def spread(values, digits=1):
      mean = statistics.mean(values)
      span = f'{min(values):.{digits}f}, {max(values):.{digits}f}'
      return f'{mean:.{digits}f} ({span})'

    lines.append(
      f'| {method} | {spread([p["seconds"] for p in hits])} | '
      f'{spread([p["bytes"] / 1e6 for p in hits])} | '
      f'{spread([p["loss"] for p in last], 3)} | '
      f'{spread([p["seconds"] for p in last])} |'
    )
  lines += cell_files.listed(
    f'{method}, seed {seed}'
    for method in METHODS
    for seed in SEEDS
    if seed not in [c['seed'] for c in cells.get(method, [])]
  )
  return '\n'.join(lines)


def figure(cells: dict) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  plot, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
  for i, (method, of) in enumerate(cells.items()):
    for cell in of:
      points = cell['curve']
      for axis, field, scale in zip(axes, ('seconds', 'bytes'), (1, 1e6)):
        axis.plot(
          [p[field] / scale for p in points],
          [p['loss'] for p in points],
          color=f'C{i}',
          alpha=0.7,
          label=method if cell is of[0] else None,
        )
  axes[0].set_xlabel('simulated seconds')
  axes[1].set_xlabel('MB up and down')
  axes[0].set_ylabel('held-out loss, nats/token')
  axes[0].legend(frameon=False)
  plot.tight_layout()
  plot.savefig(FOLDER / 'time_to_loss.png', dpi=120)


def cell_of(method: str, seed: int) -> pathlib.Path:
  return (
    CELLS / f'{method.lower().replace(", ", "-").replace(" ", "_")}-{seed}.json'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=24, help='of 8 clients')
  parser.add_argument('--budget', type=float, help='minutes')
  parser.add_argument('--table', action='store_true', help='train nothing')
  args = parser.parse_args()
  rounds, budget = args.rounds, cell_files.budget(args.budget)
  every = [(method, seed) for seed in SEEDS for method in METHODS]
  todo = cell_files.missing(every, lambda cell: cell_of(*cell))
  for number, (method, seed) in enumerate([] if args.table else todo):
    since = time.monotonic()
    records = train(method, seed, rounds)
    took = time.monotonic() - since
    cell = dict(
      method=method, seed=seed, rounds=rounds, took=took,
      date=f'{datetime.date.today()}',
      machine=f'{platform.machine()}, CPU', curve=curve(records),
    )  # fmt: skip
    cell_files.save(cell_of(method, seed), cell)
    rest = len(todo) - number - 1
    need = rest * budget.spent() / (number + 1)
    name = f'{method}, seed {seed}'
    print(cell_files.line(name, took, rest, need), flush=True)
    if args.budget and rest:
      share = budget.left() / need
      if share < 1 and rounds > 4:  # fewer rounds, the same cells
        rounds = max(4, int(rounds * share))
        print(f'the budget allows {rounds} rounds a cell from here on')
  cells: dict = {}
  for method in METHODS:
    for seed in SEEDS:
      if cell_of(method, seed).exists():
        cell = json.loads(cell_of(method, seed).read_text())
        cells.setdefault(method, []).append(cell)
  text = table(cells)
  page = FOLDER / 'README.md'
  start, mark = page.read_text().split(MARK)[0], MARK
  page.write_text(f'{start}{mark}\n\n{text}\n')
  print(text)
  if cells:
    figure(cells)


if __name__ == '__main__':
  main()
