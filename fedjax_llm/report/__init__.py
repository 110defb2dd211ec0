"""Writes one HTML page, and its figures, about one run or several.

    python -m fedjax_llm.report WORKDIR [WORKDIR ...] --out report.html

In a notebook, which displays the figure:

    report.figures(['runs/a', 'runs/b'])['loss-rounds']
"""

import pathlib
from typing import Any

from fedjax_llm.report import contents, drawing, markup
from fedjax_llm.report.runs import Paths, Run, read
from fedjax_llm.run import workdir
from fedjax_llm.types import Error

__all__ = ['Run', 'figures', 'page', 'read', 'write']


def page(paths: Paths, *, refresh: int | None = None) -> str:
  """Returns the report of these runs as one HTML page.

  Args:
    paths: the workdir of a run or several, or the folder of a sweep.
    refresh: seconds after which the page reloads; None: never.

  Raises:
    Error: the folder does not exist or holds no run, a file is damaged, or
      matplotlib is missing.

  >>> page('runs/nowhere')
  Traceback (most recent call last):
  fedjax_llm.types.Error: runs/nowhere: there is no such folder.
  """
  return markup.render(read(paths), refresh)


def figures(paths: Paths) -> dict[str, Any]:
  """Returns the figures of the report by name, as matplotlib figures.

  Figures without data in these runs are left out. Raises the errors of `page`.
  """
  runs = read(paths)
  return {
    picture.name: drawing.figure(picture, _keys(picture, runs))
    for picture in contents.pictures(runs)
  }


def write(
  paths: Paths,
  out: str | pathlib.Path,
  *,
  figures: str | pathlib.Path | None = None,
  refresh: int | None = None,
) -> list[Run]:
  """Writes the page, and its figures as PNG files, each atomically.

  Args:
    paths: as for `page`.
    out: the HTML file.
    figures: the folder of the figures; None: beside `out`, its name with
      '_files'.
    refresh: as for `page`.

  Returns:
    The runs as they were read.

  Raises:
    Error: as `page` does, or a file cannot be written.
  """
  out = pathlib.Path(out)
  folder = pathlib.Path(figures or out.with_name(f'{out.stem}_files'))
  runs = read(paths)
  text = markup.render(runs, refresh)
  for place in (folder, out.parent):
    try:
      place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise Error(f'{place} cannot be made: {error.strerror}.') from error
  for picture in contents.pictures(runs):
    image = drawing.png(picture, _keys(picture, runs))
    workdir.replace(folder / f'{picture.name}.png', image)
  workdir.replace(out, text)
  return runs


def _keys(picture: drawing.Picture, runs: list[Run]) -> list[drawing.Key]:
  if picture.keys or len(runs) == 1:
    return list(picture.keys)
  return [drawing.run_key(i, run.label) for i, run in enumerate(runs)]
