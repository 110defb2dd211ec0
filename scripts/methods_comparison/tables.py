"""Collects the results of a comparison: numbers, a table and a figure."""

import datetime
import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from scipy import stats

from fedjax_llm.evals.likelihood import worst_mean

BASELINE = 'fed_it'
MAX_TOKENS = 30_000
BRANCHES = {
  'baseline': ('local_only',),
  'one rank': ('fed_it', 'ffa_lora', 'rolora', 'fedex_lora'),
  'mixed ranks': ('flexlora', 'het_lora'),
  'personalised': ('fed_sa', 'ditto'),
}
BRANCH = {name: branch for branch, own in BRANCHES.items() for name in own}


def records(workdir: pathlib.Path) -> list[dict]:
  """Returns the records of a run, with the evaluation before round 1 first."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def num_rounds(workdir: pathlib.Path) -> int:
  """Returns the number of completed rounds of a run."""
  return max((record['round'] for record in records(workdir)), default=0)


def collect(runs: Mapping[tuple[str, int], pathlib.Path]) -> dict:
  """Returns {'before': {seed: losses}, 'methods': {name: {seed: numbers}}}.

  Also the date and the tokens by seed. Exits if a run is missing, or if runs of
  one seed trained on different numbers of tokens.
  """
  methods: dict[str, dict[int, dict]] = {}
  before, tokens = {}, {}
  for (name, seed), workdir in runs.items():
    if not (workdir / 'metrics.jsonl').exists():
      raise SystemExit(f'{workdir} is missing: run without --table first.')
    rounds = records(workdir)
    by_round = [record['local/tokens'] for record in rounds[1:]]
    if tokens.setdefault(seed, by_round) != by_round:
      raise SystemExit(
        f'{workdir} trained on {sum(by_round):.0f} tokens, another run of seed '
        f'{seed} on {sum(tokens[seed]):.0f}: no table of unequal budgets.'
      )
    if sum(by_round) > MAX_TOKENS:
      raise SystemExit(f'{workdir} trained on more than {MAX_TOKENS} tokens.')
    before[seed] = losses(rounds[0])
    methods.setdefault(name, {})[seed] = numbers(rounds)
  return {
    'date': datetime.date.today().isoformat(),
    'tokens': {seed: sum(by_round) for seed, by_round in tokens.items()},
    'before': before,
    'methods': methods,
  }


def losses(record: dict) -> dict[str, float]:
  """Returns the mean loss of clients, of the worst tenth and of new clients.

  Each client is evaluated with its own served parameters; a client that no
  round has trained has the initial model.
  """
  clients = dict(record['evals/heldout/clients'])
  clients |= record.get('evals/personal/own/clients', {})
  each = np.array(list(clients.values()))
  return {
    'loss': float(np.mean(each)),
    'worst': worst_mean(each),
    'unseen': record['evals/new/client_mean'],
  }


def numbers(run: list[dict]) -> dict[str, float | None]:
  """Returns the losses after the last round, bytes, error and seconds."""
  rounds = run[1:]
  total = lambda field: sum(each[field] for each in rounds)
  error = [
    each['aggregators/error'] for each in rounds if 'aggregators/error' in each
  ]
  return {
    **losses(run[-1]),
    'up': total('uploads/bytes') / 1e6,
    'down': total('downloads/bytes') / 1e6,
    'error': float(np.mean(error)) if error else None,
    # The first round compiles.
    'seconds': float(np.median([each['time/round'] for each in rounds[1:]])),
  }


def interval(values: list[float]) -> tuple[float, float]:
  """Returns the mean and half of its 95 % interval (Student's t over seeds)."""
  mean, n = float(np.mean(values)), len(values)
  spread = float(np.std(values, ddof=1)) / math.sqrt(n)
  return mean, float(stats.t.ppf(0.975, n - 1)) * spread


def against(results: dict, name: str, field: str) -> tuple[float, float]:
  """Returns the mean difference to the baseline by seed, and its interval."""
  own, other = results['methods'][name], results['methods'][BASELINE]
  return interval([own[seed][field] - other[seed][field] for seed in own])


def markdown(results: dict) -> str:
  """Returns the results as a Markdown table with one row for each method."""
  lines = [
    '| method | branch | clients that train | their worst tenth | clients that '
    'do not | against FedIT, paired | up, MB | down, MB | aggregation error '
    '| s a round |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  show = lambda pair: f'{pair[0]:.3f} ± {pair[1]:.3f}'
  over = lambda by_seed, field: interval([x[field] for x in by_seed.values()])
  kinds = ('loss', 'worst', 'unseen')
  before = ' | '.join(show(over(results['before'], kind)) for kind in kinds)
  lines.append(f'| before | | {before} | | | | | |')
  for name, by_seed in results['methods'].items():
    mean = lambda field, by_seed=by_seed: over(by_seed, field)[0]
    paired = '' if name == BASELINE else show(against(results, name, 'loss'))
    error = by_seed[min(by_seed)]['error']
    # In float32 the metric resolves about 1e-3 where a rule changes the basis.
    error = '' if error is None else f'{mean("error"):.1e}'
    cells = ' | '.join(show(over(by_seed, kind)) for kind in kinds)
    lines.append(
      f'| `{name}` | {BRANCH[name]} | {cells} | {paired} | {mean("up"):.1f} '
      f'| {mean("down"):.1f} | {error} | {mean("seconds"):.1f} |'
    )
  return '\n'.join(lines)


def write(results: dict, out: pathlib.Path) -> None:
  """Writes `results.json` and `results.png` into a folder."""
  out.mkdir(parents=True, exist_ok=True)
  (out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  figure(results, out / 'results.png')


def figure(results: dict, path: pathlib.Path) -> None:
  """Draws each method's loss, its difference to the baseline, and its bytes."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  names = list(results['methods'])[::-1]
  colors = dict(zip(BRANCHES, ('0.4', '#0072b2', '#d55e00', '#009e73')))
  whole, panels = plt.subplots(
    1, 3, figsize=(11, 0.45 * len(names) + 2), sharey=True,
    layout='constrained',
  )  # fmt: skip
  loss, paired, moved = panels
  sides = (('loss', 0.15, 'o', True), ('unseen', -0.15, 's', False))
  for row, name in enumerate(names):
    by_seed, color = results['methods'][name], colors[BRANCH[name]]
    fill = lambda full, color=color: color if full else 'white'
    for kind, shift, marker, full in sides:
      own = interval([numbers[kind] for numbers in by_seed.values()])
      apart = against(results, name, kind) if name != BASELINE else (0.0, 0.0)
      for axes, (mean, half) in ((loss, own), (paired, apart)):
        axes.errorbar(
          mean, row + shift, xerr=half, fmt=marker, color=color,
          markerfacecolor=fill(full), capsize=3, markersize=6, linewidth=1.4,
        )  # fmt: skip
    for way, marker, full in (('up', '^', True), ('down', 'v', False)):
      shift = 0.15 if full else -0.15
      total = np.mean([numbers[way] for numbers in by_seed.values()])
      if total:
        moved.plot(
          total, row + shift, marker, color=color, markersize=8,
          markerfacecolor=fill(full),
        )  # fmt: skip
    if not any(x['up'] + x['down'] for x in by_seed.values()):
      moved.annotate(
        'nothing travels', (0.03, row), color=color, va='center', fontsize=9,
        xycoords=('axes fraction', 'data'),
      )  # fmt: skip
  loss.set_yticks(range(len(names)), names)
  loss.set_xlabel('held-out loss, nats a token')
  paired.axvline(0, color='0.6', linewidth=1, zorder=0)
  paired.set_xlabel(f'difference to {BASELINE}, seed by seed')
  moved.set_xscale('log')
  ticks = (5, 10, 20, 50, 100, 200, 500)
  low, high = moved.get_xlim()
  moved.set_xticks([x for x in ticks if low / 2 < x < high * 2], minor=False)
  moved.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
  moved.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  moved.set_xlabel('MB of all clients in a run (log axis)')
  gray = {'color': '0.3', 'linestyle': 'none', 'markersize': 7}
  marks = (
    ('o', '0.3', 'clients that train'),
    ('s', 'white', 'clients that do not'),
    ('^', '0.3', 'up'),
    ('v', 'white', 'down'),
  )
  handles = [
    plt.Line2D([], [], color=color, linewidth=6, label=branch)
    for branch, color in colors.items()
  ]
  handles += [
    plt.Line2D([], [], marker=m, markerfacecolor=fill, label=what, **gray)
    for m, fill, what in marks
  ]
  # Columns are filled first: branches above, marks below.
  order = [handles[i // 2 + len(handles) // 2 * (i % 2)] for i in range(8)]
  whole.legend(
    handles=order, loc='outside upper center', ncols=4, frameon=False
  )
  whole.supxlabel(
    f'mean and 95 % interval over {len(results["before"])} seeds; '
    'left is better',
    fontsize=10,
  )
  for axes in panels:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='x', color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)
  whole.savefig(path, dpi=150)
  plt.close(whole)
