"""The program `sweep`: `run` trains a grid and returns a `Comparison`."""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run import builders, command, experiment, workdir
from fedjax_llm.run import config as configs
from fedjax_llm.run.sections import SPEC
from fedjax_llm.sweep import execute, table
from fedjax_llm.sweep import figure as figures
from fedjax_llm.sweep import folder as folders
from fedjax_llm.sweep import grid as grids
from fedjax_llm.types import Error

METRIC = 'evals/heldout/loss'


class Comparison(NamedTuple):
  """The result of a sweep; a notebook displays it as its table."""

  metric: str
  rows: Sequence[table.Row]
  curves: Mapping[str, Sequence[tuple[int, table.Interval]]]  # by setting
  names: Mapping[str, str]  # of the fields, as read
  seeds: Sequence[int]
  path: pathlib.Path  # the folder

  def markdown(self) -> str:
    """Returns the table: mean, interval, paired difference, bytes, seconds."""
    return table.markdown(self.rows, self.names, self.metric, len(self.seeds))

  def figure(self) -> Any:
    """Returns the metric against the rounds, a `matplotlib.figure.Figure`."""
    title = ' x '.join(self.names.values())
    return figures.draw(self.curves, self.metric, title)

  def _repr_markdown_(self) -> str:
    return self.markdown()


def run(
  config: str | os.PathLike | Mapping[str, Any],
  grid: Mapping[str, Iterable[Any]],
  *,
  seeds: int | Sequence[int] = 1,
  workdir: str | os.PathLike | None = None,
  baseline: Mapping[str, Any] | None = None,
  metric: str = METRIC,
  at_once: int | None = None,
  say: Callable[[str], None] = print,
) -> Comparison:
  """Trains every setting of a grid with every seed, and compares them.

  Args:
    config: `'configs/tiny.py:smoke'`, a ConfigDict or a dict.
    grid: values by field: `{'aggregator.name': ['mean', my_rule],
      'local.learning_rate': [1e-3, 1e-2]}`. A value may be a function, such as
      a builder written in a notebook; a whole section is a dict,
      `{'aggregator': [dict(name='mean'), dict(name='krum', num_byzantine=1)]}`.
    seeds: a number of seeds, from the config's own on, or a list.
    workdir: the folder; a second call with the same arguments continues there,
      or returns the finished result. None: a temporary one.
    baseline: values by field. Each setting is compared with the setting that
      has these values and equals it in all other fields. None: with the first.
    metric: the metric that is compared, after the last round.
    at_once: the number of runs of one program that train at a time; None: as
      many as this device computes efficiently, and its memory holds.
    say: prints the progress sentences.

  Raises:
    Error: `train` would refuse a config; a field or value does not exist; the
      folder holds other things.
  """
  source = 'config'
  if isinstance(config, str | os.PathLike):
    source = os.fspath(config)
    config = configs.load(source)
  conf, _ = configs.override(config, [], SPEC, source)
  where = workdir or tempfile.mkdtemp(prefix='sweep_')
  return compare(
    *(conf, grid, seeds, os.fspath(where), baseline),
    metric=metric,
    at_once=at_once,
    say=say,
  )


def compare(
  conf: Mapping[str, Any],
  grid: Mapping[str, Iterable[Any]],
  seeds: str | int | Sequence[int],
  path: str,
  baseline: Mapping[str, Any] | None,
  *,
  metric: str,
  at_once: int | None,
  say: Callable[[str], None],
) -> Comparison:
  """Returns the `Comparison` of `run` for a checked config."""
  if coordinator := (conf.get('hosts') or {}).get('coordinator'):
    raise Error(
      f'hosts.coordinator is {coordinator!r}: a sweep is one process; leave it '
      'out.'
    )
  if at_once is not None and at_once < 1:
    raise Error(f'--at-once is {at_once}; it must be at least 1.')
  grid = grids.listed(grid)
  settings = grids.settings(conf, grid)
  every = grids.seeds(seeds, conf.get('seed', 0))
  compared = grids.baseline(settings, baseline)
  for setting in settings:
    _check(setting)
  runs = grids.runs(settings, every)
  folder = folders.open(path, folders.identity(conf, grid, every))
  for note in dict.fromkeys(n for setting in settings for n in setting.notes):
    say(note)
  execute.execute(runs, folder, list(grid), at_once=at_once, say=say)

  results: list[list[Any]] = [[] for _ in settings]
  for one in runs:
    ended = folders.outcome(folder, one)
    assert ended is not None
    failed = ended.error
    results[one.setting].append(failed or folders.records(folder, one))
  words = [setting.words for setting in settings]
  names = grids.short(list(grid))
  complete = lambda own: [run for run in own if not isinstance(run, str)]
  label = lambda one: ', '.join(f'{names[f]}={w}' for f, w in one.items())
  comparison = Comparison(
    metric=metric,
    rows=table.rows(words, compared, results, metric),
    curves={
      label(one): table.curve(complete(own), metric)
      for one, own in zip(words, results)
    },
    names=names,
    seeds=every,
    path=folder.path,
  )
  _record(comparison)
  return comparison


def _check(setting: grids.Setting) -> None:
  """Raises the errors of a setting's builders before anything is computed."""
  make = lambda section: builders.build(
    setting.conf[section], SPEC.sections[section]
  )
  try:
    experiment.checked(setting.conf)
    adapter = make('adapter')
    # A method of a number of clients is checked when the texts are read.
    if not experiment.counts_clients(setting.conf):
      experiment.algorithm(
        setting.conf,
        loss=None,  # nothing is trained
        model=None,
        adapter=adapter,
        num_clients=1,
      )
  except Error as error:
    of = ' '.join(f'{f}={w}' for f, w in setting.words.items())
    raise Error(f'--grid {of}: {error}' if of else str(error)) from error


def _record(comparison: Comparison) -> None:
  """Writes table.json and table.csv beside the runs."""
  content = {
    'metric': comparison.metric,
    'level': table.LEVEL,
    'seeds': list(comparison.seeds),
    'rows': table.as_json(comparison.rows),
    'curves': {
      name: [{'round': number, **x._asdict()} for number, x in curve]
      for name, curve in comparison.curves.items()
    },
  }
  text = json.dumps(content, indent=2, sort_keys=True) + '\n'
  workdir.replace(comparison.path / 'table.json', text)
  workdir.replace(comparison.path / 'table.csv', table.as_csv(comparison.rows))


# ------------------------------------------------------------ command line --


def main(argv: Sequence[str] | None = None) -> int:
  words = sys.argv[1:] if argv is None else argv
  return workdir.status(lambda: _command(words))


def _command(argv: Sequence[str]) -> None:
  import fedjax_llm.sweep

  parser = argparse.ArgumentParser(
    prog='sweep',
    description=fedjax_llm.sweep.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--grid', nargs='+', default=[], metavar='FIELD=V,V')
  parser.add_argument('--seeds', default='1', metavar='N or A,B,C')
  parser.add_argument('--baseline', nargs='+', default=[], metavar='FIELD=V')
  parser.add_argument('--metric', default=METRIC)
  parser.add_argument('--at-once', type=int, metavar='RUNS')
  fields = [word for word in argv if word.startswith('--config.')]
  rest = [word for word in argv if not word.startswith('--config.')]
  flags = command.parse(parser, rest)
  paths = ['--config', flags.config, '--workdir', flags.workdir]
  args = configs.parse([*paths, *fields], SPEC)
  for note in args.notes:
    print(note)
  wanted = {}
  for field, values in grids.parse(flags.baseline, '--baseline').items():
    if len(values) > 1:
      raise Error(f'--baseline {field} has {len(values)} values, not one.')
    wanted[field] = values[0]
  found = compare(
    args.config,
    grids.parse(flags.grid),
    flags.seeds,
    args.workdir,
    wanted,
    metric=flags.metric,
    at_once=flags.at_once,
    say=print,
  )
  print(f'\n{found.markdown()}\n')
  left = ['table.json', 'table.csv', 'runs/']
  try:
    found.figure().savefig(found.path / 'figure.png')
    left.insert(2, 'figure.png')
  except Error as error:
    print(error)
  print(f'{found.path}: {", ".join(left)}')
