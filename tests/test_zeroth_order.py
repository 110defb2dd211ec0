"""Methods without backpropagation, on a quadratic that is checked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_zeroth_order as ref
import tiny
import toy

from fedjax_llm import (
  adapters,
  aggregators,
  local,
  recipes,
  scopes,
  server,
  tree,
  uploads,
)
from fedjax_llm.local.gradients import backprop
from fedjax_llm.local.one_way import one_way
from fedjax_llm.local.seeded import fresh
from fedjax_llm.nodes import LowRank, Seeded, directions
from fedjax_llm.recipes.zeroth_order import decomfl, fwdllm
from fedjax_llm.replay import forgetting
from fedjax_llm.types import Cohort, Context, Error, LossSum, Masks

KEY = tiny.KEY
K, S, P, D = 3, 2, 2, 4
RATE, MU = 0.05, 0.5
IDS = np.array([7, 2, 4], np.int32)
_rng = np.random.default_rng(3)
_half = _rng.normal(size=(D, D)).astype(np.float32)
HESSIAN = (_half @ _half.T / D).astype(np.float32)
W = _rng.normal(size=D).astype(np.float32)
PARAMS = {'w': jnp.asarray(W)}


def loss(base, params, x, key):
  gap = params['w'] - x
  return LossSum(0.5 * gap @ HESSIAN @ gap, jnp.float32(1), jnp.float32(0))


def cohort(num_steps=S, weight=(3.0, 1.0, 2.0), seed=0, num=K):
  x = np.random.default_rng(seed).normal(size=(num, num_steps, D))
  return Cohort(
    ids=IDS if num == K else np.arange(num, dtype=np.int32),
    batches=x.astype(np.float32),
    weight=np.asarray(weight, np.float32),
    valid=np.ones(num, bool),
  )


def served(algorithm, *cohorts, params=None):
  """The states and infos of the rounds, the first state before them."""
  step = jax.jit(algorithm.round)
  states, infos, kept = [algorithm.init(KEY, params or PARAMS)], [], None
  for one in cohorts:
    blank = tree.broadcast(
      algorithm.init_client(states[0].params), len(one.ids)
    )
    one = one._replace(states=blank if kept is None else kept)
    new, kept, info = step(states[-1], one, None)
    states.append(new)
    infos.append(info)
  return states, infos


def sgd(rate=RATE):
  return local.optimizer('sgd', rate)


def drawn(keys):
  z = jax.vmap(lambda key: directions.draw(key, PARAMS))(keys)['w']
  return np.asarray(z, np.float64)


# -------------------------------------------------------------- estimators --

SLOPES = {
  'two_point': local.two_point(MU),
  'one_point': local.one_point(MU),
  'forward_difference': local.forward_difference(MU),
  'forward_mode': local.forward_mode(),
}


@functools.cache
def estimates():
  """Every slope along normal directions, exact ones along all: [n, D]."""
  x = jnp.zeros(D)
  keys = jax.random.split(KEY, 8192)
  cases = {(name, 'normal') for name in SLOPES}
  cases |= {('forward_mode', name) for name in directions.DISTRIBUTIONS}

  @jax.jit
  def run(keys):
    def one(key):
      return {
        case: local.along(SLOPES[case[0]], distribution=case[1])(
          loss, None, PARAMS, PARAMS, x, key
        )[0]['w']
        for case in sorted(cases)
      }

    return jax.vmap(one)(keys)

  return jax.tree.map(lambda x: np.asarray(x, np.float64), run(keys))


def test_the_mean_of_many_draws_is_the_gradient():
  g = HESSIAN @ W.astype(np.float64)
  for case, draws in estimates().items():
    spread = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - g) < 5 * spread).all(), case


def test_the_variance_grows_with_the_dimension_as_in_closed_form():
  g = HESSIAN @ W.astype(np.float64)
  expected = {'normal': D + 1, 'rademacher': D - 1, 'sphere': D - 1}
  for name, factor in expected.items():
    draws = estimates()['forward_mode', name]
    variance = ((draws - g) ** 2).sum(1).mean()
    assert variance == pytest.approx(factor * g @ g, rel=0.1), name
  # One value has the variance of the loss itself on top: (L / eps)^2 D.
  exact, one = (
    ((estimates()[name, 'normal'] - g) ** 2).sum(1).mean()
    for name in ('forward_mode', 'one_point')
  )
  assert one > exact + (ref.value(W, np.zeros(D), HESSIAN) / MU) ** 2


def test_two_points_have_a_variance_that_grows_like_the_dimension():
  """(P + 1) |g|^2 in P dimensions, with the gradient as the mean."""
  keys = jax.random.split(KEY, 4096)
  for size in (4, 16, 64):
    w = jnp.linspace(0.5, 1.5, size)  # the gradient of |w|^2 / 2

    def half(base, params, batch, key):
      return LossSum(0.5 * jnp.sum(params['w'] ** 2), *jnp.ones(2))

    gradient = local.along(local.two_point(1e-2))
    one = lambda key, half=half, at={'w': w}, gradient=gradient: gradient(
      half, None, at, at, None, key
    )[0]['w']
    draws = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    g = np.asarray(w, np.float64)
    spread = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - g) < 5 * spread).all()
    variance = ((draws - g) ** 2).sum(1).mean()
    assert variance == pytest.approx((size + 1) * g @ g, rel=0.1)


def test_central_differences_and_forward_mode_are_exact_on_a_quadratic():
  each = estimates()
  exact = each['forward_mode', 'normal']
  np.testing.assert_allclose(
    each['two_point', 'normal'], exact, rtol=1e-3, atol=1e-3
  )
  assert np.abs(each['forward_difference', 'normal'] - exact).max() > 0.1


def test_one_pass_forward_gives_the_inner_product_with_the_gradient():
  params, rows = (
    toy.params(),
    jax.tree.map(lambda x: x[0, 0], toy.cohort().batches),
  )
  trained = {'q': params['q']._replace(scale=None)}
  g, sums = backprop(toy.loss, toy.base(), trained, params, rows, KEY)
  estimate = local.along(local.forward_mode(), directions=3)
  got, same = estimate(toy.loss, toy.base(), trained, params, rows, KEY)
  z = jax.vmap(lambda k: directions.draw(k, trained))(jax.random.split(KEY, 3))
  slope = jax.vmap(lambda z: tree.dot(z, g))(z)
  toy.close(got, tree.weighted_sum(z, slope / 3), 1e-4, 1e-5)
  np.testing.assert_allclose(same.total, sums.total, rtol=1e-5)


def products(jaxpr):
  """The matrix products of a program, those of inner programs included."""
  inner = [
    x.jaxpr if hasattr(x, 'jaxpr') else x
    for eqn in jaxpr.eqns
    for value in eqn.params.values()
    for x in (value if isinstance(value, list | tuple) else [value])
    if hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
  ]
  own = sum(eqn.primitive.name == 'dot_general' for eqn in jaxpr.eqns)
  return own + sum(map(products, inner))


def test_no_estimate_has_a_backward_pass():
  def forward_only(base, params, x, key):
    return loss(base, one_way(params, 'a backward pass.'), x, key)

  def traced(gradient, of):
    run = lambda p, key: gradient(of, None, p, p, jnp.zeros(D), key)[0]
    return products(jax.make_jaxpr(run)(PARAMS, KEY).jaxpr)

  evaluate = lambda of, base, p, start, x, key: (of(base, p, x, key).total, 0)
  once = traced(evaluate, loss)
  passes = {'two_point': 2, 'one_point': 1, 'forward_difference': 2}
  for name, slope in SLOPES.items():
    counted = traced(local.along(slope), forward_only)
    if name in passes:
      assert counted == passes[name] * once, name
  with pytest.raises(Error, match='a backward pass'):
    traced(backprop, forward_only)


def test_directions_of_a_leaf_depend_on_its_name_and_only_trained_ones_act():
  both = {'w': jnp.zeros(3), 'v': jnp.zeros((2, 2))}
  z = directions.draw(KEY, both)
  alone = directions.draw(KEY, {'w': both['w'], 'v': None})
  assert (z['w'] == alone['w']).all() and alone['v'] is None
  half = {'w': jnp.array([True, False, True]), 'v': None}
  moved = directions.moved({'w': both['w'], 'v': None}, KEY, 2.0, mask=half)
  np.testing.assert_allclose(moved['w'], 2 * z['w'] * np.array([1, 0, 1]))
  with pytest.raises(Error, match="distribution='cube' is none of"):
    local.along(local.forward_mode(), distribution='cube')
  with pytest.raises(Error, match='two_point: eps=0 must be above 0'):
    local.two_point(0)


# ----------------------------------------------------------------- methods --


def shared_z(seed, round):
  """The directions of a round of DeComFL, [S, P, D]."""
  keys = fresh(P).keys(seed, round, jnp.arange(S * P))
  return drawn(keys).reshape(S, P, D)


def by_scalars(state, cohorts, slope, reduce):
  """The parameters of the server after the rounds, by the reference."""
  w = W
  for round, one in enumerate(cohorts):
    zs = shared_z(state.params.seed, round)
    rows = [
      ref.scalars(w, x, zs, np.float64(HESSIAN), MU, RATE, slope)
      for x in np.asarray(one.batches, float)
    ]
    w = ref.stepped(w, reduce(np.array(rows)), zs, RATE)
  return w


@pytest.fixture(scope='module')
def scalars_run():
  method = recipes.decomfl(
    loss, sgd(), num_steps=S, mu=MU, perturbations=P, log_rounds=2
  )
  cohorts = [cohort(seed=i) for i in range(3)]
  cohorts[1] = cohorts[1]._replace(valid=np.array([True, False, True]))
  return cohorts, *served(method, *cohorts), method


def test_decomfl_averages_scalars_without_weights(scalars_run):
  cohorts, states, _, _ = scalars_run
  whole = [cohorts[0]]
  got = np.asarray(states[1].params.params['w'])
  mean = lambda rows: rows.mean(0)
  want = by_scalars(states[0], whole, ref.forward, mean)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  weighted = lambda rows: np.average(rows, 0, cohorts[0].weight)
  for slope, reduce in ((ref.central, mean), (ref.forward, weighted)):
    other = by_scalars(states[0], whole, slope, reduce)
    assert np.abs(other - got).max() > 1e-3  # neighbours


def test_a_client_that_joins_late_equals_one_that_was_always_there(scalars_run):
  _, states, _, _ = scalars_run
  start, end = states[0].params, states[3].params
  replay = jax.jit(decomfl.replayed)
  log = np.stack([s.params.log[r % 2] for r, s in enumerate(states[1:])])
  late = replay(start, log, 0, 3)
  assert late['w'].tolist() == end.params['w'].tolist()
  there = start
  for round in range(3):
    there = there._replace(params=replay(there, log, round, round + 1))
    now = states[round + 1].params.params
    assert there.params['w'].tolist() == now['w'].tolist()


def test_scalars_and_missed_rounds_are_what_is_billed(scalars_run):
  _, _, infos, _ = scalars_run
  assert all(info.bytes_up[0].sum() == 4 * S * P for info in infos)
  down = np.array([info.bytes_down.sum(1) for info in infos])
  each = 4 * (S * P + 1)
  # A seed; the last round; client 1 dropped out of round 1 and misses two.
  assert down.tolist() == [
    [4] * 3,
    [4 + each] * 3,
    [4 + each, 4 + 2 * each, 4 + each],
  ]
  inner = aggregators.on_coefficients(aggregators.mean())
  rule = aggregators.replaying(inner, 2)
  assert rule.num_bytes is not None
  state = rule.init(Seeded(PARAMS, jnp.zeros((S, P))), KEY)
  late = state._replace(rounds=jnp.int32(9))
  assert int(rule.num_bytes(late, jnp.int32(0))[0]) == 4 + 4 * D  # parameters


def test_cyber_0_trims_every_scalar_and_a_liar_moves_nothing():
  def lie(uploads, key):
    liar = (uploads.ids == 3)[:, None, None]
    sent = uploads.update.coefficients
    wrong = jnp.where(liar, 1e4, sent)
    return uploads._replace(update=uploads.update._replace(coefficients=wrong))

  one = cohort(num=5, weight=[1, 2, 3, 4, 5])
  method = recipes.cyber_0(
    loss, sgd(), num_steps=S, mu=MU, perturbations=P, adversary=lie
  )
  states, _ = served(method, one)
  got = np.asarray(states[1].params.params['w'])

  def reduce(rows):
    rows[3] = -1e4 * P / RATE
    return ref.trimmed(rows, 1)

  want = by_scalars(states[0], [one], ref.central, reduce)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  mean = by_scalars(states[0], [one], ref.central, lambda rows: rows.mean(0))
  assert np.abs(mean - got).max() > 1e-3


POOL, STEPS = 4096, 200
SLOW = 0.005


@functools.cache
def pool(seed):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(np.uint32(seed)), jnp.arange(POOL)
  )
  return drawn(keys)


def places_of(round=0):
  """The seeds that clients draw uniformly: [K, S]."""

  def one(key, step):
    own = jax.random.fold_in(jax.random.fold_in(key, POOL), step)
    return jax.random.randint(own, (), 0, POOL)

  steps = jnp.arange(STEPS)
  keys = tiny.client_key(IDS, round)
  return np.asarray(
    jax.vmap(lambda k: jax.vmap(lambda s: one(k, s))(steps))(keys)
  )


def test_fed_kseed_sends_a_histogram_of_seeds_in_under_18_kb():
  method = recipes.fed_kseed(loss, sgd(SLOW), eps=MU)
  one = cohort(num_steps=STEPS)
  states, infos = served(method, one)
  z, places = pool(int(states[0].params.seed)), places_of()
  hs = [
    ref.histogram(
      np.zeros(POOL), places[k], np.float64(one.batches[k]), z, W,
      np.float64(HESSIAN), MU, SLOW,
    )[0]
    for k in range(K)
  ]  # fmt: skip
  want = np.average(hs, 0, one.weight)
  got = states[1].params.coefficients
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(np.mean(hs, 0) - got).max() > 1e-3  # without weights
  model = method.personal(states[1].params, None)['w']
  np.testing.assert_allclose(model, W + want @ z, rtol=1e-3, atol=1e-4)
  up, down = infos[0].bytes_up.sum(1), infos[0].bytes_down.sum(1)
  assert up.tolist() == [8 * len(set(p)) for p in places]
  assert down.tolist() == [4 * POOL] * K and (up + down).max() < 18000


def test_fed_kseed_forgets_a_client_by_its_histograms():
  """Its terms leave the sum of all rounds; the seeds stay those of the pool."""
  method = recipes.fed_kseed(loss, sgd(SLOW), eps=MU)
  cohorts = [cohort(num_steps=STEPS, seed=seed) for seed in (0, 1)]
  start = method.init(jax.random.key(2**31 + 5), PARAMS)
  rounds = forgetting.Rounds(method, start, cohorts, None)
  got = forgetting.subtracted(rounds, IDS[1]).params
  train, aggregate = forgetting._halves(method, 'this test')
  state, own, blank = start, 0.0, method.init_client(start.params)
  for one in cohorts:
    one = one._replace(states=tree.broadcast(blank, K))
    sent, _, _ = train(state, one, None)
    share = one.weight[1] / one.weight.sum()
    own = own + share * np.float64(sent.update.coefficients[1])
    state, _ = aggregate(state, sent, None)
  want = np.float64(state.params.coefficients) - own
  assert np.abs(own).max() > 1e-3
  np.testing.assert_allclose(got.coefficients, want, atol=1e-6)
  assert int(got.seed) == int(start.params.seed)


def test_fed_kseed_pro_draws_large_slopes_more_often():
  method = recipes.fed_kseed_pro(
    loss, sgd(SLOW), num_steps=STEPS, eps=MU, clip=2.0
  )
  one = cohort(num_steps=STEPS)
  assert method.train is not None and method.aggregate is not None
  train, aggregate = jax.jit(method.train), jax.jit(method.aggregate)
  state = method.init(KEY, PARAMS)
  state = state._replace(
    params=state.params._replace(
      log=jnp.where(jnp.arange(POOL) < 8, 1 / 8, 0.0)
    )
  )  # eight seeds alone
  blank = tree.broadcast(method.init_client(state.params), K)
  sent, _, info = train(state, one._replace(states=blank), None)
  places, slopes = (np.asarray(x)[..., 0] for x in sent.reports)
  assert places.max() < 8 and len(np.unique(places)) == 8
  z = pool(int(state.params.seed))
  for k in range(K):
    h, g = ref.histogram(
      np.zeros(POOL), places[k], np.float64(one.batches[k]), z, W,
      np.float64(HESSIAN), MU, SLOW,
    )  # fmt: skip
    np.testing.assert_allclose(slopes[k], g, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(sent.update.coefficients[k], h, atol=1e-3)
  new, _ = aggregate(state, sent, None)
  want = ref.chances(places.ravel(), slopes.ravel(), POOL, 2.0)
  np.testing.assert_allclose(new.params.log, want, rtol=1e-4)
  assert new.params.log.std() > 0  # uniform draws would have none
  total = info.bytes_up.sum(1) + info.bytes_down.sum(1)
  assert total.tolist() == [4 * POOL + 8 * STEPS] * K and total[0] < 18000


def test_fed_mezo_is_fedavg_of_steps_along_each_clients_own_directions():
  method = recipes.fed_mezo(loss, sgd(), eps=MU)
  one = cohort()
  states, infos = served(method, one)
  ends = []
  for k, key in enumerate(tiny.client_key(IDS)):
    w = np.float64(W)
    for s in range(S):
      keys = jax.random.split(jax.random.fold_in(key, s), 1)
      z = drawn(keys)[0]
      x = np.float64(one.batches[k, s])
      w = w - RATE * ref.central(w, z, x, np.float64(HESSIAN), MU) * z
    ends.append(w)
  got = states[1].params['w']
  np.testing.assert_allclose(got, np.average(ends, 0, one.weight), rtol=1e-4)
  plain, _ = served(recipes.fed_avg(loss, sgd()), one)
  assert np.abs(plain[1].params['w'] - got).max() > 1e-3
  assert infos[0].bytes_up.sum(1).tolist() == [4 * D] * K


def test_fwdllm_chooses_directions_and_waits_for_a_small_variance():
  settings = dict(h=MU, directions=2, candidates=3)
  cohorts = [cohort(seed=i) for i in range(2)]
  w, last, collected, steps = np.float64(W), np.zeros(D), [], []
  variances = []
  for round, one in enumerate(cohorts):
    gs = []
    for k, key in enumerate(tiny.client_key(IDS, round)):
      step_keys = [jax.random.fold_in(key, s) for s in range(S)]
      candidates = [
        drawn(jax.vmap(jax.random.fold_in, (None, 0))(at, jnp.arange(6)))
        for at in step_keys
      ]
      gs.append(ref.forward_gradient(
        w, np.float64(one.batches[k]), candidates, last,
        np.float64(HESSIAN), MU, 2))  # fmt: skip
    order = np.argsort(np.argsort(IDS))
    collected += [(g, order[k] % 2) for k, g in enumerate(gs)]
    halves = [np.mean([g for g, h in collected if h == i], 0) for i in (0, 1)]
    variances.append(((halves[0] - halves[1]) ** 2 / 2).mean())
    if round == 1:
      last = np.mean([g for g, _ in collected], 0)
      w, collected = w - RATE * last, []
    steps.append(w)
  threshold = np.sqrt(variances[0] * variances[1])
  assert variances[1] < threshold < variances[0]
  method = recipes.fwdllm(loss, sgd(), threshold=float(threshold), **settings)
  states, infos = served(method, *cohorts)
  assert states[1].params['w'].tolist() == W.tolist()  # it waits
  assert int(states[1].aggregator.waited) == 1
  np.testing.assert_allclose(states[2].params['w'], steps[1], rtol=1e-4)
  up, down = infos[0].bytes_up.sum(1), infos[0].bytes_down.sum(1)
  assert up.tolist() == [4 * D] * K and down.tolist() == [8 * D] * K


def test_guided_directions_differ_from_the_first_ones():
  last = {'w': jnp.arange(1.0, 1 + D)}
  chosen, _ = fwdllm.nearest(KEY, last, 2, 8)
  z = drawn(jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(16)))
  cosine = z @ np.asarray(last['w']) / np.linalg.norm(z, axis=1)
  assert chosen['w'].tolist() == np.argsort(-cosine)[:2].tolist() != [0, 1]


def test_spry_deals_pairs_and_averages_those_who_trained_them():
  pair = lambda *lead: LowRank(
    jnp.ones((*lead, 3, 2)), jnp.zeros((*lead, 2, 4)), jnp.ones(lead)
  )
  params = {'k': pair(2), 'q': pair(2)}  # four pairs, three clients

  def pull(base, params, x, key):
    factors = [f for node in params.values() for f in (node.a, node.b)]
    total = jnp.float32(0)
    for f in factors:
      total += 0.5 * jnp.sum((f - x[0]) ** 2)
    return LossSum(total, jnp.float32(1), jnp.float32(0))

  one = cohort(num_steps=1)
  method = recipes.spry(pull, sgd(), server=server.sgd())
  states, infos = served(method, one, params=params)
  turn = np.argsort(np.argsort(IDS))
  owner = lambda pair: pair % K
  got = tiny.moved(states[1].params, params)
  trained = tiny.floats(params)
  for k, key in enumerate(tiny.client_key(IDS)):
    own = jax.random.split(jax.random.fold_in(key, 0), 1)[0]
    z = tree.map_present(np.float64, directions.draw(own, trained))
    x = np.float64(one.batches[k, 0, 0])
    mine = {
      name: np.array([owner(2 * i + j) == turn[k] for j in range(2)])
      for i, name in enumerate('kq')
    }
    cut = lambda name, v, m=mine: v * m[name][:, None, None]
    slope = sum(
      (cut(name, getattr(z[name], f)) * (getattr(params[name], f) - x)).sum()
      for name in 'kq'
      for f in 'ab'
    )
    for name in 'kq':
      for field in 'ab':
        want = -RATE * slope * getattr(z[name], field)
        rows = mine[name]
        np.testing.assert_allclose(
          getattr(got[name], field)[rows], want[rows], rtol=1e-3, atol=1e-5
        )
    num = sum(m.sum() for m in mine.values())
    assert infos[0].bytes_up[k].sum() == 4 * num * 2 * (3 + 4)
  default = recipes.spry(pull, sgd()).init(KEY, params)
  assert jax.tree.leaves(default.optimizer)  # FedYogi's moments


# ------------------------------------------------------------------ refusals --


@pytest.mark.parametrize(
  'build, sentence',
  [
    (lambda: recipes.decomfl(loss, local.optimizer('adamw')),
     'decomfl needs local.name=sgd without momentum or clipping, not adamw'),
    (lambda: recipes.decomfl(loss, sgd(), estimate='exact'),
     "estimate='exact' is neither 'forward' nor 'central'"),
    (lambda: recipes.decomfl(loss, sgd(), server=server.fed_adam()),
     'must keep no moments'),
    (lambda: recipes.decomfl(loss, sgd(), perturbations=0),
     'perturbations=0 must be at least 1'),
    (lambda: recipes.decomfl(loss, sgd(), scope=scopes.private('w')).init(
       KEY, PARAMS), 'no leaf can be private'),
    (lambda: recipes.fed_kseed(loss, sgd(), scope=scopes.private('w')).init(
       KEY, PARAMS), 'no leaf can be private'),
    (lambda: recipes.fed_kseed_pro(loss, sgd(), upload=uploads.identity()),
     'the server needs every slope'),
    (lambda: recipes.fwdllm(loss, sgd(), threshold=0), 'threshold=0 must be'),
    (lambda: recipes.spry(loss, sgd(), aggregator=aggregators.mean()),
     'spry brings its own aggregator'),
  ],
)  # fmt: skip
def test_what_does_not_combine_is_one_sentence(build, sentence):
  with pytest.raises(Error, match=sentence):
    build()


def test_more_steps_than_scalars_are_refused():
  method = recipes.decomfl(loss, sgd(), num_steps=1)
  state = method.init(KEY, PARAMS)
  with pytest.raises(Error, match='takes 2 steps a round and num_steps is 1'):
    jax.eval_shape(method.round, state, cohort(), None)


def test_a_sum_of_seeded_coefficients_is_decoded_once():
  codec, ones = uploads.seeded(6), Masks(None, {'w': None})
  context = Context(round_key=KEY)
  first, second = PARAMS, {'w': jnp.arange(float(D))}
  sent = [codec.encode(u, ones, (), context)[0] for u in (first, second)]
  z = drawn(jax.random.split(KEY, 6))
  total = W + np.arange(float(D))
  got = codec.decode(sent[0] + sent[1], PARAMS, context)['w']
  np.testing.assert_allclose(got, z.T @ (z @ total) / 6, rtol=1e-4)
  assert int(codec.num_bytes(sent[0], ones)) == len(
    np.asarray(sent[0]).tobytes()
  )
  sparse, none = uploads.nonzero(), np.zeros(9, np.float32)
  none[[2, 5]] = 1.0
  assert int(sparse.num_bytes(none, ones)) == 16
  assert int(sparse.num_bytes(np.ones(9, np.float32), ones)) == 36


def test_meerkat_steps_on_the_entries_of_largest_squared_gradients():
  """Round 0 scores entries; round 1 is one of DeComFL on two of them."""
  method = recipes.meerkat(loss, sgd(), num_steps=S, eps=MU, density=0.5)
  cohorts = [cohort(seed=i) for i in range(2)]
  states, infos = served(method, *cohorts)
  gaps = np.float64(W) - np.asarray(cohorts[0].batches, float)  # [K, S, D]
  score = ((gaps @ np.float64(HESSIAN)) ** 2).mean((0, 1))
  mask = (score >= np.sort(score)[-2]).astype(float)
  assert states[1].params.mask['w'].tolist() == mask.tolist()
  assert states[1].params.params['w'].tolist() == W.tolist()
  keys = fresh(1).keys(states[0].params.seed, 1, jnp.arange(S))
  ends = {}
  for name, which in (('mine', mask), ('all', np.ones(D))):
    zs = (drawn(keys) * which)[:, None]
    rows = [
      ref.scalars(W, x, zs, np.float64(HESSIAN), MU, RATE, ref.central)
      for x in np.asarray(cohorts[1].batches, float)
    ]
    ends[name] = ref.stepped(W, np.mean(rows, 0), zs, RATE)
  got = states[2].params.params['w']
  np.testing.assert_allclose(got, ends['mine'], rtol=1e-4)
  assert np.abs(got - ends['all']).max() > 1e-3  # without a mask
  up = [info.bytes_up.sum(1).tolist() for info in infos]
  assert up == [[4 * D] * K, [4 * S] * K]


def test_whole_matrices_of_a_network_train_by_the_same_scalars():
  """Traced alone: full weights as `Dense` leaves, one client a block."""
  params = jax.eval_shape(adapters.dense('layers/.*').init, KEY, tiny.base())
  entries = sum(x.size for x in jax.tree.leaves(params))
  settings = dict(num_steps=tiny.S, perturbations=P, block_size=1)
  method = recipes.decomfl(tiny.loss, sgd(), **settings)
  state = jax.eval_shape(method.init, KEY, params)
  new = jax.eval_shape(method.init_client, state.params)
  stacked = lambda x: jax.ShapeDtypeStruct((K, *x.shape), x.dtype)
  one = tiny.cohort()._replace(states=jax.tree.map(stacked, new))
  assert method.train is not None
  uploads, _, _ = jax.eval_shape(method.train, state, one, tiny.base())
  sent = jax.tree.leaves(uploads.update)
  assert [x.shape for x in sent] == [(K, tiny.S, P)]
  assert entries > 100 * tiny.S * P
