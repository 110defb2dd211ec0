"""The table of `scripts/dpo_pairs`, from its JSON files."""

import json
import pathlib
import statistics

FOLDER = pathlib.Path(__file__).resolve().parent / 'dpo_pairs'


def cells(folder: pathlib.Path = FOLDER) -> list[dict]:
  """Returns the figures of all seeds that have been run."""
  files = sorted(folder.glob('seed-*.json'))
  return [json.loads(file.read_text()) for file in files]


def table(cells: list[dict]) -> str:
  """Returns the table, with the mean of the seeds in its last row."""
  if not cells:
    return 'No seed has been run.'
  lines = [
    '| seed | rounds | loss before | loss after | held-out pairs, share right '
    '| pairs of the last round, share right |',
    '|---|---|---|---|---|---|',
  ]
  fields = ('loss_before', 'loss', 'accuracy', 'train_accuracy')

  def row(name: str, rounds: str, of) -> str:
    values = [name, rounds, *(f'{of(field):.3f}' for field in fields)]
    return f'| {" | ".join(values)} |'

  for cell in cells:
    lines.append(row(str(cell['seed']), str(cell['rounds']), cell.get))
  mean = lambda field: statistics.mean(cell[field] for cell in cells)
  return '\n'.join([*lines, row('mean', '', mean)])
