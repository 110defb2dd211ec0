"""What the workdirs of a comparison say: numbers, a table, a figure."""

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
  """The rounds of a run, the tests before the first one included."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def num_rounds(workdir: pathlib.Path) -> int:
  """How many rounds a run has done."""
  return max((told['round'] for told in records(workdir)), default=0)


def collect(runs: Mapping[tuple[str, int], pathlib.Path]) -> dict:
  """{'before': {seed: numbers}, 'methods': {name: {seed: numbers}}, ...}.

  Exits where a run is missing, or not all trained on the same tokens.
  """
  methods: dict[str, dict[int, dict]] = {}
  before, tokens = {}, {}
  for (name, seed), workdir in runs.items():
    if not (workdir / 'metrics.jsonl').exists():
      raise SystemExit(f'{workdir} is missing: run without --table first.')
    told = records(workdir)
    by_round = [told_round['local/tokens'] for told_round in told[1:]]
    if tokens.setdefault(seed, by_round) != by_round:
      raise SystemExit(
        f'{workdir} trained on {sum(by_round):.0f} tokens, another run of seed '
        f'{seed} on {sum(tokens[seed]):.0f}: no table of unequal budgets.'
      )
    if sum(by_round) > MAX_TOKENS:
      raise SystemExit(f'{workdir} trained on more than {MAX_TOKENS} tokens.')
    before[seed] = losses(told[0])
    methods.setdefault(name, {})[seed] = numbers(told)
  return {
    'date': datetime.date.today().isoformat(),
    'tokens': {seed: sum(by_round) for seed, by_round in tokens.items()},
    'before': before,
    'methods': methods,
  }


def losses(record: dict) -> dict[str, float]:
  """Each client's loss with what it is served; a newcomer's is the served one.

  A client that no round trained has the model that everybody starts with.
  """
  clients = dict(record['evals/heldout/clients'])
  clients |= record.get('evals/personal/own/clients', {})
  each = np.array(list(clients.values()))
  return {
    'loss': float(np.mean(each)),
    'worst': worst_mean(each),
    'unseen': record['evals/new/client_mean'],
  }


def numbers(told: list[dict]) -> dict[str, float | None]:
  rounds = told[1:]
  total = lambda field: sum(each[field] for each in rounds)
  error = [
    each['aggregators/error'] for each in rounds if 'aggregators/error' in each
  ]
  return {
    **losses(told[-1]),
    'up': total('uploads/bytes') / 1e6,
    'down': total('downloads/bytes') / 1e6,
    'error': float(np.mean(error)) if error else None,
    # The first round compiles.
    'seconds': float(np.median([each['time/round'] for each in rounds[1:]])),
  }


def interval(values: list[float]) -> tuple[float, float]:
  """The mean and half of its 95 % interval (Student's t over seeds)."""
  mean, n = float(np.mean(values)), len(values)
  spread = float(np.std(values, ddof=1)) / math.sqrt(n)
  return mean, float(stats.t.ppf(0.975, n - 1)) * spread


def against(found: dict, name: str, field: str) -> tuple[float, float]:
  """The difference to the baseline, seed by seed, and its interval."""
  own, other = found['methods'][name], found['methods'][BASELINE]
  return interval([own[seed][field] - other[seed][field] for seed in own])


def markdown(found: dict) -> str:
  lines = [
    '| method | branch | clients that train | their worst tenth | clients that '
    'do not | against FedIT, paired | up, MB | down, MB | aggregation error '
    '| s a round |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  show = lambda pair: f'{pair[0]:.3f} ± {pair[1]:.3f}'
  over = lambda by_seed, field: interval([x[field] for x in by_seed.values()])
  kinds = ('loss', 'worst', 'unseen')
  before = ' | '.join(show(over(found['before'], kind)) for kind in kinds)
  lines.append(f'| before | | {before} | | | | | |')
  for name, by_seed in found['methods'].items():
    mean = lambda field, by_seed=by_seed: over(by_seed, field)[0]
    paired = '' if name == BASELINE else show(against(found, name, 'loss'))
    error = by_seed[min(by_seed)]['error']
    # In float32 the metric resolves about 1e-3 where a rule changes the basis.
    told = '' if error is None else f'{mean("error"):.1e}'
    cells = ' | '.join(show(over(by_seed, kind)) for kind in kinds)
    lines.append(
      f'| `{name}` | {BRANCH[name]} | {cells} | {paired} | {mean("up"):.1f} '
      f'| {mean("down"):.1f} | {told} | {mean("seconds"):.1f} |'
    )
  return '\n'.join(lines)


def write(found: dict, out: pathlib.Path) -> None:
  """`results.json` and `results.png`."""
  out.mkdir(parents=True, exist_ok=True)
  (out / 'results.json').write_text(json.dumps(found, indent=1) + '\n')
  figure(found, out / 'results.png')


def figure(found: dict, path: pathlib.Path) -> None:
  """Each method's loss, its difference to the baseline, and what travels."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  names = list(found['methods'])[::-1]
  colors = dict(zip(BRANCHES, ('0.4', '#0072b2', '#d55e00', '#009e73')))
  whole, panels = plt.subplots(
    1, 3, figsize=(11, 0.45 * len(names) + 2), sharey=True,
    layout='constrained',
  )  # fmt: skip
  loss, paired, moved = panels
  sides = (('loss', 0.15, 'o', True), ('unseen', -0.15, 's', False))
  for row, name in enumerate(names):
    by_seed, color = found['methods'][name], colors[BRANCH[name]]
    fill = lambda full, color=color: color if full else 'white'
    for kind, shift, marker, full in sides:
      told = interval([numbers[kind] for numbers in by_seed.values()])
      apart = against(found, name, kind) if name != BASELINE else (0.0, 0.0)
      for axes, (mean, half) in ((loss, told), (paired, apart)):
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
    f'mean and 95 % interval over {len(found["before"])} seeds; left is better',
    fontsize=10,
  )
  for axes in panels:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='x', color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)
  whole.savefig(path, dpi=150)
  plt.close(whole)
