"""Rounds again as they were, without a client, and what clients were worth."""

import functools
import itertools
import json
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import aggregators, recipes, replay, server, train, tree
from fedjax_llm.replay import forgetting, program, values
from fedjax_llm.types import Error

ROOT = pathlib.Path(__file__).parents[1]
K = 5
# ------------------------------------------------------------------ values --


def squares(base, params):
  """Minus the error on rows of nobody's, in parts."""
  rows = toy.cohort(num_clients=1, seed=9, ragged=False).batches
  sums = toy.loss(base, params, rows, None)
  return jnp.stack([-sums.total / sums.count, jnp.float32(0)])


def method(**parts):
  return recipes.fed_avg(toy.loss, toy.sgd(), measure=None, **parts)


def beginning(algorithm):
  return algorithm.init(jax.random.key(0), toy.params())


RULES = toy.rules(krum={'num_byzantine': 1})


@pytest.mark.parametrize('name', sorted(RULES))
def test_a_client_that_does_not_report_is_absent_for_a_rule(name):
  """Under `vmap` over who takes part, as values are computed."""
  rule, (sent, start) = RULES[name], toy.uploads(K + 1)
  state = rule.init(start, jax.random.key(0))
  outcome = lambda given: rule.aggregate(
    given, state, start, jax.random.key(1)
  )[0]

  def masked(valid):
    return outcome(
      sent._replace(
        update=tree.where(valid, sent.update, tree.zeros_like(sent.update)),
        weight=jnp.where(valid, sent.weight, 0),
        valid=valid,
      )
    )

  ids = np.arange(K + 1)
  masks = ids != ids[:, None]  # one client is missing, each in turn
  others = np.stack([ids[mask] for mask in masks])
  got = jax.jit(jax.vmap(masked))(masks)
  wanted = jax.jit(jax.vmap(lambda rows: outcome(tree.take(sent, rows))))(
    others
  )
  toy.close(got, wanted, rtol=1e-4, atol=1e-4)
  first = np.concatenate(
    [x.reshape(K + 1, -1) for x in jax.tree.leaves(got)], 1
  )
  assert np.ptp(first, axis=0).max() > 1e-2  # clients do matter


def game(algorithm, cohort, **settings):
  state = beginning(algorithm)
  return values.of_round(
    algorithm, state, cohort, toy.base(), squares, **settings
  )


@pytest.mark.parametrize(
  'parts',
  [
    {'block_size': 2},  # the mean, streamed
    {'aggregator': aggregators.median(), 'server': server.fed_adam()},
  ],
  ids=['blocks', 'median'],
)
def test_values_are_those_of_really_absent_clients(parts):
  """The mean over all orders, of rounds in cohorts of every size."""
  algorithm, num = method(**parts), 4
  cohort = toy.cohort(num_clients=num)
  step = jax.jit(algorithm.round)
  state = beginning(algorithm)
  worth: dict[tuple[int, ...], float] = {}
  worth[()] = float(squares(toy.base(), state.params).sum())
  for size in range(1, num + 1):
    for subset in itertools.combinations(range(num), size):
      rows = tree.take(cohort, np.array(subset))
      new, _, _ = step(state, rows, toy.base())
      worth[subset] = float(squares(toy.base(), new.params).sum())
  orders = list(itertools.permutations(range(num)))
  expected = np.zeros(num)
  for order in orders:
    for i, k in enumerate(order):
      after, before = (tuple(sorted(order[:n])) for n in (i + 1, i))
      expected[k] += (worth[after] - worth[before]) / len(orders)

  play = game(algorithm, cohort, at_most=6)  # 16 subsets in three parts
  found = values.shapley(play, cohort.valid)
  assert found.num_subsets == 16 and not found.margin.any()
  np.testing.assert_allclose(found.value, expected, rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(found.value.sum(), found.all - found.none)
  np.testing.assert_allclose(found.none, worth[()], rtol=1e-6)

  least = values.leave_one_out(play, cohort.valid)
  everybody = worth[0, 1, 2, 3]
  without = [worth[tuple(j for j in range(num) if j != k)] for k in range(num)]
  np.testing.assert_allclose(
    least.value, everybody - np.array(without), rtol=1e-3, atol=1e-6
  )


def test_clients_with_the_same_texts_are_worth_the_same_and_padding_nothing():
  cohort = toy.cohort(num_clients=4)
  same = lambda x: np.concatenate([x[:2], x[:1], x[3:]])  # 2 is 0 again
  cohort = cohort._replace(
    batches=jax.tree.map(same, cohort.batches),
    weight=same(cohort.weight),
    valid=np.array([True, True, True, False]),
  )
  found = values.shapley(game(method(), cohort), cohort.valid)
  assert found.num_subsets == 8
  np.testing.assert_allclose(found.value[0], found.value[2], rtol=1e-4)
  assert abs(found.value[0] - found.value[1]) > 1e-3
  assert found.value[3] == 0


def test_clients_are_trained_once_for_all_masks():
  trained = []

  def loss(base, params, batch, key):
    jax.debug.callback(lambda x: trained.append(x), params['q'].a[0, 0])
    return toy.loss(base, params, batch, key)

  cohort = toy.cohort(num_clients=3, steps=2, ragged=False)
  algorithm = recipes.fed_avg(loss, toy.sgd(), measure=None)
  masks = np.array(list(itertools.product([False, True], repeat=3)))
  game(algorithm, cohort)(masks)
  jax.effects_barrier()
  assert len(trained) == 3 * 2  # clients and steps, not eight times that


NUM = 10
OWN = np.random.default_rng(0).normal(size=NUM)
PAIRS = np.triu(np.random.default_rng(1).normal(size=(NUM, NUM)), 1)


def of_pairs(masks):
  """A game whose Shapley values are known: those of a pair share its worth."""
  x = np.asarray(masks, float)
  return x @ OWN + np.einsum('mi,ij,mj->m', x, PAIRS, x) + 7


def test_sampled_values_have_intervals_that_hold_and_add_up():
  true = OWN + (PAIRS + PAIRS.T).sum(0) / 2
  covered = []
  for seed in range(30):
    found = values.shapley(
      of_pairs, np.ones(NUM), num_permutations=60, seed=seed
    )
    assert found.num_subsets < 1024  # not all of them
    np.testing.assert_allclose(found.value.sum(), found.all - found.none)
    covered.append(np.abs(found.value - true) <= found.margin)
  # 300 intervals of 95 %: four standard deviations around it.
  assert 0.90 <= np.mean(covered) <= 0.995
  again = values.shapley(of_pairs, np.ones(NUM), num_permutations=60, seed=29)
  np.testing.assert_array_equal(again.value, found.value)
  exact = values.shapley(of_pairs, np.ones(NUM), num_permutations=200)
  assert exact.num_subsets == 1024 and not exact.margin.any()
  np.testing.assert_allclose(exact.value, true, atol=1e-9)


def test_values_refuse_too_few_orders_and_nobody():
  with pytest.raises(Error, match='num_permutations is 1: an interval needs 2'):
    values.shapley(of_pairs, np.ones(NUM), num_permutations=1)
  with pytest.raises(Error, match='nobody takes part'):
    values.leave_one_out(of_pairs, np.zeros(NUM))


# ------------------------------------------------------------------ replay --


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 5 rounds of which only the checkpoints of 4 and 5 are kept."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  settings = {
    'num_rounds': 5,
    'checkpoint_every': 2,
    'block_size': 2,
    'model.name': 'test_train:shallow',
    'adapter.targets': 'q_proj',
    'algorithm.keep_optimizer': True,  # so clients keep something
    'population.max_length': 48,
    'evals.every': 1,
    'evals.samples': 0,
  }
  fields = [f'--config.{k}={v}' for k, v in settings.items()]
  config = f'{ROOT}/configs/tiny.py:smoke'
  status = train.main(['--config', config, '--workdir', str(folder), *fields])
  assert status == 0
  return folder


def told(capsys, folder, *arguments):
  capsys.readouterr()
  words = ['--workdir', str(folder), *map(str, arguments), '--trust-code']
  status = replay.main(words)
  out, err = capsys.readouterr()
  return status, out, err


def records(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def everything(folder):
  return {
    path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_a_round_of_a_finished_run_comes_out_equal(finished, capsys):
  before = everything(finished)
  status, out, err = told(capsys, finished, '--round', 5)
  assert status == 0, err
  assert 'round 5, from the checkpoint of round 4\nequal: every' in out
  assert everything(finished) == before


def test_an_interrupted_run_is_replayed_from_its_start(
  finished, tmp_path, capsys
):
  """Checkpoints that came later, and what a kill left, change nothing."""
  folder = tmp_path / 'run'
  shutil.copytree(finished, folder)
  shutil.rmtree(folder / 'adapter')
  (folder / 'checkpoints' / 'part_round_00000006').mkdir()
  (folder / 'states' / 'journal_00000007').write_bytes(b'torn')
  file = folder / 'metrics.jsonl'
  file.write_text(file.read_text()[:-40])  # the last line is torn
  before = everything(folder)
  moment = replay.before(str(folder), 3, trusted=True)
  draw, _ = moment.people()
  client = moment.built.names[int(draw.ids[0])]
  status, out, err = told(capsys, folder, '--round', 3, '--without', client)
  assert status == 0, err
  assert 'round 3, from the start of the run, with rounds 1 to 2 again' in out
  assert 'there are checkpoints of 4, 5' in out and 'keep_checkpoints' in out
  assert 'equal: every number' in out
  row = next(x for x in out.splitlines() if x.startswith('heldout/loss'))
  _, full, less, difference = row.split()
  assert full == f'{records(finished)[3]["evals/heldout/loss"]:.4f}' != less
  assert float(difference) == pytest.approx(float(less) - float(full), abs=1e-4)
  assert everything(folder) == before

  status, _, err = told(capsys, folder, '--round', 5)
  assert status == 1 and 'tells of rounds 1 to 4' in err


def test_what_differs_from_the_record_is_named(finished, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(finished, folder)
  file = folder / 'metrics.jsonl'
  lines = records(folder)
  before, after = (x['evals/heldout/loss'] for x in lines[4:6])
  lines[5]['local/loss'] = 1.25
  file.write_text(''.join(json.dumps(x) + '\n' for x in lines))
  status, out, err = told(capsys, folder, '--round', 5, '--values', 'shapley')
  assert status == 1
  assert 'round 5 is not as recorded: local/loss was 1.25, is ' in err
  assert f'from {before:.6f} to {after:.6f}' in out
  gain = f'{before - after:+.6f}'[:-1]  # to rounding
  assert out.splitlines()[-1].startswith(f'together {gain}')
  assert out.count('exact') == 4 and '16 subsets of 4 clients' in out


def test_a_client_is_forgotten_by_name(finished, capsys, monkeypatch):
  """The program of all ways; without those that `test_forgetting.py` tests."""
  only = functools.partial(forgetting.compared, ways=())
  monkeypatch.setattr(forgetting, 'compared', only)
  moment = replay.before(str(finished), 1, trusted=True)
  draw, _ = moment.people()
  client = moment.built.names[int(draw.ids[0])]
  before = everything(finished)
  words = ['--round', 1, '--forget', client]
  status, out, err = told(capsys, finished, *words)
  assert status == 0, err
  assert f'forgetting {client} after round 1:' in out
  rows = {x.split()[0]: x.split()[1:] for x in out.splitlines()[-2:]}
  assert set(rows) == {'trained', 'retrained'}
  trained, gold = ([float(x) for x in rows[way]] for way in rows)
  assert gold[2] == 0 < trained[2]
  assert trained[0] < gold[0]  # the loss on the texts of the client
  assert everything(finished) == before


def test_forgetting_without_halves_only_trains_again(monkeypatch):
  """And clients with models of their own are refused."""
  people = SimpleNamespace(heldout=[('his',), ('hers',)])
  built = SimpleNamespace(
    small=None, names=['ann', 'ben'], population=people, round_key=None,
    test=SimpleNamespace(per_client=1), assemble=lambda number: (None, number),
    base=None, task=SimpleNamespace(loss=lambda loaded: None), loaded=None,
    rows=lambda heldout: [(heldout, None)],
  )  # fmt: skip
  whole = SimpleNamespace(train=None, aggregate=None)
  moment = SimpleNamespace(built=built, algorithm=whole, state=None)
  monkeypatch.setattr(program, 'before', lambda *args, **more: moment)
  seen: dict[str, Any] = {}

  def compared(rounds, client, **more):
    seen.update(more, client=client)
    return {'retrained': forgetting.Figures(1.0, 2.0, 0.0)}

  monkeypatch.setattr(forgetting, 'compared', compared)
  args: Any = SimpleNamespace(
    workdir='', round=1, forget='ben', trust_code=False
  )
  text = program._forgotten(args)
  assert seen['ways'] == () and seen['client'] == 1
  assert seen['retain'] == [[('his',), ()]]
  assert text.endswith('only training again forgets them.')
  built.small = object()
  with pytest.raises(Error, match='have tokens of their own'):
    program._forgotten(args)


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['--round', 1, '--forget', 'MACBETHH'], 'is none of the'),
    (['--round', 9], 'metrics.jsonl tells of rounds 1 to 5'),
    (['--round', 0], 'metrics.jsonl tells of rounds 1 to 5'),
    (['--round', 5, '--values', 'shaply'], 'shapley, leave_one_out'),
    (['--round', 5, '--seed', 1], '--seed belongs to --values shapley'),
    (['--round', 5, '--without', 'MACBETHH'], 'such as'),
  ],
)
def test_a_mistake_is_one_sentence(finished, arguments, sentence, capsys):
  status, out, err = told(capsys, finished, *arguments)
  assert status == 1 and not out
  assert err.startswith('error: ') and sentence in err
  assert len(err.splitlines()) == 1


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
  status, _, err = told(capsys, tmp_path, '--round', 1)
  assert status == 1 and 'holds no run' in err
