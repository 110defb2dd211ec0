"""Draws one figure for each trend, small enough to be committed."""

import io
import pathlib

from fedjax_llm.types import Error


def save(path: pathlib.Path, trend, result) -> None:
  try:
    import matplotlib
  except ImportError as error:
    raise Error(
      'figures need matplotlib: pip install fedjax_llm[viz].'
    ) from error
  matplotlib.use('Agg')
  from matplotlib import pyplot
  from PIL import Image  # matplotlib brings it

  figure = pyplot.figure(figsize=(8, 3.2), dpi=100, layout='constrained')
  trend.draw(figure, result['measured'])
  for axes in figure.axes:
    axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(
    f'{trend.TITLE} (verdict: {result["verdict"]})',
    fontsize=10,
    x=0.01,
    ha='left',
  )
  drawn = io.BytesIO()
  figure.savefig(drawn)
  pyplot.close(figure)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.open(drawn).convert('RGB').quantize(64).save(path, optimize=True)
