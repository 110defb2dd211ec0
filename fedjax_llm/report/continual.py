"""The section of runs in stages: heat maps of the matrices, and their summary.

The matrices are read from the records of the rounds that ended a stage.
"""

from collections.abc import Sequence
from typing import Any

from fedjax_llm.report.drawing import Picture
from fedjax_llm.report.runs import Run
from fedjax_llm.report.tables import Table
from fedjax_llm.run import staged

_TITLES = {
  'loss': 'Held-out loss',
  'accuracy': 'Held-out accuracy',
  'personal_loss': 'Held-out loss of own models',
  'personal_accuracy': 'Held-out accuracy of own models',
}
_SUMMARY = ('average', 'forgetting', 'backward', 'forward')


def items(runs: Sequence[Run]) -> list[Picture | Table]:
  """Returns the heat maps and the table of runs in stages; [] without any."""
  pictures: list[Picture | Table] = []
  rows = []
  for number, run in enumerate(runs):
    names, tables = read(run)
    for title, table in tables.items():
      if title.endswith('accuracy') and not run.labelled:
        continue
      label = f'{run.label}: ' if len(runs) > 1 else ''
      name = f'stages-{title.replace("_", "-")}-{number}'
      words = f'{label}{_TITLES[title]} by stage'
      pictures.append(_heat_map(name, words, names, table['matrix']))
      if 'average' in table:
        cells = [table.get(field) for field in _SUMMARY]
        rows.append([run.label, _TITLES[title], *cells])
  if not rows:
    return pictures
  many = len(runs) > 1
  header = ['run', 'matrix', *_SUMMARY]
  table = Table(
    'stages-summary',
    'Over the stages that ended: the average, forgetting (of a loss, its '
    'increase), and backward and forward transfer (of a loss, its decrease).',
    header if many else header[1:],
    rows if many else [row[1:] for row in rows],
    of_runs=many,
  )
  return [*pictures, table]


def read(run: Run) -> tuple[list[str], dict[str, dict[str, Any]]]:
  """Returns the names of a run's stages and its matrices (`run.staged`)."""
  by_round = {record['round']: record for record in run.records}
  names = next(
    (record[staged.NAMES] for record in run.records if staged.NAMES in record),
    [],
  )
  ends = [n for n, x in by_round.items() if 'evals/stages/loss_average' in x]
  return names, staged.matrices(names, ends, by_round)


def _heat_map(
  name: str, title: str, names: Sequence[str], matrix: Sequence[Sequence[float]]
) -> Picture:
  done = len(matrix) - 1
  begin = ['before', *(f'after {names[i]}' for i in range(done))]
  last = ', '.join(f'{n}: {x:.4g}' for n, x in zip(names, matrix[-1]))
  alt = f'{title}. {begin[-1]}: {last}.'

  def draw(axes: Any) -> None:
    image = axes.imshow(matrix, aspect='auto', cmap='viridis')
    axes.grid(False)
    axes.set_xticks(range(len(names)), names, rotation=30, ha='right')
    axes.set_yticks(range(len(begin)), begin)
    axes.set_xlabel('held-out texts of')
    middle = sum(image.get_clim()) / 2
    for i, row in enumerate(matrix):
      for j, value in enumerate(row):
        colour = '#ffffff' if value < middle else '#000000'
        axes.text(
          j, i, f'{value:.3g}', ha='center', va='center', color=colour,
          fontsize=7.5,
        )  # fmt: skip

  return Picture(name, title, alt, draw)
