"""Draws figures: colours, an SVG for the page, a PNG for a paper."""

import contextlib
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fedjax_llm.types import Error

# Each has a contrast of 3 or more on white and on the page's dark ground.
COLOURS = (
  *('#2f7ed8', '#d9691a', '#2a9d5c', '#9467d8', '#d6455d'),
  *('#1594a6', '#a87432', '#cf5fae', '#858a1f', '#7387a3'),
)
DASHES = ('solid', 'dashed', 'dotted')
# In an SVG these two become the page's own, light or dark.
INK, GRID = '#1d1f23', '#dcdfe3'

_RC = {
  'font.size': 9.0,
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'axes.titlesize': 9.5,
  'axes.labelsize': 9.0,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.linewidth': 0.7,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.formatter.useoffset': False,
  'axes.unicode_minus': True,
  'grid.color': GRID,
  'grid.linewidth': 0.7,
  'text.color': INK,
  'text.parse_math': False,  # names of runs may hold a $
  'xtick.color': INK,
  'ytick.color': INK,
  'lines.linewidth': 1.7,
  'lines.markersize': 3.2,
  'legend.frameon': False,
  'svg.fonttype': 'none',
}


class Key(NamedTuple):
  """An entry of a legend: the label of a colour and dash."""

  label: str
  colour: str
  dash: str = 'solid'


class Picture(NamedTuple):
  """A figure before it is drawn.

  `draw(axes)` draws it, `alt` is its alternative text, `keys` explains its
  colours where they are not the colours of the runs.
  """

  name: str  # the name of its file, and of its anchor on the page
  title: str
  alt: str
  draw: Callable[[Any], None]
  keys: Sequence[Key] = ()
  size: tuple[float, float] = (4.2, 2.9)  # inches


def run_key(number: int, label: str) -> Key:
  """Returns the key of a run; the first thirty have different styles."""
  dash = DASHES[number // len(COLOURS) % len(DASHES)]
  return Key(label, COLOURS[number % len(COLOURS)], dash)


@contextlib.contextmanager
def _style(salt: str = '') -> Iterator[None]:
  try:
    import matplotlib
  except ImportError as error:
    raise Error(
      'a report is drawn with matplotlib, which is not installed '
      '(pip install "fedjax_llm[viz]").'
    ) from error
  settings: Any = {**_RC, 'svg.hashsalt': salt}
  with matplotlib.rc_context(settings), warnings.catch_warnings():
    # The browser may have letters that the measuring font lacks.
    warnings.filterwarnings('ignore', message='Glyph .* missing from font')
    yield


def figure(picture: Picture, keys: Sequence[Key] = ()) -> Any:
  """Returns a matplotlib figure with its title, and the keys below it.

  Raises:
    Error: matplotlib is not installed.
  """
  with _style():
    drawn = _drawn(picture, len(keys))
    drawn.axes[0].set_title(picture.title, loc='left', pad=9)
    _legend(drawn, keys)
    return drawn


def svg(picture: Picture) -> str:
  """Returns an `<svg>` element with the colours and font of its page.

  Its ids begin with the name of the picture.
  """
  out = io.StringIO()
  with _style(picture.name):
    _drawn(picture).savefig(
      out, format='svg', transparent=True, metadata={'Date': None}
    )
  text = out.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'\s*<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'\bid="', f'id="{picture.name}-', text)
  text = re.sub(r'(url\(#|href="#)', rf'\1{picture.name}-', text)
  text = re.sub(r'font: ([\d.]+)px [^;\"]+', r'font-size: \1px', text)
  text = re.sub(r'font-family: [^;"]+;? ?', '', text)
  text = text.replace(INK, 'currentColor').replace(GRID, 'var(--grid)')
  alt = html.escape(picture.alt)
  head = f'<svg role="img" aria-label="{alt}"'
  text = re.sub(r'<svg (?:width|height)="[^"]*" ', '<svg ', text, count=1)
  text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', text, count=1)
  text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', text, count=1)
  return text.replace('<svg', head, 1).strip()


def png(picture: Picture, keys: Sequence[Key] = ()) -> bytes:
  """Returns a PNG on white, with title and keys, 200 dots an inch."""
  out = io.BytesIO()
  drawn = figure(picture, keys)
  with _style():
    drawn.savefig(
      out, format='png', dpi=200, facecolor='white', bbox_inches='tight'
    )
  return out.getvalue()


def _drawn(picture: Picture, num_keys: int = 0) -> Any:
  from matplotlib.figure import Figure

  width, height = picture.size
  height += 0.17 * -(-num_keys // 2)
  drawn = Figure(figsize=(width, height), layout='constrained')
  picture.draw(drawn.subplots())
  return drawn


def _legend(drawn: Any, keys: Sequence[Key]) -> None:
  if not keys:
    return
  from matplotlib.lines import Line2D

  mark: Any = Line2D
  marks = [
    mark([], [], color=key.colour, linestyle=key.dash, linewidth=2.2)
    for key in keys
  ]
  # A label that begins with an underscore would be left out.
  names = [f'\u200a{shortened(key.label, 34)}' for key in keys]
  drawn.legend(marks, names, loc='outside lower left', ncols=2, fontsize=8.0)


def shortened(text: str, length: int) -> str:
  """Returns text cut in the middle, since names of runs differ at their ends.

  >>> shortened('abcdefgh', 5)
  'ab…gh'
  """
  if len(text) <= length:
    return text
  half = (length - 1) // 2
  return f'{text[: length - 1 - half]}…{text[-half:]}'
