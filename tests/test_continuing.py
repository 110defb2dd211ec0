"""The best round, an early end, and runs that go on from others."""

import csv
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy

from fedjax_llm import evals, export, replay, report, train
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import best, rebuild, warm
from fedjax_llm.types import Error

LOSS = 'evals/heldout/loss'
EVERY = {'evals__every': 1}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')


def falling(monkeypatch, losses):
  """Lets the tests of a run tell these held-out losses, one after another."""
  told = iter(losses)

  def loop(*args, **keywords):
    return lambda *given: {LOSS: next(told)}

  monkeypatch.setattr(evals, 'loop', loop)


def weights(folder):
  return (folder / 'adapter_model.safetensors').read_bytes()


def exported(folder, out, *more):
  words = ['--workdir', folder, '--to', 'peft', '--out', out, *more]
  return runs.done(export, [*words, rebuild.TRUST])


# -------------------------------------------------------------------- best --


@pytest.mark.parametrize('name', ['fed_avg', 'local_only'])
def test_the_best_round_is_kept_and_can_be_exported(
  data, tmp_path, monkeypatch, name
):
  """Its checkpoint, and what clients kept at that time."""
  losses = [3.0, 2.0, 1.0, 4.0, 1.0, 5.0, 6.0, 7.0]
  folder = tmp_path / 'run'
  fields = {
    'algorithm__name': name,
    'keep_checkpoints': 1,
    'checkpoint_every': 4,
    'evals__keep_best': True,
    'evals__every': 1,
  }
  falling(monkeypatch, losses)
  printed = runs.done(
    train, runs.arguments(data, folder, num_rounds=5, **fields)
  )
  assert 'best: round 2, which is kept: export with --round best' in printed
  kept = sorted(path.name for path in (folder / 'checkpoints').iterdir())
  assert kept == ['round_00000002', 'round_00000005']
  more = ['--client', 'ann'] if name == 'local_only' else []
  told = exported(folder, tmp_path / 'best', '--round', 'best', *more)
  assert 'after round 2' in told
  exported(folder, tmp_path / 'two', '--round', '2', *more)
  exported(folder, tmp_path / 'last', *more)
  assert weights(tmp_path / 'best') == weights(tmp_path / 'two')
  falling(monkeypatch, losses)
  short = tmp_path / 'short'
  runs.done(train, runs.arguments(data, short, num_rounds=2, **fields))
  exported(short, tmp_path / 'short_out', *more)
  assert weights(tmp_path / 'best') == weights(tmp_path / 'short_out')
  if name == 'fed_avg':
    assert weights(tmp_path / 'best') != weights(tmp_path / 'last')
  words = ['--workdir', folder, '--to', 'peft', '--out', tmp_path / 'x']
  told = runs.refused(export, [*words, '--round', '3', rebuild.TRUST])
  assert '--round 3 has no checkpoint any more; those of 2, 5 are kept' in told
  told = runs.refused(export, [*words, '--round', 'x', rebuild.TRUST])
  assert '--round x: it is a number from 0, or best.' in told


def test_patience_ends_a_run_which_is_then_finished(
  data, tmp_path, monkeypatch
):
  folder = tmp_path / 'run'
  losses = [3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.25, 9.0]
  words = lambda **more: runs.arguments(
    data,
    folder,
    algorithm__name='fed_avg',
    num_rounds=9,
    evals__every=1,
    **more,
  )
  falling(monkeypatch, losses)
  printed = runs.done(train, words(evals__patience=2))
  why = 'ended after round 3 of 9: 2 tests brought nothing better than round 1'
  assert why in printed
  assert (folder / 'adapter').is_dir()
  assert report.read(folder)[0].finished
  again = runs.done(train, words(evals__patience=2))
  assert 'this run is finished' in again and why in again
  # More patience, and the run goes on from there.
  falling(monkeypatch, losses[4:])
  printed = runs.done(train, words(evals__patience=3))
  assert 'resuming after round 3' in printed
  assert 'evals.patience was 2, is 3 after round 3' in printed
  assert 'ended after round 7 of 9' in printed
  told = [record[LOSS] for record in runs.records(folder)]
  assert told == losses
  assert report.read(folder)[0].finished


def test_a_run_that_was_killed_has_the_same_patience(
  data, tmp_path, monkeypatch
):
  folder = tmp_path / 'run'
  words = lambda rounds: runs.arguments(
    data, folder, algorithm__name='fed_avg', num_rounds=rounds,
    evals__patience=3, **EVERY,
  )  # fmt: skip
  falling(monkeypatch, [2.0, 1.0, 3.0])
  runs.done(train, words(2))
  falling(monkeypatch, [3.0, 3.0, 3.0])
  assert 'ended after round 4 of 9' in runs.done(train, words(9))


def test_what_no_test_tells_cannot_be_the_best():
  judge = best.judge(by='heldout/blue', patience=1)
  with pytest.raises(Error, match=r'best_by=heldout/blue.* tell heldout/loss'):
    judge.note(0, {LOSS: 1.0})
  with pytest.raises(Error, match=r'evals.patience is 0'):
    best.judge(patience=0)


def test_accuracy_is_best_where_it_is_highest_and_nan_never():
  records = [
    {'round': i, 'evals/heldout/accuracy': x, LOSS: y}
    for i, (x, y) in enumerate([(0.1, 1.0), (0.3, None), (0.2, 0.5)])
  ]
  assert best.best(records, 'heldout/accuracy') == 1
  assert best.best(records, 'evals/heldout/accuracy', rounds=[0, 2]) == 2
  assert best.best(records) == 2
  judge = best.judge(records, patience=2)
  judge.note(3, {LOSS: float('nan')})
  judge.note(4, {LOSS: 0.75})
  assert judge.best() == 2 and not judge.over()
  judge.note(5, {LOSS: 0.5})
  assert judge.over()


# ------------------------------------------------------------- the record --


def test_the_table_tells_rates_seconds_and_bytes(data, tmp_path):
  folder = tmp_path / 'run'
  falls = "{'name':'linear_schedule','init_value':1.0,'end_value':0.0,"
  fields = {
    'algorithm__name': 'fed_avg',
    'num_rounds': 3,
    'server__name': 'sgd',
    'server__schedule': falls + "'transition_steps':4}",
    'local__schedule': falls + "'transition_steps':8}",
    'cohort__num_steps': 2,
  }
  runs.done(train, runs.arguments(data, folder, **fields))
  with (folder / 'metrics.csv').open() as file:
    rows = list(csv.DictReader(file))[1:]
  assert [float(x['server/learning_rate']) for x in rows] == [1.0, 0.75, 0.5]
  assert [float(x['local/learning_rate']) for x in rows] == [1.0, 0.75, 0.5]
  for row in rows:
    assert float(row['time/total']) >= float(row['time/round']) > 0
    assert int(row['uploads/bytes']) > 0 and int(row['downloads/bytes']) > 0
  words = ['--workdir', folder, '--round', 3, rebuild.TRUST]
  assert 'equal' in runs.done(replay, words)
  told = runs.refused(
    train, runs.arguments(data, tmp_path / 'x', **fields, server__b=1)
  )
  assert "sgd takes no 'b'" in told


# --------------------------------------------------------------- otherwise --


def test_a_cohort_may_grow_when_a_run_goes_on(data, tmp_path):
  folder = tmp_path / 'run'
  fields = {'algorithm__name': 'local_only', 'keep_checkpoints': 9}
  runs.done(train, runs.arguments(data, folder, num_rounds=2, **fields))
  fields['clients__cohort_size'] = 4
  printed = runs.done(
    train, runs.arguments(data, folder, num_rounds=4, **fields)
  )
  assert 'clients.cohort_size was 2, is 4 after round 2' in printed
  assert 'num_rounds was 2, is 4 after round 2' in printed
  conf = json.loads((folder / 'config.json').read_text())
  assert conf['changes'] == [
    {
      'after': 2,
      'fields': {
        'clients.cohort_size': {'was': 2, 'is': 4},
        'num_rounds': {'was': 2, 'is': 4},
      },
    }
  ]
  told = [record['clients/reporting'] for record in runs.records(folder)[1:]]
  assert told == [2, 2, 4, 4]
  for number in (2, 4):
    words = ['--workdir', folder, '--round', number, rebuild.TRUST]
    assert 'equal' in runs.done(replay, words)
  shutil.rmtree(folder / 'checkpoints/round_00000003')
  shutil.rmtree(folder / 'checkpoints/round_00000002')
  told = runs.refused(replay, words)
  assert 'clients.cohort_size changed after round 2' in told
  # Everything else is that of the run.
  fields['cohort__num_steps'] = 3
  told = runs.refused(
    train, runs.arguments(data, folder, num_rounds=4, **fields)
  )
  assert 'cohort.num_steps was 1, is 3' in told


def test_a_cohort_that_others_depend_on_may_not_change(data, tmp_path):
  folder = tmp_path / 'run'
  fields = {'algorithm__name': 'centralised', 'num_rounds': 1}
  runs.done(train, runs.arguments(data, folder, **fields))
  fields['clients__cohort_size'] = 4
  told = runs.refused(train, runs.arguments(data, folder, **fields))
  assert 'clients.cohort_size was 2, is 4' in told


# ------------------------------------------------------------- a warm start --


def test_a_run_starts_from_what_another_has_made(data, tmp_path):
  first, fields = tmp_path / 'first', {'algorithm__name': 'fed_avg'}
  runs.done(train, runs.arguments(data, first, num_rounds=2, **fields))
  last = runs.records(first)[-1][LOSS]
  for name, path, more in (
    ('workdir', first, {}),
    ('peft', first / 'adapter', {}),
    ('wider', first, {'adapter__rank': 6, 'adapter__alpha': 3.0}),
  ):
    folder = tmp_path / name
    runs.done(
      train,
      runs.arguments(
        data, folder, num_rounds=1, adapter__path=path, **fields, **more
      ),
    )
    start = runs.records(folder)[0][LOSS]
    np.testing.assert_allclose(start, last, rtol=1e-5)
  for more, words in (
    ({'adapter__rank': 2}, 'q_proj has rank 4, above adapter.rank=2'),
    ({'adapter__targets': "('q_proj','v_proj')"}, 'has nothing for layers/'),
    ({'adapter__targets': 'v_proj'}, 'has nothing for layers/'),
    ({'adapter__name': 'vera', 'adapter__rank': 4}, 'has a LowRank at layers/'),
    ({'adapter__path': tmp_path / 'none'}, 'there is no such directory'),
    ({'adapter__path': data.parent}, 'so it is no adapter directory'),
  ):
    given = {'num_rounds': 1, 'adapter__path': first, **fields, **more}
    told = runs.refused(train, runs.arguments(data, tmp_path / 'x', **given))
    assert words in told
  base = first / 'base/model.safetensors'
  tensors = safetensors.numpy.load_file(base)
  safetensors.numpy.save_file({k: v + 1 for k, v in tensors.items()}, base)
  given = {'num_rounds': 1, 'adapter__path': first, **fields}
  told = runs.refused(train, runs.arguments(data, tmp_path / 'x', **given))
  assert 'that run worked on another base, or wrote into it' in told
  shutil.rmtree(first / 'adapter')
  given = {'num_rounds': 1, 'adapter__path': first, **fields}
  told = runs.refused(train, runs.arguments(data, tmp_path / 'x', **given))
  assert 'this run is not finished; write what it has made so far' in told


def test_a_start_with_other_factors_than_zero_needs_its_own_rank():
  ones = lambda rank: LowRank(
    np.ones((3, rank), np.float32), np.ones((rank, 2), np.float32), 1.0
  )
  here = jax.tree.map(jax.numpy.asarray, {'q': ones(2)})
  with pytest.raises(Error, match=r'x: q has rank 1 and adapter.rank is 2'):
    warm.fitted(here, {'q': ones(1)}, 'x')
  other = {'q': ones(2)._replace(b=np.ones((2, 5), np.float32))}
  with pytest.raises(Error, match=r'of shape \(3, 5\), here it is \(3, 2\)'):
    warm.fitted(here, other, 'x')
  found = warm.fitted(here, {'q': ones(2)._replace(scale=0.5)}, 'x')
  assert found['q'].b.tolist() == [[0.5, 0.5], [0.5, 0.5]]


# -------------------------------------------------------------- old workdirs --


def test_a_config_without_fields_that_are_new_is_the_same(data, tmp_path):
  folder = tmp_path / 'run'
  fields = {'algorithm__name': 'fed_avg', 'num_rounds': 1}
  runs.done(train, runs.arguments(data, folder, **fields))
  file = pathlib.Path(folder / 'config.json')
  conf = json.loads(file.read_text())
  del conf['adapter']['path'], conf['evals']['keep_best']
  conf['server'] = conf.get('server') and None
  file.write_text(json.dumps(conf))
  assert 'is finished' in runs.done(
    train, runs.arguments(data, folder, **fields)
  )
