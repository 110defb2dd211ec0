"""The table and the figure of the cells: loss by epsilon and tuning."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

Cells = Mapping[tuple[str, str], Sequence[dict]]  # (tuning, epsilon) -> by seed


def read(folder: pathlib.Path) -> dict[tuple[str, str], list[dict]]:
  """Returns the cells of a folder by tuning and epsilon, in order of seed."""
  cells: dict[tuple[str, str], list[dict]] = {}
  for path in sorted(folder.glob('*.json')):
    cell = json.loads(path.read_text())
    cells.setdefault((cell['tuning'], cell['epsilon']), []).append(cell)
  return cells


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and half of its 95 % interval (Student's t over seeds)."""
  n = len(values)
  if n < 2:
    return float(np.mean(values)), math.nan
  spread = float(np.std(values, ddof=1)) / math.sqrt(n)
  return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * spread


def gains(cells: Sequence[dict]) -> list[float]:
  """Returns by how much each seed's held-out loss fell, nats a token."""
  return [cell['before'] - cell['after'] for cell in cells]


def markdown(cells: Cells, epsilons: Sequence[str]) -> str:
  """Returns the table: the fall of the held-out loss, with intervals."""
  head = ' | '.join(f'epsilon {e}' for e in epsilons)
  lines = [f'| tuning | {head} |', '|---' * (len(epsilons) + 1) + '|']
  for tuning in dict.fromkeys(name for name, _ in cells):
    row = []
    for epsilon in epsilons:
      own = cells.get((tuning, epsilon))
      if not own:
        row.append('-')
        continue
      mean, half = interval(gains(own))
      row.append(
        f'{mean:+.3f}' if math.isnan(half) else f'{mean:+.3f} ± {half:.3f}'
      )
    lines.append(f'| {tuning} | {" | ".join(row)} |')
  return '\n'.join(lines)


def figure(cells: Cells, epsilons: Sequence[str], path: pathlib.Path) -> None:
  """Draws the fall of the loss over epsilon, a line a tuning."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  fig, axes = plt.subplots(figsize=(5.5, 3.4), layout='constrained')
  for number, tuning in enumerate(dict.fromkeys(name for name, _ in cells)):
    there = [e for e in epsilons if (tuning, e) in cells]
    pairs = [interval(gains(cells[tuning, e])) for e in there]
    axes.errorbar(
      [epsilons.index(e) + 0.06 * number for e in there],
      [mean for mean, _ in pairs],
      [0.0 if math.isnan(half) else half for _, half in pairs],
      marker='o', capsize=3, label=tuning,
    )  # fmt: skip
  axes.axhline(0, color='0.6', linewidth=0.8)
  axes.set_xticks(range(len(epsilons)), epsilons)
  axes.set_xlabel('epsilon of a client')
  axes.set_ylabel('fall of the held-out loss, nats a token')
  axes.legend(frameon=False)
  fig.savefig(path, dpi=150)
  plt.close(fig)
