"""Writes measured results as Markdown tables.

Imports no measuring code, so that the tables of `scripts/README.md` can be
compared with the committed JSON files where no peer is installed.
"""

from typing import Any

import numpy as np
from runners import RUNNERS

BLOCK = 16  # clients that train at once in the panel `cohort` of `costs.py`


def table(regimes: dict[str, Any]) -> str:
  """Returns speed, first round and memory by regime and framework."""
  lines = [
    '| regime | framework | tokens/s (spread) | our best / it | '
    'first round, s | peak, MB |',
    '|---|---|---|---|---|---|',
  ]
  for regime, results in regimes.items():
    there = [x for x in results if x.startswith('ours')]
    ours = max((results[x]['tokens_per_second'] for x in there), default=None)
    for name, runner in RUNNERS.items():
      if name not in results:
        continue
      r = results[name]
      low, high = r['spread']
      ratio = f'{ours / r["tokens_per_second"]:.2f}' if ours else ''
      lines.append(
        f'| {regime} | {runner.label} | {r["tokens_per_second"]:,.0f} '
        f'({low:,.0f}..{high:,.0f}) | {ratio} | {r["first_round"]:.1f} | '
        f'{r["peak_mb"]:,.0f} |'
      )
  return '\n'.join(lines)


def overview(regimes: dict[str, Any]) -> str:
  """Returns frameworks by regimes: tokens/s, and our best as a multiple."""
  lines = [
    '| tokens/s (our best / it) | ' + ' | '.join(regimes) + ' |',
    '|---' * (len(regimes) + 1) + '|',
  ]
  speed = {
    regime: {
      name: r['tokens_per_second']
      for name, r in results.items()
      if name in RUNNERS
    }
    for regime, results in regimes.items()
  }
  for name, runner in RUNNERS.items():
    cells = []
    for by_name in speed.values():
      best = max(x for n, x in by_name.items() if n.startswith('ours'))
      it = by_name.get(name)
      ours = name.startswith('ours')
      ratio = '' if ours or not it else f' ({best / it:.2f})'
      cells.append(f'{it:,.0f}{ratio}' if it else '')
    if any(cells):
      lines.append(f'| {runner.label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def aggregation(number: Any, results: dict[str, Any]) -> str:
  """Returns the table of `aggregation.py` for one number of clients."""
  lines = [
    f'| {number} clients | library | ms | GB/s | share of a copy | GFLOP/s |',
    '|---|---|---|---|---|---|',
  ]
  for name, r in results.items():
    rule, library = name.split(': ')
    done = r.get('gflop_per_second')
    lines.append(
      f'| {rule} | {library} | {1e3 * r["seconds"]:,.1f} | '
      f'{r["gb_per_second"]:.2f} | {100 * r["share_of_copy"]:.0f} % | '
      f'{"" if done is None else format(done, ".0f")} |'
    )
  return '\n'.join(lines)


def rounding(results: dict[str, Any]) -> str:
  """Returns the table of `rounding.py`, one row for each case."""
  lines = [
    '| `svd_round` of | fedjax_llm, s | dense SVD, s (jax, numpy) | '
    'times faster | relative error | excess distance |',
    '|---|---|---|---|---|---|',
  ]
  for name, r in results.items():
    s = r['seconds']
    lines.append(
      f'| {name} | {s["ours"]:.3f} | {s["dense, jax"]:.3f}, '
      f'{s["dense, numpy"]:.3f} | {r["times_faster"]:.3g} | '
      f'{r["relative_error"]:.1e} | {r["relative_excess"]:.1e} |'
    )
  return '\n'.join(lines)


def line(by_number: dict[str, float], least: int) -> tuple[float, float]:
  """Fits a + b N from `least` clients on, by relative errors."""
  points = [(int(n), ms) for n, ms in by_number.items() if int(n) >= least]
  n, ms = np.array(points).T
  slope, start = np.polyfit(n, ms, 1, w=1 / ms)
  return float(start), float(slope)


def overhead(cohort: dict[str, Any]) -> dict[str, float]:
  """Splits the cost of a client into matrix products and the rest, in ms."""
  start, slope = line(cohort['ours'], BLOCK)
  most = max(cohort['ours'], key=int)
  products = cohort['counted_gflop'][most] / int(most)
  products *= 1e3 / cohort['gflop_per_second']
  result = {
    'a_ms': start,
    'b_ms': slope,
    'products_ms': products,
    'fixed_ms_a_client': slope - products,
  }
  if all(cohort['torch'].values()):
    result['torch_a_ms'], result['torch_b_ms'] = line(cohort['torch'], 1)
  return result


def costs(results: dict[str, Any]) -> str:
  """Returns the fitted cost of a round and the table of the regimes' shares."""
  fit = overhead(results['costs']['cohort'])
  lines = [
    f'A round of N clients takes {fit["a_ms"]:.2f} + {fit["b_ms"]:.3f} N ms. '
    f"Matrix products take {fit['products_ms']:.3f} ms of each client's share "
    f'and everything else {fit["fixed_ms_a_client"]:.3f} ms.'
  ]
  if 'torch_b_ms' in fit:
    lines.append(
      f'The eager torch loop takes {fit["torch_a_ms"]:.2f} + '
      f'{fit["torch_b_ms"]:.2f} N ms.'
    )
  lines += [
    '',
    '| regime | s a round | counted GFLOP | GFLOP/s | matrix products of this '
    'machine, GFLOP/s | share, counted | share, executed |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, r in results['shares'].items():
    lines.append(
      f'| {name} | {r["seconds"]:.3f} | {r["counted_gflop"]:.1f} | '
      f'{r["counted_gflop"] / r["seconds"]:.0f} | '
      f'{r["peak_gflop_per_second"]:.0f} | {100 * r["share"]:.0f} % | '
      f'{100 * r["share_executed"]:.0f} % |'
    )
  return '\n'.join(lines)
