"""The table and the figure of `scripts/memory_wall`, from its cells."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

FOLDER = pathlib.Path(__file__).parent / 'results'


def cells(folder: pathlib.Path = FOLDER) -> dict[str, Any]:
  """Returns the cells of a folder by kind, in the order of their memory."""
  read = [json.loads(file.read_text()) for file in folder.glob('*.json')]
  some = {cell['kind']: cell for cell in read if 'kind' in cell}
  return dict(sorted(some.items(), key=lambda x: x[1]['peak']['total']))


def equal(cell: Mapping[str, Any]) -> list[list[float]]:
  """Returns the part of a curve that is of equal work.

  >>> equal({'curve': [[0, 4.0], [6, 3.5], [9, 3.0]], 'equal': 2})
  [[0, 4.0], [6, 3.5]]
  """
  return cell['curve'][: cell.get('equal')]


def target(results: Mapping[str, Any]) -> float:
  """Returns the loss halfway from the start to the end of backpropagation.

  >>> target({'backpropagation': {'curve': [[0, 4.0], [6, 3.5], [9, 3.0]]}})
  3.5
  """
  curve = results['backpropagation']['curve']
  return (curve[0][1] + curve[-1][1]) / 2


def lowest(results: Mapping[str, Any], name: str = 'two points') -> float:
  """Returns the least loss that a kind was seen at.

  >>> lowest({'two points': {'curve': [[0, 4.0], [6, 3.5], [9, 3.6]]}})
  3.5
  """
  return min(loss for _, loss in results[name]['curve'])


def steps_to(cell: Mapping[str, Any], loss: float) -> str:
  """Returns the steps after which a cell was first seen at a loss or below.

  >>> cell = {'curve': [[0, 4.0], [6, 3.4]], 'passes_a_step': 3.0}
  >>> steps_to(cell, 3.5), steps_to(cell, 3.0)
  ('2', 'not in 2')
  """
  for passes, value in cell['curve']:
    if value <= loss:
      return str(round(passes / cell['passes_a_step']))
  return f'not in {round(passes / cell["passes_a_step"])}'


def markdown(
  results: Mapping[str, Any], larger: Mapping[str, Mapping[str, int]]
) -> str:
  """Returns the table: memory, bytes, loss at equal forward passes, seconds."""
  goals = [lowest(results), target(results)]
  by_size = lambda name: max(larger[name].values())
  larger = {name: larger[name] for name in sorted(larger, key=by_size)}
  names = [name.split('/')[-1] for name in larger]
  head = [
    'step', 'peak, MB', 'x inference', 'activations, MB', 'up a round',
    'passes a step', 's a step', 'steps', 'held-out loss',
    *(f'steps to {goal:.3f}' for goal in goals),
    *(f'{name}, GB' for name in names),
  ]  # fmt: skip
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  first = results['inference']['peak']['total']
  for name, cell in results.items():
    peak = cell['peak']
    row = [
      name,
      f'{peak["total"] / 1e6:,.0f}',
      f'{peak["total"] / first:.2f}',
      f'{peak["temporary"] / 1e6:,.0f}',
      _size(cell['bytes_up']),
    ]
    if 'curve' in cell:
      curve = equal(cell)
      row += [
        f'{cell["passes_a_step"]:.2f}',
        f'{cell["seconds_a_step"]:.2f}',
        str(round(curve[-1][0] / cell['passes_a_step'])),
        f'{curve[0][1]:.3f} → {curve[-1][1]:.3f}',
        *(steps_to(cell, goal) for goal in goals),
      ]
    else:
      row += [f'as {cell["follows"]}' if 'follows' in cell else ''] + [''] * 5
    row += [
      f'{sizes[name] / 1e9:.1f}' if name in sizes else ''
      for sizes in larger.values()
    ]
    lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines)


def _size(number: int) -> str:
  if number < 1e4:
    return f'{number} B'
  return f'{number / 1e6:.2f} MB'


def figure(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes peak memory against the loss at equal forward passes."""
  import io

  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from PIL import Image

  from fedjax_llm.report import drawing

  drawn, axes = pyplot.subplots(figsize=(6, 3.6), dpi=100, layout='constrained')
  trained = {
    name: cell
    if 'curve' in cell
    else cell | {'curve': results[cell['follows']]['curve']}
    for name, cell in results.items()
    if 'curve' in cell or 'follows' in cell
  }
  marks = 'osD^vP'
  for number, (name, cell) in enumerate(trained.items()):
    axes.plot(
      [cell['peak']['total'] / 1e6],
      [equal(cell)[-1][1]],
      color=drawing.COLOURS[number],
      marker=marks[number % len(marks)],
      linestyle='none',
      label=name,
    )
  start = next(iter(trained.values()))['curve'][0][1]
  axes.axhline(start, color=drawing.INK, linestyle='dotted', linewidth=1.1)
  axes.set(
    xlabel='peak memory of a step, MB',
    ylabel='held-out loss, nats/token',
  )
  axes.grid(True, color=drawing.GRID, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  buffer = io.BytesIO()
  drawn.savefig(buffer)
  pyplot.close(drawn)
  Image.open(buffer).convert('RGB').quantize(64).save(path, optimize=True)
