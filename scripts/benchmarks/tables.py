"""What was measured, as Markdown."""

from typing import Any

from runners import RUNNERS


def table(told: dict[str, Any]) -> str:
  lines = [
    '| regime | framework | tokens/s (spread) | our best / it | '
    'first round, s | peak, MB |',
    '|---|---|---|---|---|---|',
  ]
  for regime, results in told.items():
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


def overview(told: dict[str, Any]) -> str:
  """Frameworks by regimes: tokens/s, and how much faster our best is."""
  lines = [
    '| tokens/s (our best / it) | ' + ' | '.join(told) + ' |',
    '|---' * (len(told) + 1) + '|',
  ]
  speed = {
    regime: {
      name: r['tokens_per_second']
      for name, r in results.items()
      if name in RUNNERS
    }
    for regime, results in told.items()
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
