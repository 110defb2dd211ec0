"""The figure of a sweep: a metric against the rounds, a band a setting."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.sweep.table import LEVEL, Interval
from fedjax_llm.types import Error

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = (
  *('#0072B2', '#D55E00', '#009E73', '#CC79A7'),
  *('#E69F00', '#56B4E9', '#000000', '#8C6D1F'),
)
_STYLES = ('-', '--', '-.', ':')
_WIDEST = 40  # characters of a line of the legend


def draw(
  curves: Mapping[str, Sequence[tuple[int, Interval]]],
  metric: str,
  title: str = '',
) -> Any:
  """Returns a figure of means as lines, with intervals as bands.

  Args:
    curves: rounds with means over seeds, by the setting's name.
    metric: the name of the vertical axis.
    title: the title, the fields that are compared.

  Raises:
    Error: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
  except ImportError as error:
    raise Error(
      'figures need matplotlib: pip install fedjax_llm[viz].'
    ) from error
  drawn = {name: curve for name, curve in curves.items() if curve}
  labels = [textwrap.fill(name, _WIDEST) for name in drawn]
  lines = sum(label.count('\n') + 1 for label in labels)
  columns = 1 + lines // 32
  widest = max((len(x) for y in labels for x in y.split('\n')), default=0)
  beside = columns * (0.6 + 0.08 * widest)  # inches
  deep = max(4.2, 0.9 + 0.2 * -(-lines // columns))
  figure = Figure(figsize=(6.4 + beside, deep), layout='constrained', dpi=150)
  axes = figure.subplots()
  for i, curve in enumerate(drawn.values()):
    rounds = [number for number, _ in curve]
    means = [point.mean for _, point in curve]
    colour = _COLOURS[i % len(_COLOURS)]
    style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
    axes.plot(
      *(rounds, means, style),
      color=colour,
      linewidth=1.8,
      marker='o' if len(rounds) <= 12 else None,
      markersize=3.5,
      label=labels[i],
    )
    half = [point.half or 0.0 for _, point in curve]
    if any(half):
      low = [m - h for m, h in zip(means, half)]
      high = [m + h for m, h in zip(means, half)]
      axes.fill_between(
        rounds, low, high, color=colour, alpha=0.15, linewidth=0
      )
  axes.set_xlabel('round')
  axes.set_ylabel(metric)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  num = max((x.num for curve in drawn.values() for _, x in curve), default=0)
  if num > 1:
    bands = f'means over {num} seeds, {100 * LEVEL:.0f} % intervals'
    title = f'{title}\n{bands}' if title else bands
  if title:
    axes.set_title(title, loc='left', fontsize='medium')
  if drawn:
    figure.legend(
      loc='outside right upper', ncols=columns, frameon=False, fontsize='small'
    )
  return figure
