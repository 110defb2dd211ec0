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
  """Returns Markdown: a row a defence, a column an attack and a fraction."""
  ordered = lambda field: list(dict.fromkeys(x[field] for x in cells))
  columns = [
    (attack, fraction)
    for attack in ordered('attack')
    for fraction in sorted({
      x['fraction'] for x in cells if x['attack'] == attack
    })
  ]  # fmt: skip
  head = [
    name if name == 'none' else f'{name}, {fraction:.0%}'
    for name, fraction in columns
  ]
  lines = [f'| held-out loss | {" | ".join(head)} |']
  lines.append('|---' * (len(columns) + 1) + '|')
  for defence in ordered('defence'):
    row = []
    for attack, fraction in columns:
      some = [
        x
        for x in cells
        if (x['defence'], x['attack'], x['fraction'])
        == (defence, attack, fraction)
      ]
      text = spelled([x['loss'] for x in some]) if some else ''
      if some and 'success' in some[0]:
        text += f'; success {spelled([x["success"] for x in some])}'
      row.append(text)
    lines.append(f'| {defence} | {" | ".join(row)} |')
  return '\n'.join(lines)


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
