"""Sweeps: what is compared, trained together, and said in the end."""

import csv
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_llm import aggregators, sweep
from fedjax_llm.aggregators import from_rule
from fedjax_llm.run import config, metrics, narration, workdir
from fedjax_llm.run.sections import SPEC
from fedjax_llm.run.training import train
from fedjax_llm.sweep import grid as grids
from fedjax_llm.sweep import groups, population, singly, table
from fedjax_llm.types import Error, Uploads

WORDS = 'the quick brown fox jumps over a lazy dog and then some'.split()  # noqa: SIM905
SEEDS = [1, 2]  # their longest texts are of different lengths
GRID = {
  'server.learning_rate': [0.01, 0.1],
  'aggregator.trim_fraction': [0.0, 0.3],
  'local.learning_rate': [1e-3, 1e-2, 1e38],  # nothing stays finite at the last
}


@pytest.fixture(scope='module')
def conf(tmp_path_factory):
  """Six clients with texts of several lengths, a model of one layer."""
  path = tmp_path_factory.mktemp('texts') / 'texts.jsonl'
  lines = []
  for i in range(48):
    said = ' '.join(
      WORDS[(i * j) % 12] for j in range(1, 2 + (i % 6) ** 2 // 5)
    )
    lines.append({'client': f'c{i % 6}', 'text': said})
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return dict(
    num_rounds=2,
    data=dict(
      name='jsonl', path=str(path), client_key='client', text_key='text'
    ),
    partition=dict(name='natural'),
    population=dict(
      template='plain', max_length=32, new_clients=1, max_clients=5
    ),
    clients=dict(name='uniform', cohort_size=4),
    cohort=dict(num_steps=2, batch_size=2),
    model=dict(name='random', hidden_size=16, num_heads=2, num_layers=1),
    adapter=dict(name='lora', rank=2, targets=('q_proj', 'v_proj')),
    algorithm=dict(name='fed_avg'),
    local=dict(name='adamw', learning_rate=1e-2),
    aggregator=dict(name='trimmed_mean'),
    server=dict(name='fed_adam'),
    evals=dict(per_client=2, samples=0),
  )


def checked(conf, **more):
  return config.override(conf, list(more.items()), SPEC)[0]


def quiet(_):
  pass


@pytest.fixture(scope='module')
def compared(conf, tmp_path_factory):
  """24 runs that differ in seeds and three numbers, four at a time."""
  said = []
  found = sweep.run(
    conf,
    GRID,
    seeds=SEEDS,
    workdir=tmp_path_factory.mktemp('sweep') / 'all',
    at_once=4,
    say=said.append,
  )
  return found, said


# --------------------------------------------------------------- population --


def numbers(record):
  """Of a record, as one vector; without what it took."""
  kept = {k: v for k, v in record.items() if not k.startswith('time/')}
  # Rows are as long as the longest of all runs that train together.
  kept.pop('clients/useful_tokens', None)
  leaves, names = jax.tree.flatten(kept)
  assert not any(isinstance(x, str) for x in leaves)
  return names, np.array(leaves, float)


def test_a_run_of_a_population_is_that_of_train(compared, conf, tmp_path):
  found, _ = compared
  values = {
    'server.learning_rate': 0.1,
    'aggregator.trim_fraction': 0.3,
    'local.learning_rate': 0.01,
  }
  alone = checked(conf, seed=2, **values)
  name = (
    'server.learning_rate=0.1,trim_fraction=0.3,local.learning_rate=0.01,seed=2'
  )
  train(config.Arguments(alone, str(tmp_path / 'alone'), ''))
  folders = found.path / 'runs' / name, tmp_path / 'alone'
  ours, theirs = (json.loads((x / 'config.json').read_text()) for x in folders)
  assert ours == theirs
  ours, theirs = (json.loads((x / 'clients.json').read_text()) for x in folders)
  assert ours == theirs
  pairs = list(zip(*(metrics.read(str(x / 'metrics.jsonl')) for x in folders)))
  assert [record['round'] for record, _ in pairs] == [0, 1, 2]
  for record, other in pairs:
    (names, got), (expected, wanted) = numbers(record), numbers(other)
    assert names == expected
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_run_that_diverges_ends_alone(compared):
  found, _ = compared
  for row in found.rows:
    lost = row.words['local.learning_rate'] == '1e+38'
    assert (row.value is None) == lost
    assert len(row.failed) == (2 if lost else 0)
  assert 'not finite' in found.rows[2].failed[0]
  assert '2 of 2 runs do not count' in found.markdown()
  values = {row.value.mean for row in found.rows if row.value}
  assert len(values) == 8  # no two settings are the same run


def test_a_sweep_goes_on_where_it_was_interrupted(conf, compared, tmp_path):
  found, _ = compared
  there = tmp_path / 'all'
  shutil.copytree(found.path, there)
  runs = sorted((there / 'runs').iterdir())
  kept = {path: (path / 'metrics.jsonl').stat().st_mtime_ns for path in runs}
  lost = runs[8:12]
  for path in lost:  # as if it was killed while it wrote them
    path.rename(path.with_name(f'.{path.name}.new'))
  said = []
  again = sweep.run(
    conf, GRID, seeds=SEEDS, workdir=there, at_once=4, say=said.append
  )
  assert said[0] == '20 of 24 runs have ended before.'
  now = {path: (path / 'metrics.jsonl').stat().st_mtime_ns for path in runs}
  assert [p for p in runs if now[p] != kept[p]] == lost
  assert sorted((there / 'runs').iterdir()) == runs
  bare = lambda rows: [row._replace(seconds=None) for row in rows]
  assert bare(again.rows) == bare(found.rows)  # to the last bit


def test_the_command_prints_the_table_of_runs_that_are_done(
  conf, compared, tmp_path, capsys
):
  found, _ = compared
  file = tmp_path / 'conf.py'
  file.write_text(f'def get_config():\n  return {conf!r}\n')
  words = ['--config', str(file), '--workdir', str(found.path), '--grid']
  words += [f'{f}={",".join(map(repr, v))}' for f, v in GRID.items()]
  words += ['--seeds', '1,2']
  assert sweep.main([*words, '--baseline', 'local.learning_rate=1e-2']) == 0
  printed = capsys.readouterr().out
  assert '24 of 24 runs have ended before.' in printed
  told = json.loads((found.path / 'table.json').read_text())
  rows = told['rows']
  for row in rows:
    same = {**row['words'], 'local.learning_rate': '0.01'}
    assert row['baseline'] == same
    assert (row['difference'] is None) == (
      row['words']['local.learning_rate'] != '0.001'
    )
  text = (found.path / 'table.csv').read_text()
  lines = list(csv.DictReader(text.splitlines()))
  assert [float(x['mean']) for x in lines if x['mean']] == [
    row['value']['mean'] for row in rows if row['value']
  ]
  assert sweep.main([*words[:-1], '1,3']) == 1
  error = capsys.readouterr().err
  assert 'holds a sweep of another command: seeds differs' in error


# ---------------------------------------------------------------- grouping --


def grouped(conf, grid):
  runs = grids.runs(grids.settings(conf, grid), [0])
  return groups.together(groups.members(runs), list(grid))


@pytest.mark.parametrize(
  ('parts', 'field', 'values', 'traced'),
  [
    ({'algorithm.name': 'fed_prox'}, 'algorithm.mu', [0, 0.5], True),
    ({}, 'local.clip_norm', [0.5, 1.0], True),
    ({'server.name': 'fed_avgm'}, 'server.momentum', [0.0, 0.9], True),
    ({}, 'local.b_ratio', [1.0, 4.0], True),
    ({'upload.name': 'top_k'}, 'upload.density', [0.1, 0.5], False),
  ],
)
def test_numbers_are_inputs_of_one_program_where_builders_allow_it(
  conf, parts, field, values, traced
):
  found = grouped(checked(conf, **parts), {field: values})
  assert [group.why for group in found] == [None] * len(found)
  assert [list(group.fields) for group in found] == (
    [[field]] if traced else [[], []]
  )
  assert all((field in group.fixed) != traced for group in found)


def test_other_rules_and_other_shapes_are_other_programs(conf):
  found = grouped(conf, {'aggregator.name': ['mean', 'median']})
  assert [len(group.members) for group in found] == [1, 1]
  found = grouped(conf, {'cohort.num_steps': [1, 2]})
  assert [len(group.members) for group in found] == [1, 1]
  found = grouped(conf, {'cohort.weight_by': ['examples', 'uniform']})
  assert [len(group.members) for group in found] == [2]


def test_a_rule_that_writes_into_the_base_trains_one_run_at_a_time(conf):
  rules = {'aggregator.name': ['fedex', 'mean']}
  less = checked(conf, **{'server.name': 'sgd'})
  found = groups.members(grids.runs(grids.settings(less, rules), [0]))
  assert [groups.writes_base(member) for member in found] == [True, False]
  two = groups.Group([found[0]] * 2)
  assert population.num_at_once(two, groups.lead(two.members), None) == 1


def test_what_clients_keep_is_trained_run_after_run(
  conf, tmp_path, monkeypatch
):
  """By `train`, each in a workdir of its own; here one that tells numbers."""
  trained, rounds = [], [1, 1, 0]  # the last is stopped by a signal

  def train(args):
    trained.append(args)
    path = pathlib.Path(args.workdir)
    path.mkdir(exist_ok=True)
    record = metrics.line(rounds[len(trained) - 1], {'loss': len(trained)})
    (path / 'metrics.jsonl').write_text(record)
    if len(trained) == 2:
      raise narration.Diverged('round 1: nothing finite is left.')

  monkeypatch.setattr(singly.training, 'train', train)
  private = {'algorithm.name': 'fed_sa', 'aggregator': None, 'num_rounds': 1}
  less, said = checked(conf, **private), []
  again = lambda: sweep.run(
    *(less, {}), seeds=3, workdir=tmp_path, metric='loss', say=said.append
  )
  with pytest.raises(workdir.Stopped):
    again()
  assert said[0] == (
    '3 runs one after another: fed_sa keeps something of every client between '
    'rounds.'
  )
  rounds.append(1)
  row: Any = again().rows[0]
  seeds = [args.config['seed'] for args in trained]
  assert seeds == [0, 1, 2, 2]
  assert trained[0].config == {**less, 'seed': 0}
  assert row.value.num == 2 and row.failed[0].startswith('round 1')


# --------------------------------------------------------------- notebooks --


def first_of_all(factor):
  """A rule as it is written in a cell, in two versions."""

  def halves(*, keep: float = factor):
    first = lambda stack: keep * stack[0]
    return from_rule(lambda update, weight: jax.tree.map(first, update))

  def other(*, keep: float = 2 * factor):
    return halves(keep=keep)

  other.__name__ = 'halves'
  return halves, other


def test_a_rule_of_a_notebook_cell_is_compared(conf, tmp_path):
  halves, changed = first_of_all(0.5)
  where = tmp_path / 'mine'
  small = checked(conf, **{'num_rounds': 1, 'server.name': 'sgd'})
  rules = lambda rule: {'aggregator.name': [rule]}
  found = sweep.run(small, rules(halves), workdir=where, say=quiet)
  assert found.rows[0].words == {'aggregator.name': 'halves'}
  assert found._repr_markdown_().startswith('| aggregator |')
  file = where / 'runs' / 'aggregator=halves,seed=0' / 'config.json'
  ran = json.loads(file.read_text())['aggregator']
  assert ran['name'].endswith('halves') and ran['keep'] == 0.5
  with pytest.raises(Error, match=r'another command: sources.halves differs'):
    sweep.run(small, rules(changed), workdir=where, say=quiet)


def test_builders_of_the_house_have_their_names(conf):
  given = {'aggregator.name': [aggregators.median, 'mean']}
  found = grids.settings(checked(conf), given)
  assert [one.conf['aggregator']['name'] for one in found] == ['median', 'mean']
  whole = [{'name': aggregators.krum, 'num_byzantine': 1}, {'name': 'mean'}]
  found = grids.settings(checked(conf), {'aggregator': whole})
  assert [list(one.words.values()) for one in found] == [
    ['krum(num_byzantine=1)'],
    ['mean()'],
  ]
  assert found[0].conf['aggregator'] == {'name': 'krum', 'num_byzantine': 1}


# ---------------------------------------------------------------- mistakes --


@pytest.mark.parametrize(
  ('grid', 'told'),
  [
    (
      {'agregator.name': ['mean']},
      "no 'agregator.name'.*the nearest is 'aggregator'",
    ),
    ({'local.learning_rat': [1]}, "the nearest is 'learning_rate'"),
    ({'aggregator.name': ['meen']}, "no 'meen' .the nearest is 'mean'"),
    ({'aggregator.name': ['mean', 'mean']}, 'mean stands there twice'),
    ({'local.learning_rate': [1e-3, 0.001]}, '0.001 stands there twice'),
    ({'local.learning_rate': ['fast']}, "must be float.*not 'fast'"),
    ({'local.learning_rate': []}, 'has no value'),
    ({'local.learning_rate': 1e-3}, 'takes a list of values'),
    (
      {'aggregator.trim_fraction': [0.7]},
      '--grid aggregator.trim_fraction=0.7',
    ),
    ({'num_rounds': [0]}, 'num_rounds is 0; it must be at least 1'),
    ({'seed': [1, 2]}, 'seeds are given by --seeds'),
  ],
)
def test_mistakes_in_a_grid_are_told_before_anything_is_written(
  conf, tmp_path, grid, told
):
  with pytest.raises(Error, match=told):
    sweep.run(conf, grid, workdir=tmp_path / 'none', say=quiet)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('more', 'told'),
  [
    ({'seeds': 0}, 'a number above 0'),
    ({'seeds': [1, 1]}, 'stands there twice'),
    ({'seeds': [-1]}, 'whole numbers from 0'),
    ({'at_once': 0}, '--at-once is 0'),
    ({'baseline': {'server.name': 'sgd'}}, 'it is no field of the grid'),
    ({'baseline': {'local.learning_rate': 0.1}}, 'has no such value'),
  ],
)
def test_mistakes_beside_the_grid_are_told(conf, tmp_path, more, told):
  with pytest.raises(Error, match=told):
    sweep.run(
      conf, {'local.learning_rate': [1e-3]}, workdir=tmp_path / 'none', **more
    )
  assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(conf, tmp_path):
  (tmp_path / 'letter.txt').write_text('dear')
  with pytest.raises(Error, match='holds other things than a sweep'):
    sweep.run(conf, {}, workdir=tmp_path)
  with pytest.raises(Error, match='is a file'):
    sweep.run(conf, {}, workdir=tmp_path / 'letter.txt')
  assert [p.name for p in tmp_path.iterdir()] == ['letter.txt']


def test_a_metric_that_no_run_tells_is_named_with_the_nearest(conf, compared):
  found, _ = compared
  with pytest.raises(Error, match="the nearest is 'evals/heldout/loss'"):
    sweep.run(
      *(conf, GRID), seeds=SEEDS, workdir=found.path, metric='evals/held/loss',
      say=quiet,
    )  # fmt: skip


# ------------------------------------------------------------------- table --


def made(values) -> Any:
  """Records of runs that end with these losses, [settings][seeds]."""
  record = lambda x: {'round': 1, 'loss': x, 'uploads/bytes': 10}
  return [[[record(x)] for x in own] for own in values]


def test_differences_are_paired_by_seed():
  words = [{'a': '1'}, {'a': '2'}]
  # Seeds differ far more than the settings do.
  rows: Any = table.rows(words, [0, 0], made([[1, 5, 9], [2, 6, 10.5]]), 'loss')
  # t = 4.303 of two degrees of freedom (any table of Student's t)
  assert rows[0].value.mean == 5
  assert rows[0].value.half == pytest.approx(4.30265 * 4 / math.sqrt(3))
  assert rows[0].difference is None
  spread = np.std([1, 1, 1.5], ddof=1)
  assert rows[1].difference == pytest.approx(
    (3.5 / 3, 4.30265 * spread / math.sqrt(3), 3)
  )
  assert rows[1].up == 10


def test_a_seed_without_its_partner_is_no_pair():
  told = made([[1, 2, 3], [2, 3, 4]])
  told[1][0] = 'round 1: nothing finite is left.'
  told[0][2][0]['loss'] = None  # as NaN is written
  rows: Any = table.rows([{'a': '1'}, {'a': '2'}], [0, 0], told, 'loss')
  assert rows[1].difference == (1.0, None, 1)
  assert [row.value.num for row in rows] == [2, 2]
  assert [len(row.failed) for row in rows] == [1, 1]
  text = table.markdown(rows, {'a': 'a'}, 'loss', 3)
  assert 'a=1: 1 of 3 runs do not count: loss is not finite' in text


def test_intervals_hold_the_mean_as_often_as_they_say():
  rng = np.random.default_rng(0)
  found: Any = [table.interval(rng.normal(2, 3, 5)) for _ in range(4000)]
  inside = [abs(x.mean - 2) <= x.half for x in found]
  assert abs(np.mean(inside) - 0.95) < 0.015


def test_the_figure_names_every_setting(compared):
  pytest.importorskip('matplotlib')
  figure = compared[0].figure()
  (axes,), (legend,) = figure.axes, figure.legends
  names = [text.get_text().split() for text in legend.get_texts()]
  assert len(names) == len(axes.lines) == len(axes.collections) == 8
  assert names[1] == [
    *('server.learning_rate=0.01,', 'trim_fraction=0.0,'),
    'local.learning_rate=0.01',
  ]
  assert '2 seeds' in axes.get_title('left')
  figure.draw_without_rendering()
  boxes = legend.get_window_extent(), axes.get_tightbbox()
  assert boxes[0].x0 >= boxes[1].x1  # beside the picture, not over it


# ------------------------------------------------------------------- rules --


def test_a_traced_trim_fraction_cuts_what_a_written_one_does():
  update = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
  nothing: Any = None

  def run(fraction, num):
    uploads = Uploads(update, None, nothing, None, np.arange(20) < num)
    rule = aggregators.trimmed_mean(trim_fraction=fraction)
    return rule.aggregate(uploads, (), None, nothing)[0].delta

  traced = jax.jit(run)
  for fraction in (0.0, 0.05, 0.1, 0.15, 0.29, 0.3, 0.35, 0.4, 0.45, 0.49):
    for num in (1, 10, 19, 20):
      np.testing.assert_allclose(
        traced(fraction, num), run(fraction, num), rtol=1e-5, atol=1e-6
      )
