"""Line charts: losses and other metrics by round, and by layer."""

from collections.abc import Sequence
from typing import Any

from fedjax_llm.report import numbers
from fedjax_llm.report.drawing import COLOURS, Key, Picture, run_key
from fedjax_llm.report.numbers import Curve
from fedjax_llm.report.runs import Run, said
from fedjax_llm.run import metrics

Line = tuple[Key, Curve]
_NAMED = 6  # lines described in a figure's alternative text
_WHOLE = ('rounds', 'layers')
_MARKED = 25  # the largest number of points of a line with markers

# Charts of a single run.
_LOSSES = {
  'local/loss': Key('training', COLOURS[9], 'dotted'),
  'evals/heldout/loss': Key('held-out texts', COLOURS[0]),
  'evals/new/loss': Key('new clients', COLOURS[1]),
  'evals/personal/own/loss': Key('own models, held-out texts', COLOURS[2]),
}


def losses(runs: Sequence[Run]) -> list[Picture | str]:
  """Returns charts of loss by rounds, tokens and bytes, and of accuracy.

  Runs with a simulated clock also have charts by its seconds and joules.
  """
  unit = runs[0].unit
  label = f'loss, nats per {unit}'
  axes = {
    'rounds': 'rounds',
    'tokens': f'{unit}s trained on',
    'bytes': 'bytes up and down',
    'seconds': 'simulated seconds',
    'joules': 'simulated joules of the devices',
  }
  made: list[Picture | str] = []
  for axis, words in axes.items():
    if len(runs) == 1:
      title, lines = f'Loss against {words}', _of_one(runs[0], axis)
    else:
      title = f'Held-out loss against {words}'
      lines = _of_each(runs, 'served/loss', axis)
    if axis == 'bytes':
      silent = [
        run
        for run in runs
        if run.round and not numbers.total(run, *numbers.AXES['bytes'])
      ]
      if silent:
        made.append(said('Loss against bytes: nothing travels', silent, runs))
    if axis != 'rounds':  # a curve needs more than the start
      lines = [line for line in lines if line[1].x[-1] > 0]
    if axis in numbers.SO_FAR and lines:
      without = [
        run
        for run in runs
        if run.round and not numbers.total(run, *numbers.SO_FAR[axis])
      ]
      if without:
        made.append(said(f'{title}: no such figure', without, runs))
    if _curved(lines):
      keys = [key for key, _ in lines] if len(runs) == 1 else []
      name = f'loss-{axis}'
      made.append(_picture(name, title, words, label, lines, axis, keys))
    elif lines and axis == 'rounds':
      made.append(f'{title}: a single test so far, which is no curve.')
  untested = [run for run in runs if not numbers.curve(run, 'served/loss').x]
  if untested:
    text = 'Held-out loss: nothing has been tested'
    made.append(said(text, untested, runs))
  if len(runs) > 1 and _curved(lines := _of_each(runs, 'local/loss')):
    title = 'Training loss against rounds'
    made.append(_picture('loss-training', title, 'rounds', label, lines))
  if _curved(lines := _of_each(runs, 'served/accuracy')):
    title, label = 'Held-out accuracy against rounds', f'share of {unit}s'
    made.append(_picture('accuracy', title, 'rounds', label, lines))
  return made


def _curved(lines: Sequence[Line]) -> bool:
  """Returns True if a line has more than one point."""
  return any(len(line.x) > 1 for _, line in lines)


def rounds(
  runs: Sequence[Run], *, field: str, name: str, title: str, label: str
) -> list[Picture | str]:
  """Returns a chart of one field by round, and notes on runs without it."""
  lines = _of_each(runs, field)
  made = [_picture(name, title, 'rounds', label, lines)] if lines else []
  return [*made, *_lacking(runs, lines, title)]


def layers(
  runs: Sequence[Run], *, field: str, name: str, title: str, label: str
) -> list[Picture | str]:
  """Returns a chart of a field with a number a layer, from the last record."""
  lines, rounds = [], set()
  for i, run in enumerate(runs):
    if last := numbers.last_list(run, field):
      number, values = last
      line = Curve([*range(len(values))], values)
      lines.append((run_key(i, run.label), line))
      rounds.add(number)
  made = []
  if lines:
    after = f'after round {rounds.pop()}' if len(rounds) == 1 else 'at the end'
    words = 'layer, from the input on'
    whole = f'{title}, {after}'
    made.append(_picture(name, whole, words, label, lines, 'layers'))
  return [*made, *_lacking(runs, lines, title)]


def _lacking(
  runs: Sequence[Run], lines: Sequence[Line], title: str
) -> list[str]:
  if not any(run.round for run in runs):
    return [f'{title}: told from the first round on.']
  there = {key.label for key, _ in lines}
  others = [run for run in runs if run.label not in there and run.round]
  return [said(f'{title}: not told', others, runs)] if others else []


def _of_one(run: Run, axis: str) -> list[Line]:
  lines = [
    (key, numbers.curve(run, field, axis)) for field, key in _LOSSES.items()
  ]
  return [(key, line) for key, line in lines if line.x]


def _of_each(
  runs: Sequence[Run], field: str, axis: str = 'rounds'
) -> list[Line]:
  lines = [
    (run_key(i, run.label), numbers.curve(run, field, axis))
    for i, run in enumerate(runs)
  ]
  return [(key, line) for key, line in lines if line.x]


def _picture(
  name: str,
  title: str,
  xlabel: str,
  ylabel: str,
  lines: Sequence[Line],
  axis: str = 'rounds',
  keys: Sequence[Key] = (),
) -> Picture:
  def place(x: float) -> str:
    return f'{axis[:-1]} {x:.0f}' if axis in _WHOLE else _amount(x, axis)

  parts = []
  for key, (x, y) in lines[:_NAMED]:
    ends = [0, -1] if len(y) > 1 else [0]
    points = ', '.join(f'{y[i]:.4g} at {place(x[i])}' for i in ends)
    parts.append(f'{key.label}: {points}')
  more = f'; and {len(lines) - _NAMED} more' if len(lines) > _NAMED else ''
  alt = f'{title}. {"; ".join(parts)}{more}.'

  def draw(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for key, (x, y) in lines:
      marker = 'o' if len(x) <= _MARKED else None
      axes.plot(x, y, color=key.colour, linestyle=key.dash, marker=marker)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    whole = axis in _WHOLE
    ticks = MaxNLocator(6 if whole else 4, integer=whole, min_n_ticks=1)
    axes.xaxis.set_major_locator(ticks)
    if not whole:
      amount = FuncFormatter(lambda x, _: _amount(x, axis))
      axes.xaxis.set_major_formatter(amount)
    low = min(min(y) for _, (_, y) in lines)
    high = max(max(y) for _, (_, y) in lines)
    if 0 <= low <= 0.1 * high:
      axes.set_ylim(bottom=0)

  return Picture(name, title, alt, draw, keys)


def _amount(x: float, axis: str) -> str:
  """Returns bytes, tokens, seconds or joules as short text."""
  if axis in numbers.SO_FAR:
    return f'{x:,.4g} {axis[0] if axis == "seconds" else "J"}'
  amount = metrics.human_bytes(round(x))
  return amount if axis == 'bytes' else amount.removesuffix('B').strip()
