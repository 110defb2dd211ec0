"""The table of `scripts/pretrain`, from the JSON files of its cells."""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

CELLS = pathlib.Path(__file__).resolve().parent / 'cells'
SEEDS = (0, 1, 2)
METHODS = {
  'data_parallel': 'data parallel: AdamW on the mean gradient of each batch',
  'diloco': 'DiLoCo: {steps} steps of AdamW between messages',
}


def read() -> list[dict[str, Any]]:
  """Returns the cells that have been computed, in the order of their names."""
  return [json.loads(path.read_text()) for path in sorted(CELLS.glob('*.json'))]


def markdown(cells: Sequence[dict[str, Any]]) -> str:
  """Returns a row for each method, and names the cells that are missing.

  >>> point = lambda number: dict(round=number, loss=2.0)
  >>> cell = dict(method='diloco', seed=0, steps=16, bytes_sent=3e6,
  ...             curve=[point(0), point(4)])
  >>> print(markdown([cell]).splitlines()[2])
  | DiLoCo: 16 steps of AdamW between messages | 2.000 | 2.000 | 3 |
  """
  curves = [{p['round']: p['loss'] for p in c['curve']} for c in cells]
  rounds = sorted(set.intersection(*map(set, curves))) if curves else []
  head = ' | '.join(f'round {number}' for number in rounds)
  lines = [
    f'| training | {head} | MB that a worker sends |',
    '|---' * (len(rounds) + 2) + '|',
  ]
  for name, title in METHODS.items():
    own = [i for i, cell in enumerate(cells) if cell['method'] == name]
    if not own:
      continue
    means = []
    for number in rounds:
      losses = [curves[i][number] for i in own]
      text = f'{statistics.mean(losses):.3f}'
      if number == rounds[-1] and len(losses) > 1:
        text += f' ({min(losses):.3f} to {max(losses):.3f})'
      means.append(text)
    sent = cells[own[0]]['bytes_sent'] / 1e6
    title = title.format(steps=cells[own[0]]['steps'])
    lines.append(f'| {title} | {" | ".join(means)} | {sent:,.0f} |')
  here = {(cell['method'], cell['seed']) for cell in cells}
  missing = [
    f'{name} of seed {seed}'
    for name in METHODS
    for seed in SEEDS
    if (name, seed) not in here
  ]
  if missing:
    lines += ['', f'Missing cells: {", ".join(missing)}.']
  return '\n'.join(lines)
