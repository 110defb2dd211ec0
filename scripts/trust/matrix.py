"""The matrix of `scripts/arena`: defences by attacks, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.sweep.table import interval

# The most that a kind may cost a round: counted operations, time.
LIMITS = {
  'client-level': (1.05, 1.15),
  'example-level': (None, 2.0),
  'secure sum': (None, 1.3),
}


def costs(results: Mapping[str, Any]) -> str:
  """Returns the ratios of `scripts/privacy_costs` to a plain round."""
  lines = [
    '| kind | operations | limit | time | limit | ms a round |',
    '|---|---|---|---|---|---|',
  ]
  for name, row in results['kinds'].items():
    limits = LIMITS.get(name, (None, None))
    first, second = (f'{limit:.2f}' if limit else '' for limit in limits)
    lines.append(
      f'| {name} | {row["operations_ratio"]:.4f} | {first} | '
      f'{row["time_ratio"]:.2f} | {second} | {row["milliseconds"]:.0f} |'
    )
  return '\n'.join(lines)


def spelled(values: Sequence[float]) -> str:
  """Returns the mean with half of its 95 % interval over seeds."""
  result = interval(values)
  assert result is not None  # there is a value
  if result.half is None:
    return f'{result.mean:.3f}'
  return f'{result.mean:.3f} ± {result.half:.3f}'


def table(cells: Sequence[Mapping[str, Any]]) -> str:
  """Returns Markdown: losses and successes at the largest share of attackers.

  Rows are defences, columns attacks. A second table follows where there are
  smaller shares: its rows are attacks and shares, its columns defences.
  """
  most = max(x['fraction'] for x in cells)
  main = [x for x in cells if x['fraction'] == most or x['attack'] == 'none']
  attacks = _ordered(main, 'attack')
  attacks.sort(key=lambda name: name != 'none')
  lines = _titles('held-out loss', attacks)
  for defence in _ordered(main, 'defence'):
    row = [_loss(main, defence, attack) for attack in attacks]
    lines.append(f'| {defence} | {" | ".join(row)} |')
  fooling = [x for x in attacks if _rates(main, None, x)]
  if fooling:
    lines += ['', *_titles('success of the attack', fooling)]
    for defence in _ordered(main, 'defence'):
      row = [_success(main, defence, attack) for attack in fooling]
      if any(row):
        lines.append(f'| {defence} | {" | ".join(row)} |')
  few = [x for x in cells if x['fraction'] < most and x['attack'] != 'none']
  if not few:
    return '\n'.join(lines)
  defences = _ordered(few, 'defence')
  lines += ['', *_titles('attack and its share', defences)]
  for attack in _ordered(few, 'attack'):
    for share in sorted({x['fraction'] for x in cells}):
      some = [x for x in cells if x['fraction'] == share and x['seed'] == 0]
      row = []
      for defence in defences:
        text, rate = _loss(some, defence, attack), _rates(some, defence, attack)
        row.append(f'{text}; success {rate[0]:.2f}' if rate else text)
      if any(row):
        lines.append(f'| {attack}, {share:.0%} | {" | ".join(row)} |')
  return '\n'.join(lines)


def _ordered(cells: Sequence[Mapping[str, Any]], field: str) -> list[str]:
  return list(dict.fromkeys(x[field] for x in cells))


def _titles(first: str, names: Sequence[str]) -> list[str]:
  return [f'| {first} | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']


def _loss(cells, defence: str, attack: str) -> str:
  losses = [
    x['loss'] for x in cells if (x['defence'], x['attack']) == (defence, attack)
  ]
  return spelled(losses) if losses else ''


def _rates(cells, defence: str | None, attack: str) -> list[float]:
  """Returns the success rates of an attack, against all defences for None."""
  return [
    x['success']
    for x in cells
    if x['attack'] == attack
    and defence in (None, x['defence'])
    and 'success' in x
  ]


def _success(cells, defence: str, attack: str) -> str:
  rates = _rates(cells, defence, attack)
  return spelled(rates) if rates else ''


def audited(summary: Mapping[str, Any]) -> str:
  """Returns the tables of `scripts/audit` as Markdown."""
  models = {kind: each for kind, each in summary['models'].items() if each}
  runs = summary['runs']
  inversion = summary['inversion']
  lines: list[str] = []
  names = dict.fromkeys(
    name
    for each in models.values()
    for x in each
    for name in x
    if name != 'seconds' and not name.startswith('_')
  )
  if models:
    lines.append(f'| attack | {" | ".join(models)} |')
    lines.append('|---' * (len(models) + 1) + '|')
  for name in sorted(names):
    row = [
      spelled([x[name] for x in each if name in x])
      if any(name in x for x in each)
      else ''
      for each in models.values()
    ]
    lines.append(f'| {name} | {" | ".join(row)} |')
  claims = dict.fromkeys(x['claim'] for x in runs)
  lines += [
    '',
    '| noise of | right guesses | lower bound of epsilon |',
    '|---|---|---|',
  ]
  for claim in sorted(claims, key=lambda c: c or 1e9):
    some = [x for x in runs if x['claim'] == claim]
    right = ', '.join(f'{x["correct"]} of {x["made"]}' for x in some)
    bounds = ', '.join(f'{x["bound"]:.2f}' for x in some)
    kind = 'none' if claim is None else f'epsilon {claim:g}'
    lines.append(f'| {kind} | {right} | {bounds} |')
  for x in inversion:
    lines += [
      '',
      f'Tokens of a text recovered from one gradient: {x["recall"]:.0%}; '
      f'recovered tokens that are in the text: {x["precision"]:.0%}.',
    ]
  return '\n'.join(lines)
