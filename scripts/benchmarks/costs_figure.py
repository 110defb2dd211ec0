"""Draws the time of a round by cohort, width, length and block."""

import io
import pathlib
from collections.abc import Callable
from typing import Any

from fedjax_llm.report import drawing

# Marks and dashes differ too, so that lines differ without colours.
LOOKS = {
  'ours': ('fedjax_llm', drawing.COLOURS[0], 'o', 'solid'),
  'torch': ('torch + peft, eager loop', drawing.COLOURS[1], 's', 'dashed'),
}
PANELS = {
  'cohort': ('clients in the cohort', 'ms a round'),
  'width': ('width of the model', 'µs a token'),
  'length': ('tokens in a row', 'µs a token'),
  'block': ('clients in a block', 'µs a token'),
}


def save(
  path: pathlib.Path, results: dict[str, Any], fit: Callable[[Any], Any]
) -> None:
  """Writes the figure of `costs.py`; `fit` returns the fitted line's costs."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
  from PIL import Image  # matplotlib brings it

  figure, grid = pyplot.subplots(
    2, 2, figsize=(8, 5.4), dpi=100, layout='constrained'
  )
  for (panel, (across, up)), axes in zip(
    PANELS.items(), grid.flat, strict=True
  ):
    measured = results['costs'][panel]
    for key, (label, colour, mark, dash) in LOOKS.items():
      points = {int(n): y for n, y in measured.get(key, {}).items() if y}
      if not points:
        continue
      tokens = measured['tokens']
      each = lambda n, y, tokens=tokens: y * 1e3 / tokens[str(n)]
      scale = each if panel != 'cohort' else lambda n, y: y
      axes.plot(
        list(points),
        [scale(n, y) for n, y in points.items()],
        color=colour,
        marker=mark,
        markersize=4,
        linestyle=dash,
        linewidth=1.6,
        label=label,
      )
    axes.set(xscale='log', yscale='log', xlabel=across, ylabel=up)
    numbers = [int(n) for n in measured['ours']]
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.4, high * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color=drawing.GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  first = grid.flat[0]
  line = fit(results['costs']['cohort'])
  numbers = [int(n) for n in results['costs']['cohort']['ours']]
  first.plot(
    numbers,
    [line['a_ms'] + line['b_ms'] * n for n in numbers],
    color=drawing.INK,
    linestyle='dotted',
    linewidth=1.1,
    label=f'{line["a_ms"]:.1f} + {line["b_ms"]:.2f} N ms',
  )
  first.legend(frameon=False, fontsize=8)
  drawn = io.BytesIO()
  figure.savefig(drawn)
  pyplot.close(figure)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.open(drawn).convert('RGB').quantize(64).save(path, optimize=True)
