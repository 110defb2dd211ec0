"""Writes the page of `scripts/leaderboard` from the JSON files of its cells."""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ranking
import suites

MARK = '<!-- {suite}: written by scripts/leaderboard -->'
END = '<!-- end of {suite} -->'
TASKS = 3  # of which a test over tasks tells something


def read(folder: pathlib.Path) -> dict[tuple[str, str, int], dict[str, Any]]:
  """Returns the cells of a folder by (task, method, seed).

  Zero shot is the evaluation before the first round of FedIT.
  """
  result = {}
  for file in sorted(folder.glob('*.json')):
    cell = json.loads(file.read_text())
    if 'method' in cell:
      result[cell['task'], cell['method'], cell['seed']] = cell
  for (task, method, seed), cell in list(result.items()):
    if method == suites.BASELINE and 'before' in cell:
      zero = {**cell, **cell['before'], 'method': suites.ZERO}
      zero |= dict(up=0, down=0, steps=0, seconds_round=None, memory=None)
      result[task, suites.ZERO, seed] = zero
  return result


def missing(suite: suites.Suite, cells: Mapping) -> list[str]:
  """Returns a phrase for the cells of each seed and task without figures."""
  result = []
  for seed in suite.seeds:
    for task in suite.tasks:
      of = {m: cells.get((task, m, seed)) for m in suites.METHODS}
      absent = [m for m, cell in of.items() if cell is None]
      if absent:
        names = ', '.join(f'`{m}`' for m in absent)
        names = 'all methods' if len(absent) == len(of) else names
        result.append(f'{task}, seed {seed}, not run: {names}')
      result += [
        f'{task}, seed {seed}, `{m}`: {cell["failed"]}'
        for m, cell in of.items()
        if cell is not None and 'failed' in cell
      ]
  return result


def seeds_of(suite: suites.Suite, cells: Mapping, task: str) -> list[int]:
  """Returns the seeds with a score of every method that a task can run."""
  of = lambda m: [cells.get((task, m, s), {}) for s in suite.seeds]
  able = [m for m in suites.METHODS if not any('failed' in c for c in of(m))]
  has = lambda m, seed: 'score' in cells.get((task, m, seed), {})
  return [s for s in suite.seeds if able and all(has(m, s) for m in able)]


def ranked(suite: suites.Suite, cells: Mapping) -> list[str]:
  """Returns the tasks with a complete seed."""
  return [task for task in suite.tasks if seeds_of(suite, cells, task)]


def over_seeds(
  suite: suites.Suite, cells: Mapping, task: str, method: str, field: str
) -> list[float]:
  """Returns the values of a task's complete seeds, or [] without them."""
  seeds = seeds_of(suite, cells, task)
  values = [cells.get((task, method, s), {}).get(field) for s in seeds]
  return [] if any(v is None for v in values) else values  # type: ignore


def matrix(
  suite: suites.Suite, cells: Mapping
) -> tuple[list[str], np.ndarray, list[bool]]:
  """Returns the methods with all cells, their means [tasks, methods], and
  whether large values are good."""
  tasks = ranked(suite, cells)
  score = lambda t, m: over_seeds(suite, cells, t, m, 'score')
  whole = [
    m for m in suites.METHODS if tasks and all(score(t, m) for t in tasks)
  ]
  values = [[statistics.mean(score(t, m)) for m in whole] for t in tasks]
  largest = [suite.tasks[t].kind == 'accuracy' for t in tasks]
  return whole, np.array(values), largest


def table(suite: suites.Suite, cells: Mapping) -> str:
  """Returns the table: a row a method, sorted by mean rank."""
  whole, values, largest = matrix(suite, cells)
  counted = _counted(suite, cells)
  mean = {}
  if len(whole) > 2:
    mean = dict(zip(whole, ranking.ranks(values, largest).mean(0)))
  heads = []
  for name, task in suite.tasks.items():
    unit = 'accuracy ↑' if task.kind == 'accuracy' else 'nats a token ↓'
    heads += [f'{name}, {unit}', 'against FedIT']
  head = ['method', 'mean rank', *heads, 'up, MB', 'down, MB', 's a round']
  head += ['peak, GB', 'CPU s a run']
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  for method in sorted(suites.METHODS, key=lambda m: mean.get(m, math.inf)):
    row = [f'`{method}`', f'{mean[method]:.1f}' if method in mean else '']
    for task in suite.tasks:
      own = over_seeds(suite, cells, task, method, 'score')
      base = over_seeds(suite, cells, task, suites.BASELINE, 'score')
      row.append(_spread(own))
      apart = ''
      if own and base and method != suites.BASELINE:
        mean_apart, half = ranking.paired(own, base)
        apart = f'{mean_apart:+.3f}'
        if len(own) > 1:
          apart += f' ± {half:.3f}'
      row.append(apart)
    row += [
      _total(suite, counted, method, 'up', 1e6, 1),
      _total(suite, counted, method, 'down', 1e6, 1),
      _total(suite, counted, method, 'seconds_round', 1, 1),
      _largest(counted, method),
      _total(suite, counted, method, 'cpu_seconds', 1, 0)
      if method != suites.ZERO
      else '',
    ]
    lines.append(f'| {" | ".join(row)} |')
  return '\n'.join(lines)


def _spread(values: Sequence[float]) -> str:
  if not values:
    return ''
  if len(values) == 1:
    return f'{values[0]:.3f}'
  return f'{statistics.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})'


def _counted(suite: suites.Suite, cells: Mapping) -> dict[Any, Any]:
  """Returns the cells of complete seeds, the same for every method."""
  seeds = {task: seeds_of(suite, cells, task) for task in suite.tasks}
  return {key: cell for key, cell in cells.items() if key[2] in seeds[key[0]]}


def _total(suite, cells, method, field, scale, digits) -> str:
  """Returns the mean over tasks and seeds of a field that is a number."""
  values = [
    cell[field] / scale
    for (_, m, _), cell in cells.items()
    if m == method and cell.get(field) is not None
  ]
  return f'{statistics.mean(values):.{digits}f}' if values else ''


def _largest(cells: Mapping, method: str) -> str:
  values = [
    cell['memory']
    for (_, m, _), cell in cells.items()
    if m == method and cell.get('memory')
  ]
  return f'{max(values) / 1e9:.2f}' if values else ''


def text(name: str, suite: suites.Suite, cells: Mapping, figure: str) -> str:
  """Returns the part of the page between the marks of a suite."""
  whole, values, largest = matrix(suite, cells)
  done = [cell for cell in cells.values() if 'score' in cell]
  if not done:
    return 'No cell has been run.'
  dates = sorted({cell['date'] for cell in done})
  machines = ', '.join(sorted({cell['machine'] for cell in done}))
  rounds = ', '.join(f'{r}' for r in sorted({cell['rounds'] for cell in done}))
  seeds = ', '.join(map(str, suite.seeds))
  lines = [
    f'`scripts/leaderboard --suite {name}`, {rounds} rounds a run, seeds '
    f'{seeds}, {dates[0]} to {dates[-1]}, {machines} (shared). Tasks:',
    '',
    *(
      f'- {key}: {task.title}; complete seeds: '
      f'{", ".join(map(str, seeds_of(suite, cells, key))) or "none"}'
      for key, task in suite.tasks.items()
    ),
    '',
    'Scores are means over clients on their own held-out texts, each with the '
    'model that it is served, then over the complete seeds (smallest, '
    'largest). "Against FedIT" is the difference seed by seed with its 95 % t '
    'interval. Bytes are those of all rounds and clients of a run, seconds the '
    'median round; both are means over tasks and seeds. The peak is that of '
    'the process, of the largest run.',
    '',
    table(suite, cells),
    '',
  ]
  if len(whole) > 2 and len(values) >= TASKS:
    result = ranking.test(values, largest)
    lines += [
      f'Friedman over {len(values)} tasks (means over seeds) and '
      f'{len(whole)} methods: chi² = {result.chi2:.2f}, p = {result.p:.3f}. '
      f'Mean ranks differ at 5 % where they are {result.distance:.2f} apart '
      '(Nemenyi).',
      '',
      f'![mean ranks and the critical difference]({figure})',
      '',
    ]
  else:
    lines += [
      f"Friedman's test and Nemenyi's distance need {TASKS} tasks with a "
      f'complete seed; there are {len(values)}.',
      '',
    ]
  gaps = missing(suite, cells)
  if gaps:
    lines += ['Missing:', '', *(f'- {gap}' for gap in gaps)]
  else:
    lines.append('No cell is missing.')
  return '\n'.join(lines)


def put(page: pathlib.Path, name: str, new: str) -> None:
  """Replaces the part of a page between the marks of a suite."""
  start, end = MARK.format(suite=name), END.format(suite=name)
  before, _, rest = page.read_text().partition(start)
  _, _, after = rest.partition(end)
  page.write_text(f'{before}{start}\n\n{new}\n\n{end}{after}')


def write(
  page: pathlib.Path, name: str, suite: suites.Suite, cells: Mapping
) -> str:
  """Replaces a suite's part of the page and its figure; returns the text."""
  figure = f'{name}.png'
  new = text(name, suite, cells, figure)
  put(page, name, new)
  whole, values, largest = matrix(suite, cells)
  if len(whole) > 2 and len(values) >= TASKS:
    draw(whole, ranking.test(values, largest), page.parent / figure)
  return new


def draw(
  names: Sequence[str], result: ranking.Test, path: pathlib.Path
) -> None:
  """Draws mean ranks on a line, with bars over those that cannot be told."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  order = np.argsort(result.ranks)
  k = len(order)
  bars = ranking.cliques(result.ranks, result.distance)
  plot, axis = pyplot.subplots(figsize=(8, 1.6 + 0.24 * k))
  axis.set_xlim(0.5, k + 0.5)
  axis.set_ylim(-1.5 - k / 2 - 0.4 * len(bars), 1.6)
  axis.axis('off')
  axis.hlines(0, 1, k, color='black', lw=1)
  for tick in range(1, k + 1):
    axis.vlines(tick, 0, 0.15, color='black', lw=1)
    axis.text(tick, 0.25, str(tick), ha='center', va='bottom', fontsize=9)
  width = min(result.distance, k - 1)
  axis.hlines(1.2, 1, 1 + width, color='C3', lw=2)
  axis.text(
    1 + width / 2, 1.25, f'critical difference {result.distance:.2f}',
    ha='center', va='bottom', fontsize=9, color='C3',
  )  # fmt: skip
  for i, (low, high) in enumerate(bars):
    level = -0.3 - 0.35 * i
    axis.hlines(level, low - 0.05, high + 0.05, color='C0', lw=3)
  below = -0.4 - 0.35 * len(bars)
  for place, method in enumerate(order):
    left = place < (k + 1) // 2
    level = below - 0.9 * (place if left else k - 1 - place) / 1.8 - 0.2
    rank, edge = result.ranks[method], 0.9 if left else k + 0.1
    axis.plot([rank, rank, edge], [0, level, level], color='grey', lw=0.8)
    axis.text(
      edge, level, f'{names[method]} {rank:.1f}',
      ha='right' if left else 'left', va='center', fontsize=9,
    )  # fmt: skip
  plot.savefig(path, dpi=120, bbox_inches='tight')
  pyplot.close(plot)
