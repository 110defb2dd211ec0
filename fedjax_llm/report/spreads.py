"""Charts of many clients, and of time: boxes, bars and points."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.report import numbers
from fedjax_llm.report.drawing import (
  COLOURS,
  Key,
  Picture,
  run_key,
  shortened,
)
from fedjax_llm.report.runs import Run

_MANY = 400  # the largest number of points of a run that are drawn
_BEFORE = '#8b919b'


def distribution(runs: Sequence[Run]) -> Picture | str:
  """Returns a chart of clients' held-out losses: points and a box."""
  rows: list[tuple[str, str, list[float]]] = []
  parts, begun = [], []
  for i, run in enumerate(runs):
    losses = numbers.clients(run)
    if losses is None:
      continue
    known = lambda x: [v for v in x.values() if v is not None]
    before, after = known(losses.before), known(losses.after)
    name = shortened(run.label, 30)
    # Runs that begin with the same model begin with the same losses.
    if before and before not in begun:
      suffix = '' if len(runs) == 1 else f': {name}'
      rows.append((f'before training{suffix}', _BEFORE, before))
      begun.append(before)
    if after and losses.round:
      own = ', own models' if losses.own else ''
      title = f'{name}{own}, after round {losses.round}'
      rows.append((title, run_key(i, '').colour, after))
      half, most = numbers.quantile(after, 0.5), max(after)
      parts.append(f'{title}: median {half:.4g}, largest {most:.4g}')
  if not rows:
    return 'No client has been tested on held-out texts.'

  def draw(axes: Any) -> None:
    for place, (title, colour, values) in enumerate(rows):
      _box(axes, -place, values, colour)
      axes.text(
        0.0,
        -place + 0.34,
        title,
        transform=axes.get_yaxis_transform(),
        va='center',
        fontsize=8.5,
      )
    axes.set_ylim(-len(rows) + 0.6, 0.62)
    axes.set_yticks([])
    axes.spines['left'].set_visible(False)
    axes.set_xlabel(f'held-out loss of a client, nats per {runs[0].unit}')

  title = 'Held-out loss, client by client'
  size = (4.2, 0.75 + 0.5 * len(rows))
  if len(begun) == 1:
    rows[0] = ('before training', *rows[0][1:])
  more = f'; and {len(parts) - 6} more' if len(parts) > 6 else ''
  words = '; '.join(parts[:6]) + more if parts else 'Before training'
  return Picture('clients-loss', title, f'{title}. {words}.', draw, size=size)


def _box(axes: Any, y: float, values: Sequence[float], colour: str) -> None:
  """Draws quartiles as a bar, and the 5 % to 95 % quantiles as a line."""
  low, q1, half, q3, high = (
    numbers.quantile(values, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)
  )
  y -= 0.05
  axes.plot([low, high], [y, y], color=colour, linewidth=1.2)
  axes.barh(y, q3 - q1, 0.3, q1, color=colour, alpha=0.35)
  axes.plot([half, half], [y - 0.16, y + 0.16], color=colour, linewidth=2.4)
  if len(values) <= _MANY:
    # Golden-ratio steps keep neighbouring points apart.
    wobble = [0.24 * ((i * 0.618034) % 1.0 - 0.5) for i in range(len(values))]
    places = [y + w for w in wobble]
    axes.plot(values, places, 'o', color=colour, markersize=2.4, alpha=0.75)


def sizes(runs: Sequence[Run]) -> Picture | str:
  """Returns a chart of the clients' numbers of texts, the largest first."""
  groups = numbers.same_clients(runs)
  counts = [
    (
      sorted((c['examples'] for c in held['clients'].values()), reverse=True),
      of,
    )
    for held, of in groups
    if held.get('clients')
  ]
  if not counts:
    return 'What each client holds was not recorded (there is no clients.json).'
  keys, parts = [], []
  for number, (values, of) in enumerate(counts):
    who = of[0].label + (f' and {len(of) - 1} more' if len(of) > 1 else '')
    keys.append(run_key(number, who))
    parts.append(
      f'{len(values):,} clients hold {sum(values):,} texts, the smallest '
      f'{values[-1]:,}, the median {numbers.quantile(values, 0.5):,.0f}, the '
      f'largest {values[0]:,}'
    )

  def draw(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, (values, _) in zip(keys, counts, strict=True):
      if len(counts) == 1 and len(values) <= _MANY:
        axes.bar(range(1, len(values) + 1), values, 0.85, color=key.colour)
      else:
        x = range(1, len(values) + 1)
        axes.plot(x, values, color=key.colour, linestyle=key.dash)
    axes.grid(False, axis='x')
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel('clients, the largest first')
    axes.set_ylabel('texts to train on')

  title = 'Sizes of the clients'
  return Picture(
    'clients-sizes',
    title,
    f'{title}. {"; ".join(parts[:6])}.',
    draw,
    keys if len(keys) > 1 else (),
  )


def loss_by_size(runs: Sequence[Run]) -> Picture | str:
  """Returns a chart of held-out loss against the texts of a client."""
  points = []
  for i, run in enumerate(runs):
    losses = numbers.clients(run)
    if any(run.round for run in runs) and not (losses and losses.round):
      continue
    pairs = [
      (change.examples, change.after)
      for change in numbers.worst(run)
      if change.examples is not None and change.after is not None
    ]
    if pairs:
      points.append((run_key(i, run.label), pairs))
  if not points:
    return ''  # `sizes` or `distribution` returns the reason
  everyone = [pair for _, pairs in points for pair in pairs]
  small, large = min(e for e, _ in everyone), max(e for e, _ in everyone)
  wide = large > 20 * max(small, 1)

  def draw(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    for key, pairs in points:
      x, y = zip(*pairs, strict=True)
      axes.plot(
        *(x, y, 'o'),
        color=key.colour,
        alpha=0.7,
        rasterized=len(everyone) > 4 * _MANY,
      )
    if not wide:
      axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
      axes.set_xscale('log')
      axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:,.0f}'))
      axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel('texts a client trains on')
    axes.set_ylabel(f'held-out loss, nats per {runs[0].unit}')

  title = 'Held-out loss against size, a point a client'
  alt = f'{title}: from {small:,} to {large:,} texts.'
  return Picture('clients-loss-by-size', title, alt, draw)


def times(runs: Sequence[Run]) -> Picture | str:
  """Returns a chart of the seconds of each run by activity."""
  spent = [(run, numbers.stations(run)) for run in runs]
  spent = [(run, seconds) for run, seconds in spent if seconds]
  if not spent:
    return 'No time has been measured yet.'
  longest = max(sum(seconds.values()) for _, seconds in spent)
  unit, name = (3600, 'hours') if longest > 7200 else (1, 'seconds')
  if 180 < longest <= 7200:
    unit, name = 60, 'minutes'
  keys = [
    Key(title, COLOURS[i])
    for i, title in zip((9, 2, 0, 1, 3), numbers.STATIONS.values(), strict=True)
  ]
  parts = []
  for run, seconds in spent[:6]:
    each = ', '.join(f'{title} {s:.1f} s' for title, s in seconds.items())
    parts.append(f'{run.label}: {each}')

  def draw(axes: Any) -> None:
    for place, (run, seconds) in enumerate(spent):
      _stack(axes, -place, seconds, unit, [key.colour for key in keys])
      axes.text(
        0.0,
        -place + 0.36,
        shortened(run.label, 44),
        transform=axes.get_yaxis_transform(),
        va='center',
        fontsize=8.5,
      )
    axes.set_ylim(-len(spent) + 0.6, 0.62)
    axes.set_yticks([])
    axes.spines['left'].set_visible(False)
    axes.set_xlabel(name)

  title = 'Time by station'
  size = (4.2, 0.8 + 0.45 * len(spent))
  words = '; '.join(parts)
  return Picture('stations', title, f'{title}. {words}.', draw, keys, size)


def _stack(
  axes: Any,
  y: float,
  seconds: Mapping[str, float],
  unit: float,
  colours: Sequence[str],
) -> None:
  ends = [0.0, *itertools.accumulate(s / unit for s in seconds.values())]
  for start, end, colour in zip(ends, ends[1:], colours):
    axes.barh(y - 0.05, end - start, 0.36, start, color=colour)
