"""Plans of the host: decided by reports, kept in checkpoints, priced."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_planned as ref
from test_variants import (
  D,
  F,
  K,
  L,
  base,
  clients,
  cohort,
  loss,
  watched,
  wire,
)

from fedjax_llm import (
  adapters,
  checkpoint,
  local,
  recipes,
  train,
  tree,
  uploads,
)
from fedjax_llm.clients import policies, profiles
from fedjax_llm.types import Error, Reports

KEY = jax.random.key(0)
R, SCALE, RATE, ROUNDS, N = 3, 1.0, 0.05, 4, 6
SIZE = D + F  # of a rank
BUDGETS = np.array([2, 3, 6, 1, 1, 4], np.int32) * SIZE + 3


def start():
  params = adapters.lora(R, R * SCALE, targets='q').init(KEY, base())
  q = params['layers']['q']  # at b = 0 nothing matters
  params['layers']['q'] = q._replace(b=0.3 * jax.random.normal(KEY, q.b.shape))
  return params


def build(**settings):
  return recipes.fed_pipe(
    loss,
    local.optimizer('sgd', RATE),
    num_clients=N,
    **{'profiles': {'budget': BUDGETS}, **settings},
  )


@functools.cache
def compiled():
  algorithm = build(upload=watched(uploads.identity()))
  return algorithm, jax.jit(algorithm.round)


@functools.cache
def history():
  """Every round's (state before it, state, client states, metrics)."""
  algorithm, step = compiled()
  state, found = algorithm.init(KEY, start()), []
  for _ in range(ROUNDS):
    states = tree.broadcast(algorithm.init_client(state.params), K)
    new, states, told = step(state, cohort(states), base())
    found.append((state, new, states, told))
    state = algorithm.plan(new)  # type: ignore
  return found


def plan_of(state):
  return np.asarray(state.aggregator.profiles['ranks'])


def test_fed_pipe_equals_a_float64_loop():
  q = start()['layers']['q']
  drawn = [np.random.default_rng((0, 301, k)).random(L) for k in range(K)]
  want, plans = ref.fed_pipe(
    np.float64(base()['layers']['q']['kernel']),
    *(SCALE, np.asarray(q.a), np.asarray(q.b), clients(), [1, 2, 3, 4]),
    *(RATE, BUDGETS[:K], drawn, ROUNDS),
  )
  for (state, *_), plan in zip(history(), plans, strict=True):
    np.testing.assert_array_equal(plan_of(state)[:K], plan)
  got = history()[-1][1].params['layers']['q']
  np.testing.assert_allclose(got.a, want[0], atol=1e-5)
  np.testing.assert_allclose(got.b, want[1], atol=1e-5)
  assert len({tuple(p.ravel()) for p in plans}) > 1  # reports changed the plan


def test_only_who_reported_gets_another_plan():
  for state, new, _, _ in history():
    reports = new.aggregator.reports
    assert (reports.round[:K] == new.round).all()
    assert (reports.round[K:] == -1).all()
    np.testing.assert_array_equal(plan_of(state)[K:], plan_of(new)[K:])


def test_bytes_are_those_of_the_message_the_report_and_the_plan():
  for state, new, states, told in history():
    for k in range(K):
      report = np.asarray(new.aggregator.reports.values[k])
      size = len(wire(states, k)) + len(report.tobytes())
      assert size == told.bytes_up[k].sum()
      assert len(wire(states, k)) == 4 * SIZE * plan_of(state)[k].sum()
      q = state.params['layers']['q']
      down = len(np.asarray(q.a).tobytes() + np.asarray(q.b).tobytes())
      down += len(plan_of(state)[k].tobytes())
      assert down == told.bytes_down[k].sum()


def test_a_client_that_drops_out_is_planned_as_before():
  algorithm, step = compiled()
  state = algorithm.init(KEY, start())
  of = cohort(tree.broadcast(algorithm.init_client(state.params), K))
  of = of._replace(
    ids=np.array([4, 1, 5, -1], np.int32),
    valid=np.array([True, False, True, False]),
  )
  new, _, told = step(state, of, base())
  reports = new.aggregator.reports
  assert reports.round.tolist() == [-1, -1, -1, -1, 1, 1]
  assert (np.abs(reports.values[4:]) > 0).all()
  assert (np.asarray(reports.values[:4]) == 0).all()
  planned = algorithm.plan(new)  # type: ignore
  np.testing.assert_array_equal(plan_of(planned)[:4], plan_of(state)[:4])
  sent = told.bytes_up.sum(1).tolist()
  assert sent[1] == sent[3] == 0 < sent[0]
  assert told.bytes_down.sum(1)[3] == 0


def test_with_budgets_for_everything_it_is_fedit():
  rich = {'budget': np.full(N, 10**6, np.int32)}
  algorithm = build(profiles=rich)
  plain = recipes.fed_it(loss, local.optimizer('sgd', RATE))
  ends = []
  for one in (algorithm, plain):
    state = one.init(KEY, start())
    new, *_ = jax.jit(one.round)(state, cohort(), base())
    ends.append(new.params['layers']['q'])
  np.testing.assert_allclose(ends[0].a, ends[1].a, atol=1e-6)
  np.testing.assert_allclose(ends[0].b, ends[1].b, atol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_a_knapsack_is_the_best_of_all_that_fit(data):
  num = data.draw(st.integers(1, 4))
  numbers = lambda low, high: np.array(
    data.draw(st.lists(st.integers(low, high), min_size=num, max_size=num))
  )
  value, size, most = numbers(0, 50) * 1e-6, numbers(1, 9), numbers(0, 4)
  budget = data.draw(st.integers(0, 60))
  got = policies.knapsack(value, size, most, budget)
  _, worth = ref.knapsack(value, size, most, budget)
  assert size @ got <= budget and (got >= 0).all() and (got <= most).all()
  np.testing.assert_allclose(value @ got, worth, atol=1e-12)


def test_a_policy_is_a_function_of_what_it_is_told():
  sizes, most = np.array([3, 5, 4]), np.array([2, 2, 2])
  budgets = np.array([7, 20, 9])
  build = policies.by_importance
  none = Reports(np.zeros((3, 3)), np.full(3, -1))
  blank = {'ranks': np.zeros((3, 3), np.int32)}
  first = build(sizes, most, budgets)(0, none, blank)['ranks']
  again = build(sizes, most, budgets)(0, none, blank)['ranks']
  np.testing.assert_array_equal(first, again)
  assert (blank['ranks'] == 0).all()
  other = build(sizes, most, budgets, seed=1)(0, none, blank)['ranks']
  assert (other != first).any()
  told = Reports(np.array([[0, 9, 0]] * 3), np.array([4, -1, 3]))
  second = build(sizes, most, budgets)(4, told, {'ranks': first})['ranks']
  assert second[0].tolist() == [0, 1, 0]  # only it reported in round 4
  np.testing.assert_array_equal(second[1:], first[1:])


def test_what_makes_no_plan_is_refused():
  with pytest.raises(Error, match='needs a budget of every client'):
    build(profiles=None)
  with pytest.raises(Error, match='below the 10 that one rank'):
    build(profiles={'budget': np.full(N, 9)}).init(KEY, start())
  with pytest.raises(Error, match='scope'):
    build(scope=None)
  dense = {'w': jnp.zeros((2, 2))}
  with pytest.raises(Error, match='low-rank factors'):
    build().init(KEY, dense)


def test_budgets_are_shared_out():
  drawn = profiles.budgets((100, 900), (3, 1), num_clients=8)['budget']
  assert sorted(drawn.tolist()) == [100] * 6 + [900] * 2


# -------------------------------------------------------------------- runs --


def test_a_resumed_run_goes_on_with_the_same_plan(tmp_path):
  algorithm, step = compiled()
  state, new, *_ = history()[-2]
  saver = checkpoint.open(tmp_path, max_to_keep=1)
  saver.save(ROUNDS - 1, algorithm.plan(new), {})  # type: ignore
  fresh = algorithm.init(KEY, start())
  restored = saver.restore(fresh)
  assert restored is not None
  begin, *want = history()[-1]
  np.testing.assert_array_equal(plan_of(restored.state), plan_of(begin))
  assert (plan_of(restored.state) != plan_of(fresh)).any()
  states = tree.broadcast(algorithm.init_client(state.params), K)
  got = step(restored.state, cohort(states), base())
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(tuple(want))):
    if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(one, other)


def test_a_config_says_it(tmp_path, capsys):
  given = [
    *('--config', 'configs/tiny.py:smoke', '--workdir', str(tmp_path / 'run')),
    '--config.algorithm.name=fed_pipe',
    '--config.profiles={"name": "budgets", "choices": [60, 250]}',
    *('--config.model.hidden_size=16', '--config.adapter.targets=q_proj'),
    *('--config.cohort.num_steps=1', '--config.population.max_length=96'),
    *('--config.evals.samples=0', '--config.population.new_clients=0'),
    # Clients are also tested beside a memory, which any method may have.
    *('--config.evals.personal.name=recalled', '--config.evals.every=9'),
    *('--config.evals.per_client=1', '--config.evals.common=4'),
  ]
  assert train.main(given) == 0, capsys.readouterr().err
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  first, *rounds = map(json.loads, lines)
  assert len(rounds) == 2
  assert rounds[-1]['evals/heldout/loss'] < first['evals/heldout/loss']
  assert 0 < rounds[-1]['evals/recalled/common/loss'] < 6
  tested = rounds[-1]['evals/recalled/own/clients']
  assert set(tested) == set(first['evals/heldout/clients'])  # everybody
  # Four bytes a parameter, and a report on each weight, of four clients.
  reports = 4 * 4 * 2
  assert all(0 < r['uploads/bytes'] <= 16 * 250 + reports for r in rounds)
