"""The results of `scripts/device_checks` as text."""

from typing import Any


def short(result: dict[str, Any]) -> str:
  """Returns a result in a few words.

  >>> short({'tokens_per_second': 1234.5, 'share_of_peak': 0.25})
  '1,234 tokens/s, 25.0 % of peak'
  """
  for field in ('error', 'skipped'):
    if field in result:
      return f'{field}: {result[field]}'
  if 'tokens_per_second' in result:
    parts = [f'{result["tokens_per_second"]:,.0f} tokens/s']
    if 'share_of_peak' in result:
      parts.append(f'{100 * result["share_of_peak"]:.1f} % of peak')
    if result.get('peak_bytes'):
      parts.append(f'{result["peak_bytes"] / 1e9:.2f} GB')
    if 'compile_seconds' in result:
      parts.append(f'compiled in {result["compile_seconds"]:.1f} s')
    return ', '.join(parts)
  cell = lambda x: f'{x:.4g}' if isinstance(x, float) else str(x)
  some = [f'{name} {cell(x)}' for name, x in result.items()]
  return ', '.join(some)[:300]


def add_shares(results: dict[str, Any]) -> None:
  """Adds the share of the measured bf16 rate to every point with operations.

  The operations are those that the round needs at least, for all frameworks
  alike, and the rate is that of the stage `machine` on the same device.
  """
  machine = results['stages'].get('machine', {}).get('points', {})
  rate = machine.get('rates', {}).get('bfloat16')
  for stage in results['stages'].values():
    for result in stage['points'].values():
      if rate and 'operations' in result and 'seconds' in result:
        share = result['operations'] / result['seconds'] / rate
        result['share_of_peak'] = share


def text(results: dict[str, Any]) -> str:
  """Returns all points, stage by stage, and the ratios of the comparisons."""
  lines = []
  for name, stage in results['stages'].items():
    lines.append(f'== {name} ({stage["status"]})')
    lines += [f'   {k}: {short(v)}' for k, v in stage['points'].items()]
    if 'error' in stage:
      lines.append(f'   {stage["error"].strip().splitlines()[-1][:300]}')
  if results.get('dry'):
    return '\n'.join([*lines, 'Tiny shapes: no number here means anything.'])
  return '\n'.join([*lines, *ratios(results)])


def ratios(results: dict[str, Any]) -> list[str]:
  """Returns ours divided by each PyTorch loop, for every regime of both.

  A point is named 'REGIME, FRAMEWORK'; loops over clients are measured on a
  few clients, since their speed does not depend on the number of clients.
  """
  points: dict[str, dict[str, float]] = {}
  for stage in results['stages'].values():
    for name, result in stage['points'].items():
      regime, comma, framework = name.partition(', ')
      if comma and 'tokens_per_second' in result:
        speed = result['tokens_per_second']
        points.setdefault(regime, {})[framework] = speed
  lines = []
  for regime, speeds in points.items():
    ours = speeds.get('ours')
    others = {k: v for k, v in speeds.items() if not k.startswith('ours')}
    # Loops one after another are measured for one cohort of each row shape.
    rows = regime.partition('x')[2]
    for other, by in points.items():
      if other != regime and other.partition('x')[2] == rows:
        loops = {k: v for k, v in by.items() if k.startswith('torch, loop')}
        others = loops | others
    if ours and others:
      cells = [f'{name} {ours / v:.2f}' for name, v in others.items()]
      lines.append(f'ours / {regime}: {"; ".join(cells)}')
  return ['== ratios', *lines] if lines else []
