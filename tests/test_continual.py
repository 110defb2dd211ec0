"""Runs in stages: examples by round, matrices, a killed run, refusals."""

import itertools
import json
import types
from typing import Any

import numpy as np
import pytest
import runs

from fedjax_llm import clients, data, evals, replay, report, train
from fedjax_llm.clients import staged as pooled
from fedjax_llm.data.sources import Record
from fedjax_llm.report import continual as shown
from fedjax_llm.report import drawing
from fedjax_llm.report.tables import Table
from fedjax_llm.run import config, experiment, sections, staged
from fedjax_llm.sweep import groups
from fedjax_llm.types import Draw, Error, Example

# ----------------------------------------------------------------- figures --


def reference(R):
  """The formulas as loops: stages count from 1, row 0 is before training."""
  t = len(R) - 1
  forgetting = backward = forward = 0.0
  for j in range(1, t):
    forgetting += max(R[l][j - 1] for l in range(1, t)) - R[t][j - 1]
    backward += R[t][j - 1] - R[j][j - 1]
  for j in range(2, t + 1):
    forward += R[j - 1][j - 1] - R[0][j - 1]
  return {
    'average': sum(R[t][j - 1] for j in range(1, t + 1)) / t,
    'forgetting': forgetting / (t - 1),
    'backward': backward / (t - 1),
    'forward': forward / (t - 1),
  }


@pytest.mark.parametrize('done', [2, 3, 4])
def test_the_summary_is_that_of_the_papers(done):
  R = np.random.default_rng(done).random((done + 1, 4))
  result = evals.continual.summary(R)
  assert result == pytest.approx(reference(R.tolist()), abs=1e-12)
  if done > 2:  # the best of earlier stages, not only that of its own
    assert result['forgetting'] > -result['backward'] + 1e-3


def test_a_stage_named_nan_keeps_its_name_in_the_file(tmp_path):
  pools: Any = types.SimpleNamespace(ends=(1, 2))
  note = staged.tracker(staged.Staged(('NaN', 'b'), pools, ()), (), tmp_path)
  note(0, {staged.LOSSES: {'NaN': 3.0, 'b': float('nan')}})
  note(1, {staged.LOSSES: {'NaN': 1.0, 'b': 2.0}})
  content = json.loads((tmp_path / staged.FILE).read_text())
  assert content['names'] == ['NaN', 'b']
  assert content['loss']['matrix'] == [[3.0, None], [1.0, 2.0]]


def test_a_loss_is_better_where_it_is_lower():
  R = np.random.default_rng(0).random((4, 3))
  rows = {
    number: {staged.LOSSES: dict(zip('abc', row))}
    for number, row in zip((0, 2, 4, 6), R.tolist())
  }
  (table,) = staged.matrices('abc', (2, 4, 6), rows).values()
  wanted = reference((-R).tolist())
  wanted['average'] *= -1
  assert table.pop('matrix') == R.tolist()
  assert table == pytest.approx(wanted, abs=1e-12)
  # A run that is not over has the rows of the stages that are.
  rows.pop(6)
  (table,) = staged.matrices('abc', (2, 4, 6), rows).values()
  assert len(table['matrix']) == 3
  assert table['average'] == pytest.approx(R[2, :2].mean())


# ------------------------------------------------------------------ stages --


def records(labels, dates=None):
  dates = dates or [None] * len(labels)
  return [
    Record(text=f'{i}', label=x, date=d)
    for i, (x, d) in enumerate(zip(labels, dates))
  ]


def test_classes_in_an_order_and_in_groups():
  some = records('cabba')
  split = data.stages.by_key(1, size=2).split([some])
  assert split.names == ('a+b', 'c')
  assert split.stage.tolist() == [1, 0, 0, 0, 0]
  split = data.stages.by_key(1, order=['b', ['c']]).split([some])
  assert [r.label for r in split.records] == ['c', 'b', 'b']  # a: left out
  assert split.stage.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (dict(order=['z']), "names 'z', which is the label of no record; there"),
    (dict(order=['a', ['a']]), "stages.order names 'a' twice"),
    (dict(key='date'), 'stages need the date of each record; give the source'),
    (dict(key='mood'), "stages.key is 'mood': it is one of label, client"),
    (dict(rounds=0), 'stages.rounds is 0: every stage has at least 1 round'),
    (dict(train='none'), "stages.train is 'none': it is one of stage, seen"),
    (dict(train='all', replay=1), 'stages.replay=1 adds examples of earlier'),
  ],
)
def test_wrong_stages_are_refused(call, message):
  with pytest.raises(Error, match=message):
    data.stages.by_key(**{'rounds': 1, **call}).split([records('ab')])


def test_periods_hold_whole_dates_and_windows_slide():
  dates = ['9', '10', '10', '10', '11', '12', '13', '14']  # numbers
  plan = data.stages.by_date(2, periods=2, window=0.5)
  split = plan.split([records('a' * 8, dates)])
  assert split.names == ('9 to 10', '11 to 14')
  assert split.stage.tolist() == [0] * 4 + [1] * 4
  u = [sum(float(x) < float(y) for x in dates) / 8 for y in dates]
  assert split.when is not None
  np.testing.assert_allclose(split.when, u)
  pools = pooled.pools(
    [split.stage[::2], split.stage[1::2]],
    (2, 4),
    when=[split.when[::2], split.when[1::2]],
    window=0.5,
  )
  for r in range(4):
    begin = (1 - 0.5) * r / 3
    for k in range(2):
      inside = [begin - 1e-9 <= x < begin + 0.5 - 1e-9 for x in u[k::2]]
      assert pools.of(k, r).tolist() == np.flatnonzero(inside).tolist()
  # The first record is of the first round only, the last of the last.
  assert 0 in pools.of(0, 0) and 0 not in pools.of(0, 1)
  assert 3 in pools.of(1, 3) and 3 not in pools.of(1, 2)
  with pytest.raises(Error, match='no record begins period 2'):
    data.stages.by_date(1, periods=2).split([records('ab', ['1', '1'])])


STAGE = [np.array([0, 1, 0, 2]), np.array([1, 1]), np.array([2, 0, 0, 0])]
ENDS = (2, 3, 5)


def test_the_examples_of_a_round():
  of = lambda **more: pooled.pools(STAGE, ENDS, **more)
  stages = [0, 0, 1, 2, 2]
  for r, k in itertools.product(range(5), range(3)):
    now, own = stages[r], STAGE[k]
    assert of().stage(r) == now
    same = lambda pools, mask: (
      pools.of(k, r).tolist() == np.flatnonzero(mask).tolist()  # noqa: B023
    )
    assert same(of(), own == now)
    assert same(of(train='seen'), own <= now)
    assert same(of(train='all'), own >= 0)
    kept = of(replay=2).of(k, r)
    assert set(np.flatnonzero(own == now)) <= set(kept)
    for j in range(3):
      memory = int((own[kept] == j).sum())
      count = int((own == j).sum())
      assert memory == (count if j == now else min(2, count) * (j < now))
  assert of().able(0).tolist() == [0, 2] and of().able(2).tolist() == [0, 1]
  # A memory is chosen once: it is the same in all rounds and later stages.
  three = of(replay=2, seed=3)
  assert three.of(2, 3).tolist() == three.of(2, 4).tolist()
  first = set(three.of(2, 2)) - {0}
  assert first <= set(three.of(2, 4))


def test_draws_and_rows_are_of_the_stage():
  pools = pooled.pools(STAGE, ENDS)
  sample = pooled.sampler(
    lambda ids: clients.sampling.uniform(len(ids), 2, seed=1), pools, 3
  )
  drawn = [sample(r).ids.tolist() for r in range(5)]
  assert drawn[:2] == [[0, 2]] * 2 and drawn[2] == [0, 1]
  with pytest.raises(Error, match=r'2 clients have an example in round 1: co'):
    pooled.sampler(lambda ids: clients.sampling.uniform(len(ids), 3), pools, 3)
  text = lambda n: Example(np.full(n + 1, 7, np.int32), np.ones(n + 1, bool))
  examples = [[text(i) for i in range(len(own))] for own in STAGE]
  orders = pools.orders()
  build = clients.cohorts.cohorts(
    examples, num_steps=4, batch_size=1, max_length=6, orders=orders,
    sizes=orders.kept,
  )  # fmt: skip
  cohort = build(Draw(np.array([0, 2]), np.ones(2, bool)), 3)
  rows = (cohort.batches.segments > 0).sum(-1)[..., 0] - 1  # their places
  assert rows.tolist() == [[3] * 4, [0] * 4]
  assert cohort.weight.tolist() == [1.0, 1.0]
  with pytest.raises(Error, match='client 1 has no example in round 1'):
    build(Draw(np.array([1]), np.ones(1, bool)), 0)


def test_what_stages_exclude_and_what_trains_alone():
  check = lambda **conf: staged.check({'stages': {'name': 'by_key'}, **conf})
  with pytest.raises(Error, match='the section privacy counts the same'):
    check(privacy={'clip': 1.0})
  with pytest.raises(Error, match='the section client_models encodes the exa'):
    check(client_models={'models': [{'name': 'random'}]})
  with pytest.raises(Error, match=r'clients.name=buffered has a clock'):
    check(clients={'name': 'buffered'})
  with pytest.raises(Error, match=r'clients.name=with_root draws its root'):
    check(clients={'name': 'with_root'})
  with pytest.raises(Error, match=r'evals.patience would end the run'):
    check(evals={'patience': 1})
  run = types.SimpleNamespace(conf={'stages': {'name': 'by_key'}})
  member: Any = types.SimpleNamespace(run=run)
  assert 'at the ends of its stages' in str(groups._why_not(member))


# -------------------------------------------------------------------- runs --


class Killed(BaseException):
  """Nothing catches it: the disk is as a kill leaves it."""


FIELDS = {
  'algorithm__name': 'fed_sa',
  'partition__name': 'iid',
  'partition__num_clients': 3,
  'num_rounds': 6,
  'stages__name': 'by_key',
  'stages__key': 'client',
  'stages__order': "('dan',('ann','bob'))",
  'stages__rounds': 3,
  'stages__replay': 1,
  'evals__every': 4,
  'evals__per_client': 'none',
  'population__heldout_fraction': 0.3,
  'checkpoint_every': 2,
}


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')


@pytest.fixture(scope='module')
def whole(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'whole'
  status, _, printed = runs.run(train, runs.arguments(texts, folder, **FIELDS))
  assert status == 0
  assert 'end of stage 1 of 2 (dan), loss: average' in printed
  assert 'end of stage 2 of 2 (ann+bob), loss: average' in printed
  return folder


def test_a_run_killed_within_a_stage_is_the_same_in_the_end(
  whole, texts, tmp_path, monkeypatch
):
  folder, sentence = tmp_path / 'run', staged.sentence

  def dying(stages, number, values):
    if number == 5:  # recorded, not in a checkpoint: that of round 4 is
      raise Killed
    return sentence(stages, number, values)

  monkeypatch.setattr(staged, 'sentence', dying)
  with pytest.raises(Killed):
    runs.run(train, runs.arguments(texts, folder, **FIELDS))
  monkeypatch.setattr(staged, 'sentence', sentence)
  printed = runs.done(train, runs.arguments(texts, folder, **FIELDS))
  assert 'resuming after round 4' in printed
  assert runs.outcome(folder) == runs.outcome(whole)
  read = lambda path: (path / staged.FILE).read_text()
  assert read(folder) == read(whole)


def test_the_matrix_of_a_run(whole):
  told = {record['round']: record for record in runs.records(whole)}
  content = json.loads((whole / staged.FILE).read_text())
  assert content['names'] == ['dan', 'ann+bob'] and content['ends'] == [3, 6]
  assert [told[r]['data/stage'] for r in range(1, 7)] == [1, 1, 1, 2, 2, 2]
  for title, field in (
    ('loss', 'losses'),
    ('personal_loss', 'personal/losses'),
  ):
    rows = [
      [told[r][f'evals/stages/{field}'][name] for name in content['names']]
      for r in (0, 3, 6)
    ]
    assert content[title]['matrix'] == rows
    wanted = reference((-np.array(rows)).tolist())
    for name in ('forgetting', 'backward', 'forward'):
      assert told[6][f'evals/stages/{title}_{name}'] == pytest.approx(
        wanted[name]
      )
  # Stages are parts of all held-out texts, of one model and of everybody's own.
  for field, all_of in (
    ('losses', 'heldout'),
    ('personal/losses', 'personal/own'),
  ):
    few, many = sorted(told[6][f'evals/stages/{field}'].values())
    assert few < told[6][f'evals/{all_of}/loss'] < many
  served, own = 'evals/stages/losses', 'evals/stages/personal/losses'
  assert told[0][served] == pytest.approx(told[0][own])


def test_a_round_at_the_end_of_a_stage_is_replayed(whole):
  from fedjax_llm.run import rebuild

  words = ['--workdir', whole, '--round', 6, rebuild.TRUST]
  assert 'equal: every number' in runs.done(replay, words)


def test_the_report_shows_the_stages_in_their_order(whole):
  first, second, table = shown.items(report.read([whole]))
  assert isinstance(first, drawing.Picture) and isinstance(table, Table)
  names = [first.name, second.name, table.name]
  assert names == ['stages-loss-0', 'stages-personal-loss-0', 'stages-summary']
  assert first.alt.startswith(
    'Held-out loss by stage. after ann+bob: dan: '  # though a comes before d
  )
  told = {record['round']: record for record in runs.records(whole)}[6]
  assert table.rows[1][1:] == [
    told[f'evals/stages/personal_loss_{name}'] for name in table.header[1:]
  ]
  svg = drawing.svg(first)
  assert all(f'>{x}<' in svg for x in ('before', 'after dan', 'after ann+bob'))


def build(texts, **fields):
  fields = {k: v for k, v in {**FIELDS, **fields}.items() if v is not ...}
  words = runs.arguments(texts, 'none', **fields)
  conf = config.parse(words, sections.SPEC).config
  return experiment.build(conf, say=lambda text: None)


def test_rounds_and_stages_must_agree(texts):
  with pytest.raises(Error, match='num_rounds is 5, but the 2 stages have 6'):
    build(texts, num_rounds=5)
  with pytest.raises(Error, match=r'stages.rounds has 3 numbers, but there'):
    build(texts, stages__rounds='(1,2,3)')
  with pytest.raises(Error, match=r'selection.name=curriculum orders the'):
    build(texts, selection__name='curriculum', selection__rounds=2)


def test_wrong_fields_of_further_sources_are_named(texts):
  fields = dict(stages__name='domains', stages__key=..., stages__order=...)
  for then, message in (
    ("{'name':'jsonl','pth':'x'}", r'stages.then\[0\].pth: jsonl takes no'),
    ("{'name':'jsonn'}", r"stages.then\[0\].name: there is no 'jsonn'"),
  ):
    with pytest.raises(Error, match=message):
      build(texts, stages__then=f'({then},)', **fields)


def test_clients_drift_in_every_round_with_a_window_of_dates(tmp_path):
  """The cohorts that a run trains on hold the texts of the round's window."""
  path, days = tmp_path / 'diary.jsonl', 24
  path.write_text(
    ''.join(
      json.dumps({'client': 'ab'[day % 2], 'day': day, 'text': chr(65 + day)})
      + '\n'
      for day in range(days)
    )
  )
  fields = dict(
    data__date_key='day',
    algorithm__name='fed_avg',
    partition__name='natural',
    partition__num_clients=...,
    stages__name='by_date',
    stages__key=...,
    stages__order=...,
    stages__replay=...,
    stages__periods=2,
    stages__window=0.5,
    population__heldout_fraction=0.1,
    cohort__num_steps=12,
    cohort__epochs=1,
  )
  with pytest.raises(Error, match=r'stages.window is 0.01: no client has an'):
    build(path, **{**fields, 'stages__window': 0.01})
  built = build(path, **fields)
  assert built.stages is not None
  assert built.stages.names == ('0 to 11', '12 to 23')
  train_days = {int(own.tokens[1]) - 65 for part in built.owned for own in part}
  for r in range(6):
    draw, cohort = built.assemble(r)
    batches = cohort.batches
    days_now = {
      int(x) - 65
      for x in batches.tokens[..., 1][batches.segments[..., 1] > 0].tolist()
    }
    begin = 0.5 * r / 5 * days
    window = {day for day in train_days if begin <= day < begin + days / 2}
    assert days_now == window
    assert built.selected(draw, r) == {'data/stage': 1 + r // 3}


def test_domains_are_one_source_after_another(texts, tmp_path):
  """And the pooled baseline trains on the stage's examples only."""
  lines = texts.read_text().splitlines()
  (tmp_path / 'two.jsonl').write_text('\n'.join(lines[24:]) + '\n')
  (tmp_path / 'one.jsonl').write_text('\n'.join(lines[:24]) + '\n')
  more = f"{{'name':'jsonl','path':'{tmp_path}/two.jsonl',"
  built = build(
    tmp_path / 'one.jsonl',
    algorithm__name='centralised',
    stages__name='domains',
    stages__key=...,
    stages__order=...,
    stages__then=f"({more}'client_key':'client','text_key':'text'}},)",
  )
  assert built.stages is not None
  assert built.stages.names == ('domain1', 'domain2')
  (own,), pools = built.owned, built.stages.pools
  sizes = [len(pools.of(0, r)) for r in (0, 3)]
  assert sizes[0] + sizes[1] - 1 == len(own)  # one example of replay
  assert built.population.report['num_records'] == 48
  # A task may prepare held-out examples, such as pairs with a reference.
  people = built.population
  prepared = [[(k, i) for i, _ in enumerate(x)] for k, x in
              enumerate(people.heldout)]  # fmt: skip
  parts = built.stages.heldout(people._replace(heldout=prepared))
  texts = built.stages.heldout(people)
  for k, own in enumerate(parts):
    assert sorted(x for one in own for x in one) == prepared[k]
    for j, one in enumerate(own):
      assert [people.heldout[k][i] for _, i in one] == texts[k][j]
