"""The page of a report: one HTML file without scripts or other files."""

import html
import time
from collections.abc import Sequence
from typing import Any

from fedjax_llm.report import contents, drawing
from fedjax_llm.report.contents import Section
from fedjax_llm.report.drawing import Key, Picture, run_key
from fedjax_llm.report.runs import Run
from fedjax_llm.report.style import CSS
from fedjax_llm.report.tables import Samples, Table
from fedjax_llm.run import narration

_OPEN = 8  # keys that are shown unfolded


def render(runs: Sequence[Run], refresh: int | None = None) -> str:
  """Returns the page as text.

  Args:
    runs: one or more runs.
    refresh: seconds after which the page reloads; None: never.
  """
  title = runs[0].label if len(runs) == 1 else f'{len(runs)} runs'
  again = ''
  if refresh is not None:
    again = f'<meta http-equiv="refresh" content="{refresh}">\n'
  sections = contents.sections(runs)
  links = ''.join(
    f'<a href="#{section.name}">{_text(section.title)}</a>'
    for section in sections
  )
  now = time.strftime('%Y-%m-%d %H:%M:%S')
  live = f', again every {refresh} s' if refresh is not None else ''
  body = '\n'.join(_section(section, runs) for section in sections)
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{again}<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="quiet">Federated fine-tuning, as of <time>{now}</time>{live}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _text(text: Any) -> str:
  """Returns text with markup and control characters escaped."""
  return html.escape(narration.printable(str(text)))


def _section(section: Section, runs: Sequence[Run]) -> str:
  parts = [f'<h2 id="{section.name}-title">{_text(section.title)}</h2>']
  if section.intro:
    parts.append(f'<p class="quiet">{_text(section.intro)}</p>')
  figures = [x for x in section.items if isinstance(x, Picture)]
  if len(runs) > 1 and any(not picture.keys for picture in figures):
    keys = [run_key(i, run.label) for i, run in enumerate(runs)]
    parts.append(_keys(keys, 'Runs'))
  if figures:
    parts.append(f'<div class="figures">{"".join(map(_figure, figures))}</div>')
  for item in section.items:
    if isinstance(item, Table):
      parts.append(_table(item, runs))
    elif isinstance(item, Samples):
      parts.append(_samples(item))
  notes = [item for item in section.items if isinstance(item, str) and item]
  if notes:
    each = ''.join(f'<li>{_text(text)}</li>' for text in notes)
    parts.append(f'<ul class="notes">{each}</ul>')
  inside = '\n'.join(parts)
  name = section.name
  head = f'<section id="{name}" aria-labelledby="{name}-title">'
  return f'{head}\n{inside}\n</section>'


def _figure(picture: Picture) -> str:
  keys = _keys(picture.keys, 'Key') if picture.keys else ''
  return (
    f'<figure id="{picture.name}">'
    f'<figcaption>{_text(picture.title)}</figcaption>'
    f'{drawing.svg(picture)}{keys}</figure>\n'
  )


def _swatch(key: Key) -> str:
  return (
    f'<i class="swatch" style="border-color:{key.colour};'
    f'border-top-style:{key.dash}"></i>'
  )


def _keys(keys: Sequence[Key], what: str) -> str:
  each = ''.join(f'<li>{_swatch(k)}{_text(k.label)}</li>' for k in keys)
  made = f'<ul class="keys" aria-label="{what}">{each}</ul>'
  if len(keys) <= _OPEN:
    return made
  return (
    f'<details><summary>Colours of {len(keys)} runs</summary>{made}</details>'
  )


def _table(table: Table, runs: Sequence[Run]) -> str:
  numeric = [
    any(isinstance(row[i], int | float) for row in table.rows)
    for i in range(len(table.header))
  ]
  swatches = {run.label: _swatch(run_key(i, '')) for i, run in enumerate(runs)}
  mark = lambda cell: swatches[cell] if table.of_runs else ''
  start = 1 if table.grouped else 0
  columns = range(start, len(table.header))
  kind = lambda i: ' class="number"' if numeric[i] else ''
  head = ''.join(
    f'<th scope="col"{kind(i)}>{_text(table.header[i])}</th>' for i in columns
  )
  lines, group = [], None
  for row in table.rows:
    if table.grouped and row[0] != group:
      group = row[0]
      lines.append(
        f'<tr class="group"><th scope="rowgroup" colspan="{len(columns)}">'
        f'<span>{mark(group)}{_cell(group)}</span></th></tr>'
      )
    first = mark(row[0]) if not start else ''
    cells = [
      f'<th scope="row"{_long(row[i])}>{first}{_cell(row[i])}</th>'
      if i == start
      else f'<td{kind(i) or _long(row[i])}>{_cell(row[i])}</td>'
      for i in columns
    ]
    lines.append(f'<tr>{"".join(cells)}</tr>')
  caption = _text(table.caption)
  rows = '\n'.join(lines)
  made = (
    f'<div class="scroll" id="{table.name}" role="region" tabindex="0" '
    f'aria-label="{caption}">\n<table><caption>{caption}</caption>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>\n</div>'
  )
  if table.folded:
    return f'<details><summary>{caption}</summary>\n{made}\n</details>'
  return made


def _long(cell: Any) -> str:
  return ' class="long"' if isinstance(cell, str) and len(cell) > 24 else ''


def _cell(cell: Any) -> str:
  if cell is None:
    return ''
  if isinstance(cell, float):
    return f'{cell:.4f}'.replace('-', '&minus;')
  if isinstance(cell, int):
    return f'{cell:,}'
  return _text(cell)


def _samples(samples: Samples) -> str:
  replies = [(['client'], samples.reply), *samples.said]
  each = ''.join(
    f'<div><dt>{_text(", ".join(names))}</dt>'
    f'<dd>{_text(text.strip()) or "<em>nothing</em>"}</dd></div>'
    for names, text in replies
  )
  return (
    f'<article class="sample"><h3>{_text(samples.client)}</h3>'
    f'<blockquote>{_text(samples.prompt.strip())}</blockquote>'
    f'<dl>{each}</dl></article>'
  )
