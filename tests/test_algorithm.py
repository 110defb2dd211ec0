"""The round: what must hold whatever the rule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import aggregators, local, recipes, server, tree
from fedjax_llm.server.algorithm import fed_opt
from fedjax_llm.types import ClientState, Controlled, Error

KEY = jax.random.key(0)


def start(algorithm, params=None):
  return algorithm.init(KEY, params or toy.params())


def states_of(algorithm, state, num):
  return tree.broadcast(algorithm.init_client(state.params), num)


jitted = functools.lru_cache(jax.jit)  # one program an algorithm


def run(algorithm, cohort, num_rounds=1, base=None):
  """Rounds over one fixed cohort, jitted once."""
  state = start(algorithm)
  states = states_of(algorithm, state, len(cohort.ids))
  step = jitted(algorithm.round)
  told: Any = None
  for _ in range(num_rounds):
    state, states, told = step(
      state,
      cohort._replace(states=states),
      toy.base() if base is None else base,
    )
  return state, states, told


def test_one_step_fedavg_is_a_centralised_sgd_step():
  cohort = toy.cohort(steps=1)  # weights are token counts
  state, _, _ = run(recipes.fed_avg(toy.loss, toy.sgd(0.1)), cohort)

  together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), cohort.batches)

  def mean_loss(params):
    sums = toy.loss(toy.base(), params, together, None)
    return sums.total / sums.count

  grads = jax.grad(mean_loss)(toy.params())['q']
  old = toy.params()['q']
  new = state.params['q']
  np.testing.assert_allclose(new.a, old.a - 0.1 * grads.a, rtol=1e-5)
  np.testing.assert_allclose(new.b, old.b - 0.1 * grads.b, rtol=1e-5)
  assert new.scale == old.scale


RULES = {
  'mean': aggregators.mean,
  'uniform_mean': aggregators.uniform_mean,
  'median': aggregators.median,
  'krum': lambda: aggregators.krum(num_byzantine=1),
}


@pytest.mark.parametrize('name', RULES)
def test_blocks_equal_the_stack(name):
  cohort = toy.cohort(num_clients=5)
  build = lambda size: recipes.fed_avg(
    toy.loss, toy.sgd(), aggregator=RULES[name](), block_size=size
  )
  whole, _, told = run(build(None), cohort)
  for size in (1, 2):  # 2 does not divide 5
    blocks, _, told_blocks = run(build(size), cohort)
    toy.close(blocks.params, whole.params)
    both = {name: told.metrics[name] for name in told_blocks.metrics}
    toy.close(told_blocks, told._replace(metrics=both))
    # What needs the whole stack is told where a rule keeps it.
    missing = {'error', 'effective_rank', 'drift'} if size < 5 else set()
    streams = name in ('mean', 'uniform_mean')
    missing = {f'aggregators/{m}' for m in missing} if streams else set()
    assert told.metrics.keys() - told_blocks.metrics.keys() == missing


@pytest.mark.parametrize('name', RULES)
def test_a_permuted_cohort_gives_the_same_round(name):
  cohort = toy.cohort(num_clients=5)
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(), aggregator=RULES[name]())
  state, _, _ = run(algorithm, cohort)
  order = np.array([3, 0, 4, 1, 2])
  permuted = jax.tree.map(lambda x: x[order], cohort)
  again, _, _ = run(algorithm, permuted)
  toy.close(again.params, state.params)


def test_rows_that_are_padding_change_nothing_even_if_they_hold_nan():
  cohort = toy.cohort(num_clients=4)
  algorithm = recipes.fed_avg(toy.loss, toy.sgd())
  expected, _, _ = run(algorithm, cohort)
  pad = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), cohort)
  pad = pad._replace(
    ids=np.array([0, 1, 2, 3, -1], np.int32),
    valid=np.array([True] * 4 + [False]),
    batches=pad.batches._replace(
      x=np.concatenate([cohort.batches.x, cohort.batches.x[:1] * np.nan])
    ),
  )
  state, _, told = run(algorithm, pad)
  toy.close(state.params, expected.params)
  assert told.reported.tolist() == [True] * 4 + [False]
  assert not (~told.finite).any()


@pytest.mark.parametrize('block_size', [None, 2])
def test_a_weight_out_of_range_is_left_out_and_counted(block_size):
  """Whether the cohort says it or the client reports it."""
  cohort = toy.cohort(num_clients=4)
  honest = np.array([True, False, True, True])
  inner = local.sgd(toy.loss, toy.sgd())

  def run_one(base, start, state, batches, masks, *rest):
    out = inner.run(base, start, state, batches['rows'], masks, *rest)
    return out._replace(weight=batches['weight'])

  telling = recipes.compose(inner._replace(run=run_one), block_size=block_size)
  plain = recipes.fed_avg(toy.loss, toy.sgd(), block_size=block_size)
  weights = np.array([2.0, 0.0, 0.0, 2e9], np.float32)
  expected, _, _ = run(plain, cohort._replace(weight=weights, valid=honest))
  for weight in (-3.0, 3e38, 2.2e9, np.inf, np.nan):
    weights[1] = weight
    batches = {'rows': cohort.batches, 'weight': weights}
    for method, sent in (
      (telling, cohort._replace(batches=batches)),
      (plain, cohort._replace(weight=weights)),
    ):
      state, _, told = run(method, sent)
      assert told.finite.tolist() == honest.tolist()
      toy.close(state.params, expected.params)


def test_a_client_that_is_not_finite_is_left_out_and_counted():
  cohort = toy.cohort(num_clients=4)
  algorithm = recipes.scaffold(toy.loss, toy.sgd(), num_clients=9)
  broken = cohort.batches.x.copy()
  broken[2] = np.inf
  bad = cohort._replace(batches=cohort.batches._replace(x=broken))
  state, states, told = run(algorithm, bad)
  assert (~told.finite).tolist() == [False, False, True, False]
  assert tree.all_finite(state.params)
  toy.close(  # its control variate did not move
    tree.take(states.local, 2), tree.zeros_like(tree.take(states.local, 2))
  )
  without = cohort._replace(valid=np.array([True, True, False, True]))
  expected, _, _ = run(algorithm, without)
  toy.close(state.params, expected.params)


def test_a_round_that_nobody_reports_to_changes_only_its_number():
  cohort = toy.cohort()._replace(valid=np.zeros(5, bool))
  algorithm = recipes.fed_adam(toy.loss, toy.sgd())
  state, _, told = run(algorithm, cohort)
  before = start(algorithm)
  toy.close(
    state._replace(key=None, round=None), before._replace(key=None, round=None)
  )
  assert state.round == 1
  assert told.bytes_up.sum() == 0


def test_fedprox_with_mu_zero_is_fedavg_and_mu_pulls_towards_the_start():
  cohort = toy.cohort(steps=6)
  plain, _, told = run(recipes.fed_avg(toy.loss, toy.sgd()), cohort)
  zero, _, _ = run(recipes.fed_prox(toy.loss, toy.sgd(), mu=0.0), cohort)
  toy.close(zero.params, plain.params)
  _, _, pulled = run(recipes.fed_prox(toy.loss, toy.sgd(), mu=3.0), cohort)
  assert pulled.metrics['local/update_norm'] < told.metrics['local/update_norm']


def test_local_steps_equal_a_python_loop():
  cohort = toy.cohort(num_clients=3, steps=4)
  mu, rate, bound = 0.3, 0.1, 0.5
  algorithm = recipes.fed_prox(toy.loss, toy.sgd(rate, clip_norm=bound), mu=mu)
  state, _, told = run(algorithm, cohort)

  def grad(params, rows):
    def mean_loss(ab):
      q = params['q']._replace(a=ab[0], b=ab[1])
      sums = toy.loss(toy.base(), {'q': q}, rows, None)
      return sums.total / jnp.maximum(sums.count, 1)

    q = params['q']
    return jax.grad(mean_loss)((q.a, q.b))

  begin = toy.params()['q']
  total = [np.zeros(begin.a.shape), np.zeros(begin.b.shape)]
  for k in range(3):
    now = [np.asarray(begin.a, np.float64), np.asarray(begin.b, np.float64)]
    for s in range(4):
      rows = tree.take(tree.take(cohort.batches, k), s)
      if not rows.mask.any():
        continue
      q = begin._replace(
        a=jnp.asarray(now[0], jnp.float32), b=jnp.asarray(now[1], jnp.float32)
      )
      g = [np.asarray(x, np.float64) for x in grad({'q': q}, rows)]
      norm = np.sqrt(sum((x**2).sum() for x in g))
      g = [x * min(1.0, bound / norm) for x in g]
      for i, old in enumerate((begin.a, begin.b)):
        now[i] = now[i] - rate * (g[i] + mu * (now[i] - np.asarray(old)))
    share = cohort.weight[k] / cohort.weight.sum()
    total[0] += share * (now[0] - np.asarray(begin.a))
    total[1] += share * (now[1] - np.asarray(begin.b))
  np.testing.assert_allclose(state.params['q'].a, begin.a + total[0], rtol=1e-5)
  np.testing.assert_allclose(state.params['q'].b, begin.b + total[1], rtol=1e-5)
  assert told.metrics['local/steps'] == 11  # client 0 took three


def test_scaffold_equals_its_algorithm_written_as_a_loop():
  """Karimireddy et al. 2020, algorithm 1, option II, two rounds."""
  num_clients, rate = 8, 0.1
  cohort = toy.cohort(num_clients=3, steps=3)
  algorithm = recipes.scaffold(toy.loss, toy.sgd(rate), num_clients=num_clients)
  state, states, _ = run(algorithm, cohort, num_rounds=2)

  q = toy.params()['q']
  x = [np.asarray(q.a, np.float64), np.asarray(q.b, np.float64)]
  c = [np.zeros_like(v) for v in x]
  c_k = [[np.zeros_like(v) for v in x] for _ in range(3)]
  w = np.asarray(toy.base(), np.float64)
  s = float(q.scale)
  share = cohort.weight / cohort.weight.sum()
  for _ in range(2):
    delta = [np.zeros_like(v) for v in x]
    moved = [np.zeros_like(v) for v in x]
    for k in range(3):
      y, taken = [v.copy() for v in x], 0
      for t in range(3):
        m = cohort.batches.mask[k, t]
        if not m.any():
          continue
        taken += 1
        xs = cohort.batches.x[k, t].astype(np.float64)
        e = xs @ (w + s * y[0] @ y[1]) - cohort.batches.y[k, t]
        g_w = xs.T @ (e * m[:, None]) / m.sum()
        g = [s * g_w @ y[1].T, s * y[0].T @ g_w]
        y = [y[i] - rate * (g[i] - c_k[k][i] + c[i]) for i in range(2)]
      new = [
        c_k[k][i] - c[i] + (x[i] - y[i]) / (taken * rate) for i in range(2)
      ]
      for i in range(2):
        delta[i] += share[k] * (y[i] - x[i])
        moved[i] += new[i] - c_k[k][i]
      c_k[k] = new
    x = [x[i] + delta[i] for i in range(2)]
    c = [c[i] + moved[i] / num_clients for i in range(2)]
  final = state.params
  assert isinstance(final, Controlled)
  np.testing.assert_allclose(final.params['q'].a, x[0], rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(final.params['q'].b, x[1], rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(final.control['q'].a, c[0], rtol=2e-4, atol=1e-6)
  for k in range(3):
    np.testing.assert_allclose(
      states.local['q'].b[k], c_k[k][1], rtol=2e-4, atol=1e-5
    )
  served = algorithm.personal(final, None)
  toy.close(served, final.params)


def test_scaffold_refuses_optimizers_other_than_plain_sgd():
  with pytest.raises(Error, match=r'scaffold needs local\.name=sgd'):
    recipes.scaffold(toy.loss, local.optimizer('adamw'), num_clients=4)
  with pytest.raises(Error, match='momentum'):
    recipes.scaffold(
      toy.loss, local.optimizer('sgd', momentum=0.9), num_clients=4
    )


def test_local_only_sends_nothing_and_keeps_everything():
  algorithm = recipes.local_only(toy.loss, local.optimizer('adamw', 0.05))
  cohort = toy.cohort()
  state, states, told = run(algorithm, cohort, num_rounds=2)
  toy.close(state.params, toy.params())
  assert told.bytes_up.sum() == 0
  assert told.bytes_down.sum() == 0
  one = tree.take(states, 1)
  served = algorithm.personal(state.params, one)
  assert not np.allclose(served['q'].a, toy.params()['q'].a)
  assert served['q'].scale == toy.params()['q'].scale
  # Two rounds with kept moments are one round of twice the steps.
  twice = cohort._replace(
    batches=jax.tree.map(lambda x: np.concatenate([x, x], 1), cohort.batches)
  )
  _, once, _ = run(algorithm, twice)
  toy.close(once.private, states.private)


def test_private_state_of_a_client_that_drops_out_does_not_change():
  algorithm = recipes.local_only(toy.loss, toy.sgd())
  cohort = toy.cohort()._replace(
    valid=np.array([True, False, True, True, True])
  )
  state, states, _ = run(algorithm, cohort)
  before = states_of(algorithm, start(algorithm), 5)
  toy.close(tree.take(states, 1), tree.take(before, 1))
  assert not np.allclose(states.private['q'].a[0], before.private['q'].a[0])
  del state


def test_bytes_are_those_of_the_factors():
  _, _, told = run(recipes.fed_avg(toy.loss, toy.sgd()), toy.cohort())
  each = 4 * toy.R * (toy.D + toy.F)  # r (m + n) floats
  assert told.bytes_up.sum(1).tolist() == [each] * 5
  assert told.bytes_down.sum(1).tolist() == [each] * 5


def test_schedule_runs_over_the_whole_run_not_the_round():
  schedule = dict(
    name='linear_schedule', init_value=1.0, end_value=0.0, transition_steps=4
  )
  optimizer = local.optimizer('sgd', schedule=schedule)
  params = {'w': jnp.ones(1)}
  state = optimizer.init(params)
  rates = [
    -float(optimizer.update(params, state, params, t)[0]['w'][0])
    for t in range(5)
  ]
  assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_moments_over_a_changing_basis_are_refused():
  rule = aggregators.from_rule(tree.weighted_mean)
  rule = rule._replace(traits=rule.traits._replace(changes_basis=True))
  parts = dict(
    upload=recipes.compose.__globals__['uploads'].identity(), aggregator=rule
  )
  with pytest.raises(Error, match='changes the basis'):
    fed_opt(local.sgd(toy.loss, toy.sgd()), server=server.fed_adam(), **parts)
  fed_opt(local.sgd(toy.loss, toy.sgd()), server=server.sgd(), **parts)


def test_empty_client_state_holds_nothing():
  algorithm = recipes.fed_avg(toy.loss, toy.sgd())
  state = algorithm.init_client(toy.params())
  assert isinstance(state, ClientState)
  assert not jax.tree.leaves(state)
