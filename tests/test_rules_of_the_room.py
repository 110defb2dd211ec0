"""What holds for every aggregation rule, generated over the whole room."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references_lora as ref
import toy

from fedjax_llm import aggregators, linalg, recipes, server, tree, types
from fedjax_llm.nodes import Controlled, LowRank
from fedjax_llm.run import narration
from fedjax_llm.server import differentiable
from fedjax_llm.types import Masks

KEY = jax.random.key(0)
SETTINGS: dict[str, Any] = {'krum': dict(num_byzantine=0)}
VARIANTS: dict[str, list[dict[str, Any]]] = {
  'masked_mean': [dict(denominator='weight'), dict(weighted=False)],
  'fedex': [dict(weighted=True), dict(residual_rank=1)],
  'flexlora': [dict(split='a'), dict(split='both')],
  'fedrot': [dict(strength=0.5)],
  'norm_weighted': [dict(per='target'), dict(keep_unheld=False)],
  'zero_padding': [dict(weighted=False), dict(keep_unheld=False)],
  'replication': [dict(weighted=False)],
}
PARTS = ('as_stack', 'control_variates', 'from_rule')
RULES: dict[str, Any] = {
  f'{name}:{i}': (name, settings)
  for name in aggregators.__all__
  if name not in PARTS
  for i, settings in enumerate([{}, *VARIANTS.get(name, [])])
}
RULES['from_rule:0'] = ('from_rule', dict(fn=lambda u, w: tree.take(u, 0)))
K = 5


def rule(name):
  builder, settings = RULES[name]
  settings = {**SETTINGS.get(builder, {}), **settings}
  return aggregators.as_stack(getattr(aggregators, builder)(**settings))


def applied(params, result):
  new = tree.add(params, result.delta)
  return new if result.assign is None else tree.merge(result.assign, new)


@functools.cache
def program(name):
  one = rule(name)

  @jax.jit
  def run(uploads, params):
    before = one.init(params, KEY)
    result, after = one.aggregate(uploads, before, params, KEY)
    return applied(params, result), before, after

  return run


def some_ranks(uploads, ranks):
  """The same uploads of clients that hold the first ranks of two."""
  held = jnp.arange(toy.R) < jnp.asarray(ranks)[:, None]
  mask = {'q': LowRank(held, held[..., None], None)}
  cut = lambda x: tree.apply_mask(
    x, tree.map_present(tree.rows, mask, tree.like(x, mask))
  )
  return uploads._replace(
    update=cut(uploads.update),
    start=cut(uploads.start),
    masks=Masks(mask, mask),
  )


def still(name, uploads, params):
  new, before, after = program(name)(uploads, params)
  residual = getattr(new['q'], 'residual', None)
  if residual is not None:
    np.testing.assert_array_equal(residual, 0)
    new = {'q': new['q']._replace(residual=None)}
  toy.close(new, params, rtol=0, atol=0)
  toy.close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('ranks', [[2] * K, [1] * K, [1, 2, 1, 1, 2]])
def test_a_cohort_of_weight_zero_changes_nothing(name, ranks):
  uploads, params = toy.uploads(K)
  uploads = some_ranks(uploads, ranks)
  still(name, uploads._replace(weight=jnp.zeros(K)), params)
  nobody = jnp.zeros(K, bool)
  still(name, uploads._replace(weight=jnp.ones(K), valid=nobody), params)


@pytest.mark.parametrize('name', RULES)
def test_a_client_of_weight_zero_counts_for_nothing(name):
  uploads, params = toy.uploads(K)
  weight = uploads.weight.at[1].set(0.0)
  one, _, _ = program(name)(uploads._replace(weight=weight), params)
  valid = uploads.valid.at[1].set(False)
  two, _, _ = program(name)(uploads._replace(valid=valid), params)
  toy.close(one, two)


def test_control_variates_stay_where_nobody_weighs():
  uploads, params = toy.uploads(K)
  both = lambda x: Controlled(x, x)
  uploads = uploads._replace(
    update=both(uploads.update),
    start=both(uploads.start),
    masks=Masks(*map(both, uploads.masks)),
    weight=jnp.zeros(K),
  )
  for inner in (aggregators.mean(), aggregators.median()):
    one = aggregators.as_stack(aggregators.control_variates(inner, 9))
    pair = both(params)
    result, _ = one.aggregate(uploads, (), pair, KEY)
    toy.close(applied(pair, result), pair, rtol=0, atol=0)


def test_a_round_of_weight_zero_moves_no_moments():
  algorithm = recipes.fed_avgm(toy.loss, toy.sgd())
  step = jax.jit(algorithm.round)
  cohort = toy.cohort(num_clients=K)
  state, _, _ = step(algorithm.init(KEY, toy.params()), cohort, toy.base())
  nothing = cohort._replace(weight=np.zeros(K, np.float32))
  after, _, metrics = step(state, nothing, toy.base())
  numbers = lambda s: s._replace(key=None, round=None)
  toy.close(numbers(after), numbers(state), rtol=0, atol=0)
  assert after.round == state.round + 1
  assert metrics.metrics['aggregators/error'] == 0


# ------------------------------------------------- what nobody trained stays --

SERVERS = {name: getattr(server, name) for name in server.__all__}


def moments_of(optimizer, where):
  """The moments of one factor: leaves of the state that have its shape."""
  leaves = jax.tree_util.tree_leaves_with_path(optimizer)
  pick = lambda path: jax.tree_util.keystr(path).endswith(f'.{where}')
  return [x for path, x in leaves if pick(path) and x.ndim == 2]


@pytest.mark.parametrize('name', SERVERS)
@pytest.mark.parametrize('recipe', ['rolora', 'lora_a2'])
def test_the_factor_whose_turn_it_is_not_stays(name, recipe):
  more = {'budget': 1} if recipe == 'lora_a2' else {}
  algorithm = getattr(recipes, recipe)(
    toy.loss, toy.sgd(), server=SERVERS[name](0.1), **more
  )
  step = jax.jit(algorithm.round)
  state = algorithm.init(KEY, toy.params())
  for number in range(4):
    new, _, _ = step(state, toy.cohort(num_clients=K, seed=number), toy.base())
    stays, moves = ('a', 'b') if number % 2 == 0 else ('b', 'a')
    get = lambda s, x: np.asarray(getattr(s.params['q'], x))
    np.testing.assert_array_equal(get(new, stays), get(state, stays))
    assert np.any(get(new, moves) != get(state, moves))
    old_moments = moments_of(state.optimizer, stays)
    for old, now in zip(old_moments, moments_of(new.optimizer, stays)):
      np.testing.assert_array_equal(now, old)
    state = new


@pytest.mark.parametrize(
  'name, size', [('fed_adam', 2), *((name, None) for name in SERVERS)]
)
def test_ranks_that_nobody_holds_stay(name, size):
  algorithm = recipes.rbla(
    toy.loss, toy.sgd(), server=SERVERS[name](0.1), block_size=size
  )
  step = jax.jit(algorithm.round)
  cohort = toy.cohort(num_clients=K)
  large = cohort._replace(profiles=np.array([2, 1, 2, 1, 2], np.int32))
  small = cohort._replace(profiles=np.ones(K, np.int32))
  state, _, _ = step(algorithm.init(KEY, toy.params()), large, toy.base())
  new, _, _ = step(state, small, toy.base())
  old, now = state.params['q'], new.params['q']
  np.testing.assert_array_equal(now.a[:, 1], old.a[:, 1])
  np.testing.assert_array_equal(now.b[1], old.b[1])
  assert np.all(now.a[:, 0] != old.a[:, 0])
  for x, y in zip(
    moments_of(state.optimizer, 'a'), moments_of(new.optimizer, 'a')
  ):
    np.testing.assert_array_equal(x[:, 1], y[:, 1])


def test_an_optimizer_of_ones_own_leaves_what_nobody_trained():
  """Weight decay and moments in another structure: optax's own AdamW."""
  algorithm = recipes.rolora(
    toy.loss, toy.sgd(), server=optax.adamw(0.1, weight_decay=0.5)
  )
  step = jax.jit(algorithm.round)
  state = algorithm.init(KEY, toy.params())
  new, _, _ = step(state, toy.cohort(num_clients=K), toy.base())
  toy.close(new.params['q'].a, state.params['q'].a, rtol=0, atol=0)
  assert new.optimizer[0].count == 1
  assert not np.any(new.optimizer[0].nu['q'].a)
  assert np.all(np.asarray(new.optimizer[0].nu['q'].b) > 0)


# ----------------------------------------------------------- ranks that die --


@pytest.mark.parametrize('name', ['zero_padding:0', 'norm_weighted:0'])
def test_a_rank_that_nobody_holds_keeps_the_servers_value(name):
  uploads, params = toy.uploads(K)
  small = some_ranks(uploads, [1] * K)
  new, _, _ = program(name)(small, params)
  old = params['q']
  np.testing.assert_array_equal(new['q'].a[:, 1], old.a[:, 1])
  np.testing.assert_array_equal(new['q'].b[1], old.b[1])
  whole = tree.whole(small)['q']
  a, b, scale = ref.f64(whole.a, whole.b, whole.scale)
  weight = uploads.weight
  if name == 'norm_weighted:0':
    weight = [np.linalg.norm(s * x @ y) for x, y, s in zip(a, b, scale)]
  want = ref.mean_factors(a, b, weight)
  np.testing.assert_allclose(new['q'].a[:, 0], want[0][:, 0], rtol=1e-5)
  np.testing.assert_allclose(new['q'].b[0], want[1][0], rtol=1e-5)
  papers = 'zero_padding:2' if name == 'zero_padding:0' else 'norm_weighted:2'
  dead, _, _ = program(papers)(small, params)
  assert not np.any(dead['q'].a[:, 1]) and not np.any(dead['q'].b[1])


@pytest.mark.parametrize('recipe', ['zero_padding', 'het_lora'])
def test_a_rank_comes_back_when_a_large_client_does(recipe):
  algorithm = getattr(recipes, recipe)(toy.loss, toy.sgd())
  step = jax.jit(algorithm.round)
  state = algorithm.init(KEY, toy.params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  cohort = toy.cohort(num_clients=K, states=states)
  small = cohort._replace(profiles=np.ones(K, np.int32))
  state, _, _ = step(state, small, toy.base())
  large = cohort._replace(profiles=np.full(K, 2, np.int32))
  new, _, _ = step(state, large, toy.base())
  assert np.all(new.params['q'].b[1] != toy.params()['q'].b[1])
  papers = getattr(recipes, recipe)(toy.loss, toy.sgd(), keep_unheld=False)
  dead, _, _ = jax.jit(papers.round)(
    papers.init(KEY, toy.params()), small, toy.base()
  )
  assert not np.any(dead.params['q'].b[1])


# ---------------------------------------------------------- weights of rules --


@pytest.mark.parametrize('weighted', [False, True])
def test_the_error_of_an_exact_rule_is_zero_with_the_rules_own_weights(
  weighted,
):
  algorithm = recipes.fedex_lora(
    toy.loss, toy.sgd(), weighted=weighted, fold=toy.fold
  )
  cohort = toy.cohort(num_clients=K)
  cohort = cohort._replace(weight=np.array([1.0, 50, 2, 9, 30], np.float32))
  state = algorithm.init(KEY, toy.params())
  _, _, metrics = jax.jit(algorithm.round)(state, cohort, toy.base())
  assert metrics.metrics['aggregators/error'] < 1e-6


@pytest.mark.parametrize('name', RULES)
def test_a_rule_tells_the_weights_that_it_uses(name):
  uploads, _ = toy.uploads(K)
  uploads = uploads._replace(weight=jnp.array([1.0, 50, 2, 0, 30]))
  one = rule(name)
  got = uploads.weight if one.weights is None else one.weights(uploads)
  got = np.asarray(got, np.float64) / np.sum(got)
  builder, settings = RULES[name]
  chosen = ('krum', 'foolsgold', 'geometric_median', 'product_krum')
  chosen += ('product_geometric_median', 'fltrust', 'one_after_another')
  chosen += ('all_together',)
  if builder in chosen or name in ('norm_weighted:0', 'norm_weighted:2'):
    assert got[3] == 0 and abs(got.sum() - 1) < 1e-6
    return
  unweighted = settings.get('weighted') is False or (
    builder in ('buffered_mean', 'median', 'trimmed_mean', 'uniform_mean')
    or builder in ('bucketing', 'centred_clipping', 'nearest_mixing')
    or builder in ('in_products', 'buffered_mean')
    or (builder == 'fedex' and not settings.get('weighted'))
  )
  weight = np.array([1, 1, 1, 0, 1] if unweighted else [1, 50, 2, 0, 30])
  np.testing.assert_allclose(got, weight / weight.sum(), rtol=1e-6)


# ------------------------------------------------------------- huge uploads --


@pytest.mark.parametrize('name', ['norm_weighted', 'lora_fair', 'flexlora'])
def test_huge_uploads_are_left_out_and_named(name):
  def train(base, start, state, batch, masks, context):
    update = {'q': LowRank(batch, jnp.ones((toy.R, toy.F)), None)}
    return types.ClientOutput(update, masks)

  update = types.LocalUpdate(lambda params: (), train)
  algorithm = recipes.compose(update, aggregator=getattr(aggregators, name)())
  step = jax.jit(algorithm.round)
  state = algorithm.init(KEY, toy.params())
  for size in (1e12, 1e25, 3e38):
    batches = np.ones((K, toy.D, toy.R), np.float32)
    batches[2] *= np.float32(size)
    ones = np.ones(K, np.float32)
    cohort = types.Cohort(np.arange(K), batches, ones, ones > 0)
    new, _, metrics = step(state, cohort, None)
    assert metrics.finite.tolist() == [1, 1, 0, 1, 1]
    assert tree.all_finite((new.params, metrics.metrics['aggregators/error']))
    alone, _, _ = step(state, cohort._replace(valid=np.arange(K) != 2), None)
    toy.close(new.params, alone.params)


def test_an_aggregate_that_is_not_finite_changes_nothing():
  broken = aggregators.from_rule(
    lambda update, weight: jax.tree.map(lambda u: u[0] / 0.0, update)
  )
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(), aggregator=broken)
  state = algorithm.init(KEY, toy.params())
  new, _, metrics = jax.jit(algorithm.round)(
    state, toy.cohort(num_clients=K), toy.base()
  )
  toy.close(new.params, state.params, rtol=0, atol=0)
  assert (~metrics.finite).all()
  assert not metrics.reported.any()


# ------------------------------------------------------------ unclear words --


def mine(update, weight):
  return tree.weighted_sum(update, weight)


def build_mine(power=1.0, eps=1e-9):
  return aggregators.from_rule(mine)


@pytest.mark.parametrize(
  'aggregator, sentence',
  [
    ('median', "aggregator is the name 'median': build it"),
    (aggregators.median, 'aggregator is the builder median: call it'),
    (build_mine, 'aggregator is the builder build_mine: call it'),
    (mine, r'aggregator is the function mine: .*from_rule\(mine\)'),
    (7, 'aggregator is of type int'),
  ],
)
def test_what_is_no_rule_is_named(aggregator, sentence):
  with pytest.raises(types.Error, match=sentence):
    recipes.fed_avg(toy.loss, toy.sgd(), aggregator=aggregator)
  for wrap in (aggregators.as_stack, aggregators.on_shared):
    with pytest.raises(types.Error, match=sentence[len('aggregator') :]):
      wrap(aggregator)


@pytest.mark.parametrize(
  'fn, sentence',
  [
    (aggregators.median(), 'this is a rule already'),
    (aggregators.median, 'median builds a rule'),
    (build_mine, 'build_mine builds a rule'),
    (lambda update: update, 'does not take two arguments'),
    ('mean', 'not str'),
  ],
)
def test_what_is_no_function_of_a_rule_is_named(fn, sentence):
  with pytest.raises(types.Error, match=sentence):
    aggregators.from_rule(fn)


def test_the_first_leaf_of_another_shape_is_named():
  uploads, params = toy.uploads(K)
  for fn, sentence in (
    (lambda u, w: u, r'q/a has the shape \(5, 4, 2\) instead of \(4, 2\)'),
    (lambda u, w: {'q': u['q'].a[0]}, 'q/a is missing'),
  ):
    with pytest.raises(types.Error, match=sentence):
      aggregators.from_rule(fn).aggregate(uploads, (), params, KEY)


def test_a_branch_on_a_traced_value_is_explained_with_its_line():
  def branches(update, weight):
    if weight[0] > 0.5:
      return tree.take(update, 0)
    return tree.weighted_sum(update, weight)

  rule = aggregators.from_rule(branches)
  own = aggregators.mean()._replace(
    finalize=lambda sums, state, params, key: float(sums.weight)
  )
  for aggregator, name in ((rule, 'from_rule: branches'), (own, 'aggregator')):
    algorithm = recipes.fed_avg(toy.loss, toy.sgd(), aggregator=aggregator)
    state = algorithm.init(KEY, toy.params())
    with pytest.raises(types.Error) as error:
      jax.jit(algorithm.round)(state, toy.cohort(num_clients=K), toy.base())
    assert name in str(error.value) and 'jnp.where' in str(error.value)
    assert 'test_rules_of_the_room.py, line' in str(error.value)


# -------------------------------------------------------------------- FLASC --


def test_flasc_as_in_its_code_is_adamw_and_serves_what_clients_download():
  """Two rounds, dense updates: AdamW as a loop, the largest half is served."""
  rate, decay, b1, b2, eps = 0.05, 0.01, 0.9, 0.999, 1e-8
  flasc = lambda **more: recipes.flasc(
    toy.loss, toy.sgd(), server_learning_rate=rate, variant='code', **more
  )
  dense = flasc(download_density=1.0, upload_density=1.0)
  plain = recipes.fed_avg(
    toy.loss, toy.sgd(), aggregator=aggregators.uniform_mean()
  )
  state = dense.init(KEY, toy.params())
  one, two = jax.jit(dense.round), jax.jit(plain.round)
  pair = lambda s: np.concatenate(
    [np.ravel(x) for x in (s.params['q'].a, s.params['q'].b)]
  ).astype(np.float64)
  x, m, v = pair(state), 0.0, 0.0
  for t in (1, 2):
    cohort = toy.cohort(num_clients=K, seed=t)
    begin = plain.init(KEY, state.params)._replace(round=state.round)
    mean, _, _ = two(begin, cohort, toy.base())
    delta = pair(mean) - pair(begin)
    state, _, _ = one(state, cohort, toy.base())
    m, v = b1 * m + (1 - b1) * delta, b2 * v + (1 - b2) * delta**2
    step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    x = (1 - rate * decay) * x + rate * step
    np.testing.assert_allclose(pair(state), x, rtol=1e-4, atol=1e-5)
  served = flasc(download_density=0.5).personal(state.params, None)
  flat = pair(state)
  bound = np.sort(np.abs(flat))[len(flat) // 2]
  want = np.where(np.abs(flat) >= bound, flat, 0)
  np.testing.assert_array_equal(pair(state._replace(params=served)), want)
  toy.close(dense.personal(state.params, None), state.params)
  with pytest.raises(types.Error, match="variant='torch' is neither 'paper'"):
    recipes.flasc(toy.loss, toy.sgd(), variant='torch')


# ---------------------------------------------------------------- bytes down --


@pytest.mark.parametrize('recipe', ['fedex_lora', 'flora'])
def test_a_client_that_was_absent_is_billed_for_what_it_missed(recipe):
  """Client 0 is there in rounds 0 and 3, client 1 always, client 2 from 3."""
  method = getattr(recipes, recipe)(toy.loss, toy.sgd(), fold=toy.fold)
  step = jax.jit(method.round)
  state = method.init(KEY, toy.params())
  states = tree.broadcast(method.init_client(state.params), 3)
  present = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1]], bool)
  down = []
  for valid in present:
    cohort = toy.cohort(num_clients=3, states=states)
    cohort = cohort._replace(
      valid=valid, profiles=np.ones(3, np.int32), weight=np.ones(3, np.float32)
    )
    state, states, metrics = step(state, cohort, toy.base())
    down.append(np.asarray(metrics.bytes_down)[:, -1])
  # Of what a round adds: FedEx (n - 1) R ranks, FLoRA a rank of each client.
  ranks = {'fedex_lora': [2, 0, 0], 'flora': [2, 1, 1]}[recipe]
  size = lambda rank: 4 * min(rank * (toy.D + toy.F), toy.D * toy.F)
  first = size(ranks[0])
  assert down[0].tolist() == [0, 0, 0]
  assert down[1][1] == first and down[2][1] == size(ranks[1])
  assert down[3].tolist() == [
    size(sum(ranks)),
    size(ranks[2]),
    size(sum(ranks)),
  ]


# ---------------------------------------------------------------- one of all --


def test_factorisations_one_after_another_equal_those_of_a_batch():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  square = np.swapaxes(x, -1, -2) @ x + np.eye(4, dtype=np.float32)

  @jax.jit
  def run(x, square):
    right = jnp.swapaxes(x, -1, -2)
    return linalg.svd(x), linalg.qr(x), jax.vmap(linalg.solve)(square, right)

  (u, s, v), (q, r), solved = run(x, square)
  np.testing.assert_allclose(u * s[..., None, :] @ v, x, atol=1e-5)
  want = np.linalg.svd(x.astype(np.float64), compute_uv=False)
  np.testing.assert_allclose(s, want, rtol=1e-4)
  np.testing.assert_allclose(q @ r, x, atol=1e-5)
  np.testing.assert_allclose(square @ solved, np.swapaxes(x, -1, -2), atol=1e-4)
  size = lambda x: jnp.sum(linalg.svd(x)[1] ** 2)
  np.testing.assert_allclose(jax.grad(size)(x), 2 * x, atol=1e-4)


def test_one_client_that_happens_to_be_alone_does_not_end_a_run():
  draw = types.Draw(np.array([3, 1]), np.array([True, False]))
  none = np.zeros((2, 1), np.int32)
  who = np.array([False, True])
  info = types.RoundInfo(who, who, none, none, {})
  names = [f'c{i}' for i in range(9)]
  after, note = narration.left_out({}, info, draw, names, 4)
  assert after['clients/not_finite_names'] == ['c3']
  assert note.startswith('round 4: left out 1 of 1 clients')
  alone = types.Draw(np.array([0]), np.array([True]))
  info = info._replace(finite=np.array([False]))
  with pytest.raises(narration.Diverged, match='all 1 clients'):
    narration.left_out({}, info, alone, ['c0'], 4)


def test_a_list_of_cohorts_is_named():
  algorithm = recipes.fed_avg(toy.loss, toy.sgd())
  state = algorithm.init(KEY, toy.params())
  many = [toy.cohort(num_clients=K)] * 2
  for run in (algorithm.round, differentiable.rounds(algorithm)):
    with pytest.raises(types.Error, match='a round takes one Cohort, not a li'):
      run(state, many, toy.base())
