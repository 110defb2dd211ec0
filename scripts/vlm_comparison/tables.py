"""The table and the figure of a comparison of prompts on pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TITLES = {
  'zero_shot': 'zero-shot',
  'prompt_fl': 'PromptFL',
  'fed_otp': 'FedOTP',
  'fed_pgp_clip': 'FedPGP',
  'fed_tpg': 'FedTPG',
  'fed_clip': 'FedCLIP',
}
VENDORS = {
  'google': 'Google',
  'twitter': 'Twitter',
  'fluent': 'Microsoft (Fluent 3D)',
}
COLUMNS = ('own', 'base', 'new')


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of accuracies: mean +- standard deviation over seeds."""
  lines = [
    '| method | own | base | new | harmonic mean of base and new | bytes up |',
    '|---|---|---|---|---|---|',
  ]
  for method, title in TITLES.items():
    some = [cell for cell in cells if cell['method'] == method]
    if not some:
      lines.append(f'| {title} | missing | | | | |')
      continue
    values = [np.array([cell[name] for cell in some]) for name in COLUMNS]
    values.append(2 / (1 / values[1] + 1 / values[2]))
    texts = [f'{100 * x.mean():.1f} ± {100 * x.std():.1f}' for x in values]
    if len(some) < 3:
      texts[0] += f' ({len(some)} of 3 seeds)'
    sent = f'{some[0]["bytes_up"]:,}'
    lines.append(f'| {title} | {" | ".join(texts)} | {sent} |')
  return '\n'.join(lines)


def recalls(results: Mapping[str, Any]) -> str:
  """Returns a table of recall@10 of `scripts/fit_dual_encoder`, by vendor."""
  lines = ['| pictures of | recall@10 |', '|---|---|']
  for domain, title in VENDORS.items():
    lines.append(f'| {title} | {results["recall"][domain]:.2f} |')
  return '\n'.join([*lines, f'| chance | {results["chance"]:.2f} |'])


def draw(cells: Sequence[Mapping[str, Any]], path: Any) -> None:
  """Draws bars of the means with a point for each seed."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 3.2))
  names = [m for m in TITLES if any(c['method'] == m for c in cells)]
  for i, column in enumerate(COLUMNS):
    of = [[100 * c[column] for c in cells if c['method'] == m] for m in names]
    at = np.arange(len(names)) + 0.26 * (i - 1)
    axes.bar(at, [np.mean(x) for x in of], 0.24, label=column)
    for x, values in zip(at, of):
      axes.plot([x] * len(values), values, '.', color='black', markersize=3)
  axes.set_xticks(range(len(names)), [TITLES[m] for m in names])
  axes.set(ylabel='accuracy, %', ylim=(0, 100))
  axes.legend(ncols=3, frameon=False, loc='upper left')
  figure.tight_layout()
  figure.savefig(path, dpi=150)
