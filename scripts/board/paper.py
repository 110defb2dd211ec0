"""Plans the set-ups of `configs/published.py`, without weights."""

import re
import runpy

import suites

# Rows of `fedjax_llm.plan` that the table shows.
ROWS = (
  ('together, a device', 'memory, one device'),
  ('up, a round', 'up, a round'),
  ('up and down, 200 rounds', 'up and down'),
  ('operations, 200 rounds', 'operations'),
)


def planned(name: str) -> dict[str, str]:
  """Returns the rows of the plan of a set-up."""
  from fedjax_llm import plan

  path = suites.ROOT / 'configs' / 'published.py'
  text = plan.run(['--config', f'{path}:{name}'])
  rows = {}
  for line in text.splitlines():
    key, *rest = re.split(r'\s{2,}', line.strip(), maxsplit=1)
    if rest:
      rows[key] = rest[0]
  return rows


def markdown() -> str:
  """Returns a table of the set-ups: memory, bytes and operations."""
  setups = runpy.run_path(str(suites.ROOT / 'configs' / 'published.py'))
  lines = [
    '| set-up | clients, a round | ' + ' | '.join(n for _, n in ROWS) + ' |',
    '|---|---|' + '---|' * len(ROWS),
  ]
  plans: dict[tuple, dict[str, str]] = {}
  for name, (_, clients, cohort, _, *model) in setups['SETUPS'].items():
    # Neither texts nor the number of clients change a round's program.
    shape = (cohort, name == 'openfedllm_dpo', *model)
    rows = plans.get(shape) or plans.setdefault(shape, planned(name))
    cells = ' | '.join(rows.get(key, '') for key, _ in ROWS)
    lines.append(f'| `{name}` | {clients}, {cohort} | {cells} |')
  return '\n'.join(lines)
