"""Three subjects of news, one after another: four methods, three seeds.

Ten clients hold all three subjects, and in each stage they train on their texts
of one (class-incremental). A cell is a method and a seed.
"""

import argparse
import contextlib
import datetime
import io
import json
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'scripts'))

import cell_files  # noqa: E402

FOLDER = ROOT / 'scripts' / 'continual_runs'
CELLS = FOLDER / 'cells'
SEEDS = (0, 1, 2)
MARK = '<!-- written by scripts/continual -->'
MACHINE = '2 shared CPU cores'

STAGES = 3
COMMON = {
  'local.learning_rate': 3e-3,
  'partition.name': 'iid',
  'partition.num_clients': 10,
  'population.heldout_fraction': 0.2,
  'population.new_clients': 0,
  'population.max_length': 16,
  'clients.cohort_size': 2,
  'cohort.num_steps': 4,
  'cohort.batch_size': 4,
  'stages.name': 'by_key',
  'stages.key': 'label',
  'stages.order': ('business', 'sports', 'tech'),
  'evals.per_client': 2,  # of each subject
  'evals.common': 0,
}
POOL = {
  'adapter.name': 'prompt_pool',
  'adapter.size': 10,
  'adapter.length': 1,
  'adapter.top': 5,
  'algorithm.name': 'fed_l2p',
}
METHODS = {
  'LoRA, sequential': {},
  'LoRA, replay of 2': {'stages.replay': 2},
  'LoRA, joint': {'stages.train': 'all'},
  'Fed-L2P, sequential': POOL,
}
FIELDS = ('average', 'forgetting', 'backward', 'forward')


def train(method: str, seed: int, rounds: int) -> dict:
  """Trains one cell; returns the content of its stages.json."""
  from fedjax_llm.run import config, training
  from fedjax_llm.run.sections import SPEC

  fields = {
    **COMMON,
    **METHODS[method],
    'seed': seed,
    'stages.rounds': rounds,
    'num_rounds': STAGES * rounds,
    'checkpoint_every': STAGES * rounds,
    'evals.every': STAGES * rounds,
  }
  words = [f'--config.{field}={value}' for field, value in fields.items()]
  with tempfile.TemporaryDirectory() as folder:
    path = f'{ROOT}/configs/minilm_classification.py'
    args = config.parse(['--config', path, '--workdir', folder, *words], SPEC)
    with contextlib.redirect_stdout(io.StringIO()):
      training.train(args)
    return json.loads((pathlib.Path(folder) / 'stages.json').read_text())


def cell_of(method: str, seed: int) -> pathlib.Path:
  name = method.lower().replace(', ', '-').replace(' ', '_')
  return CELLS / f'{name}-{seed}.json'


def read() -> dict[str, list[dict]]:
  """Returns the cells by method."""
  return {
    method: [
      json.loads(cell_of(method, seed).read_text())
      for seed in SEEDS
      if cell_of(method, seed).exists()
    ]
    for method in METHODS
  }


def table(cells: dict[str, list[dict]]) -> str:
  """Returns the table, and names the cells that are missing."""
  lines = [
    'Held-out accuracy after the last stage; means over the seeds (smallest, '
    'largest).',
    '',
    '| method | average | forgetting | backward transfer | forward transfer | '
    'average loss | rounds a stage |',
    '|---|---|---|---|---|---|---|',
  ]

  def spread(values: list[float]) -> str:
    span = f'{min(values):.3f}, {max(values):.3f}'
    return f'{statistics.mean(values):.3f} ({span})'

  for method, of in cells.items():
    if not of:
      continue
    values = [spread([cell['accuracy'][x] for cell in of]) for x in FIELDS]
    values.append(spread([cell['loss']['average'] for cell in of]))
    rounds = sorted({cell['rounds'] for cell in of})
    values.append(', '.join(map(str, rounds)))
    lines.append(f'| {method} | {" | ".join(values)} |')
  every = [(method, seed) for method in METHODS for seed in SEEDS]
  missing = cell_files.missing(every, lambda cell: cell_of(*cell))
  lines += cell_files.listed(
    f'{method}, seed {seed}' for method, seed in missing
  )
  return '\n'.join(lines)


def figure(cells: dict[str, list[dict]]) -> None:
  """Draws the mean matrix of accuracies of each method."""
  import matplotlib

  matplotlib.use('Agg')
  import numpy as np
  from matplotlib import pyplot

  some = {method: of for method, of in cells.items() if of}
  plot, axes = pyplot.subplots(
    1, len(some), figsize=(3.1 * len(some), 3.4), sharey=True, squeeze=False
  )
  for axis, (method, of) in zip(axes[0], some.items()):
    names = of[0]['names']
    mean = np.mean([cell['accuracy']['matrix'] for cell in of], 0)
    axis.imshow(mean, vmin=0, vmax=1, cmap='viridis')
    for i, j in np.ndindex(*mean.shape):
      colour = 'white' if mean[i, j] < 0.5 else 'black'
      axis.text(
        j, i, f'{mean[i, j]:.2f}', ha='center', va='center', fontsize=7,
        color=colour,
      )  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=40, ha='right')
    axis.set_yticks(
      range(len(mean)), ['before', *(f'after {name}' for name in names)]
    )
    axis.set_title(method, fontsize=10)
  plot.tight_layout()
  plot.savefig(FOLDER / 'matrices.png', dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--rounds', type=int, default=2, help='of a stage')
  parser.add_argument('--budget', type=float, help='minutes')
  parser.add_argument('--table', action='store_true', help='train nothing')
  args = parser.parse_args()
  rounds, budget = args.rounds, cell_files.budget(args.budget)
  every = [(method, seed) for seed in SEEDS for method in METHODS]
  todo = cell_files.missing(every, lambda cell: cell_of(*cell))
  for number, (method, seed) in enumerate([] if args.table else todo):
    since = time.monotonic()
    content = train(method, seed, rounds)
    took = time.monotonic() - since
    cell = dict(
      method=method,
      seed=seed,
      rounds=rounds,
      took=round(took, 1),
      date=f'{datetime.date.today()}',
      machine=MACHINE,
      **{k: content[k] for k in ('names', 'accuracy', 'loss')},
    )
    cell_files.save(cell_of(method, seed), cell, indent=None)
    rest = len(todo) - number - 1
    need = rest * took  # the first cell also compiles
    name = f'{method}, seed {seed}'
    print(cell_files.line(name, took, rest, need), flush=True)
    short = args.budget and need > budget.left()
    if short and number and rounds > 1:
      rounds -= 1
      print(f'the budget allows {rounds} rounds a stage from here on')
  cells = read()
  text = table(cells)
  page = FOLDER / 'README.md'
  start = page.read_text().split(MARK)[0]
  page.write_text(f'{start}{MARK}\n\n{text}\n')
  print(text)
  if any(cells.values()):
    figure(cells)


if __name__ == '__main__':
  main()
