"""The tables and the figure of `scripts/compare_peft`, from its cells."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).parent / 'cells'
KINDS = (
  *('full', 'head', 'bias', 'norms', 'LoRA', '(IA)3'),
  *('bottleneck', 'prefix', 'soft prompt'),
)
MODELS = ('minilm', 'smollm2')
SEEDS = (0, 1, 2)


def read(folder: pathlib.Path = FOLDER) -> dict[str, dict[str, list[dict]]]:
  """Returns the cells {model: {kind: cells by seed}}."""
  result = {}
  for model in MODELS:
    files = sorted((folder / model).glob('*-[0-9].json'))
    read = [json.loads(file.read_text()) for file in files]
    by_kind = {
      kind: [cell for cell in read if cell['kind'] == kind] for kind in KINDS
    }
    if read:
      result[model] = {kind: own for kind, own in by_kind.items() if own}
  return result


def point(cell: Mapping[str, Any], number: int) -> Mapping[str, Any]:
  """Returns the point of a cell's curve at a round.

  A run that ended, for a loss that is not finite, has its last point.
  """
  points = [p for p in cell['curve'] if p['round'] <= number]
  return points[-1]


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Returns the mean, with the smallest and largest of several values.

  >>> spread([1.0, 2.0, 3.0], 1), spread([0.5])
  ('2.0 (1.0 to 3.0)', '0.500')
  """
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) == 1:
    return text
  return f'{text} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def size(number: float) -> str:
  """Returns bytes as MB.

  >>> size(1_234_567_890), size(1_234_567), size(12_345)
  ('1,235', '1.2', '0.012')
  """
  mega = number / 1e6
  return f'{mega:,.0f}' if mega >= 100 else f'{mega:.2g}'


def markdown(by_kind: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Returns the table of a model, with missing cells named below it.

  Raises:
    SystemExit: cells of one seed have learned different numbers of tokens.

  >>> markdown({})
  'No cell has been trained.'
  """
  if not by_kind:
    return 'No cell has been trained.'
  labelled = 'accuracy' in next(iter(by_kind.values()))[0]['curve'][0]
  measure = 'accuracy' if labelled else 'loss'
  lines = [
    f'| kind | numbers | rate | {measure} before | {measure}, equal tokens '
    f'| MB | {measure}, equal bytes | rounds | MB | s a round |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  tokens: dict[int, float] = {}
  for kind, own in by_kind.items():
    first = own[0]
    even = [point(cell, cell['equal_tokens']) for cell in own]
    small = [point(cell, cell['equal_bytes']) for cell in own]
    for cell, end in zip(own, even):
      if end['round'] < cell['equal_tokens']:
        continue
      if tokens.setdefault(cell['seed'], end['tokens']) != end['tokens']:
        raise SystemExit(
          f'{kind}, seed {cell["seed"]} learned {end["tokens"]:.0f} tokens, '
          f'another kind {tokens[cell["seed"]]:.0f}: no table of unequal '
          'budgets.'
        )
    before = statistics.mean(cell['curve'][0][measure] for cell in own)
    rounds = first['equal_bytes']
    within = spread([p[measure] for p in small]) if rounds else 'no round fits'
    pause = statistics.median(cell['seconds_a_round'] for cell in own)
    lines.append(
      f'| {kind} | {first["numbers"]:,} | {first["rate"]:g} | {before:.3f} '
      f'| {spread([p[measure] for p in even])} | {size(even[0]["bytes"])} '
      f'| {within} | {rounds} | {size(small[0]["bytes"])} | {pause:.1f} |'
    )
  missing = [
    f'{kind}, seed {seed}'
    for kind, own in by_kind.items()
    for seed in SEEDS
    if seed not in [cell['seed'] for cell in own]
  ]
  if missing:
    lines += ['', f'Missing: {"; ".join(missing)}.']
  return '\n'.join(lines)


def figure(known: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes loss or accuracy against bytes, at equal tokens and equal bytes."""
  import io

  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from PIL import Image

  from fedjax_llm.report import drawing

  drawn, panels = pyplot.subplots(
    1, len(known), figsize=(5 * len(known), 4.2), dpi=100, squeeze=False,
    layout='constrained',
  )  # fmt: skip
  colours = dict(zip(KINDS, drawing.COLOURS))
  for axes, (model, by_kind) in zip(panels[0], known.items()):
    measure = 'loss'
    for kind, own in by_kind.items():
      measure = 'accuracy' if 'accuracy' in own[0]['curve'][0] else 'loss'
      for at, marker in (('equal_tokens', 'o'), ('equal_bytes', '^')):
        if not own[0][at]:
          continue
        ends = [point(cell, cell[at]) for cell in own]
        axes.plot(
          [p['bytes'] / 1e6 for p in ends],
          [p[measure] for p in ends],
          color=colours[kind], marker=marker, linestyle='none',
          label=kind if at == 'equal_tokens' else None,
        )  # fmt: skip
    axes.set(
      xscale='log',
      xlabel='MB up and down, all clients and rounds',
      ylabel='held-out accuracy' if measure == 'accuracy' else 'held-out loss',
      title=f'{model}: dots equal tokens, triangles equal bytes',
    )
    axes.grid(True, color=drawing.GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
  buffer = io.BytesIO()
  drawn.savefig(buffer)
  pyplot.close(drawn)
  Image.open(buffer).convert('RGB').quantize(255).save(path, optimize=True)
