"""The matrix of `scripts/arena`: defences by attacks, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.sweep.table import interval


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
