"""Data of runs: curves, losses of clients, differences of configs."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.report.runs import Run
from fedjax_llm.run import config

# Fields that do not change the results of a run.
_SILENT = ('compilation_cache', 'hosts', 'tracking', 'profile')
STATIONS = {
  'time/setup': 'setting up',
  'time/data': 'data and clients',
  'time/round': 'training, uploads, server',
  'time/evals': 'tests',
  'time/checkpoint': 'checkpoints',
}
AXES = {
  'rounds': (),
  'tokens': ('local/tokens',),
  'bytes': ('uploads/bytes', 'downloads/bytes'),
}
# Axes of metrics that already count from the start (`clients.timed`).
SO_FAR = {
  'seconds': ('clock/seconds',),
  'joules': ('clock/joules',),  # of the devices
}
SERVED = 'served'  # personal models if a run has them, else the shared model


class Curve(NamedTuple):
  x: list[float]
  y: list[float]


def value(record: Mapping[str, Any], field: str) -> float | None:
  """Returns a metric of a record if it is a finite number, else None."""
  number = record.get(field)
  if not isinstance(number, int | float) or not math.isfinite(number):
    return None
  return float(number)


def total(run: Run, *fields: str) -> float:
  return sum(value(r, field) or 0.0 for r in run.records for field in fields)


def served(record: Mapping[str, Any], name: str = 'loss') -> float | None:
  """Returns the held-out loss of personal models, else of the shared one."""
  own = value(record, f'evals/personal/own/{name}')
  return value(record, f'evals/heldout/{name}') if own is None else own


def curve(run: Run, field: str, axis: str = 'rounds') -> Curve:
  """Returns a field of all records against what a run has used so far.

  The axis is one of `AXES` or `SO_FAR`: rounds, tokens, bytes, simulated
  seconds or joules. `field` may be 'served/loss' or 'served/accuracy'. After
  its first round a run with personal models has points only in rounds that
  evaluate them.
  """
  xs, ys, so_far = [], [], 0.0
  where, _, name = field.partition('/')
  counted = axis in SO_FAR
  fields = SO_FAR[axis] if counted else AXES[axis]
  for record in run.records:
    more = sum(value(record, f) or 0.0 for f in fields)
    so_far = max(so_far, more) if counted else so_far + more
    y = served(record, name) if where == SERVED else value(record, field)
    if y is not None:
      xs.append(float(record['round']) if axis == 'rounds' else so_far)
      ys.append(y)
  return Curve(xs, ys)


def last_list(run: Run, field: str) -> tuple[int, list[float]] | None:
  """Returns the last round with a list of numbers in a field, and the list."""
  for record in reversed(run.records):
    values = record.get(field)
    if isinstance(values, list) and values and None not in values:
      return record['round'], values
  return None


class Clients(NamedTuple):
  """Losses by client, at the first evaluation and at the last one."""

  own: bool  # after: each client's own model
  before: Mapping[str, float | None]
  after: Mapping[str, float | None]
  round: int  # of `after`


def clients(run: Run) -> Clients | None:
  """Returns each client's held-out losses; None without evaluations."""
  tested = [r for r in run.records if r.get('evals/heldout/clients')]
  before = tested[0]['evals/heldout/clients'] if tested else {}
  for record in reversed(run.records):
    for kind in ('personal/own', 'heldout'):
      if after := record.get(f'evals/{kind}/clients'):
        return Clients(kind != 'heldout', before, after, record['round'])
  return None


class Change(NamedTuple):
  name: str
  examples: int | None
  before: float | None
  after: float | None

  @property
  def change(self) -> float | None:
    if self.before is None or self.after is None:
      return None
    return self.after - self.before


def worst(run: Run, num: int | None = None) -> list[Change]:
  """Returns clients by loss, the highest first; not finite counts as worst."""
  losses = clients(run)
  if losses is None:
    return []
  held = (run.sizes or {}).get('clients', {})
  changes = [
    Change(name, held.get(name, {}).get('examples'), losses.before.get(name), x)
    for name, x in losses.after.items()
  ]
  order = lambda c: -math.inf if c.after is None else -c.after
  return sorted(changes, key=order)[:num]


def stations(run: Run) -> dict[str, float]:
  """Returns the seconds of the whole run by activity."""
  spent = {title: total(run, field) for field, title in STATIONS.items()}
  return spent if any(spent.values()) else {}


def same_clients(runs: Sequence[Run]) -> list[tuple[Mapping, list[Run]]]:
  """Groups runs with the same clients and sizes; returns (sizes, runs)."""
  groups: list[tuple[Mapping, list[Run]]] = []
  for run in runs:
    if run.sizes is None:
      continue
    for held, members in groups:
      if _clients(held) == _clients(run.sizes):
        members.append(run)
        break
    else:
      groups.append((run.sizes, [run]))
  return groups


def _clients(sizes: Mapping[str, Any]) -> dict[str, Any]:
  return {name: sizes[name] for name in sizes if name != 'unit'}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
  """Returns the fields in which the configs differ, a cell for each run."""
  differ: set[str] = set()
  for a, b in itertools.pairwise(runs):
    differ |= set(config.same(a.config, b.config, ignore=_SILENT))
  # A section that a run lacks is compared by its fields.
  differ -= {field.rpartition('.')[0] for field in differ}
  return {f: [_cell(run.config, f) for run in runs] for f in sorted(differ)}


def everything(run: Run) -> dict[str, str]:
  """Returns all fields of a config, as text."""
  fields = config.same({}, run.config, ignore=_SILENT)
  return {field: _cell(run.config, field) for field in fields}


def _cell(tree: Any, field: str) -> str:
  for name in field.split('.'):
    if not isinstance(tree, Mapping) or name not in tree:
      return 'absent'
    tree = tree[name]
  return str(tree) if isinstance(tree, str | int | float | None) else repr(tree)


def quantile(values: Iterable[float], q: float) -> float:
  """Returns a quantile, interpolated between the two nearest values.

  >>> quantile([3, 1], 0.5)
  2.0
  """
  ordered = sorted(values)
  place = q * (len(ordered) - 1)
  low = math.floor(place)
  high = min(low + 1, len(ordered) - 1)
  return ordered[low] + (place - low) * (ordered[high] - ordered[low])
