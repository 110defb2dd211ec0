"""Methods with layers left out and with stages, checked by hand.

The network of `test_variants`: y = x sum_l W'_l over two layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_variants as ref
import toy
from test_variants import (
  KEY,
  B,
  D,
  F,
  K,
  L,
  R,
  base,
  clients,
  cohort,
  loss,
  watched,
  wire,
)

from fedjax_llm import (
  adapters,
  aggregators,
  local,
  models,
  recipes,
  tree,
  uploads,
)
from fedjax_llm import clients as rooms
from fedjax_llm.adapters import gates
from fedjax_llm.clients import scopes
from fedjax_llm.recipes.lora import slora
from fedjax_llm.recipes.ranks.fed_hm import frobenius_decay
from fedjax_llm.recipes.ranks.hafl import important
from fedjax_llm.types import Batch, Error

RATE, SCALE, ROUNDS, T1 = 0.1, 3.0 / R, 8, 3
LAYERS = np.array([1, 2, 1, 1], np.int32)
RATES = {'fed_hm': 0.03, 'hafl': 0.03}


RANKS = {'fed_hm': np.array([4, 2, 3, 2]), 'hafl': np.array([1, 2, 3, 1])}
SETTINGS = {
  'slora': dict(first_rounds=T1),
  'fed_hm': dict(decay=0.01),
  'hafl': dict(beta1=0.6, beta2=0.7),
}


def start(name='slora'):
  if name == 'fed_hm':
    build = adapters.factorised(F, targets='q')
  else:
    build = adapters.lora(3 if name == 'hafl' else R, 3.0, targets='q')
  params = build.init(KEY, base())
  if name == 'hafl':  # at b = 0 no unit matters
    q = params['layers']['q']
    params['layers']['q'] = q._replace(b=jax.random.normal(KEY, q.b.shape))
  return params


@functools.cache
def run(name, num_rounds=ROUNDS, **more):
  """Every round's (state, client states, metrics), the first before any."""
  algorithm = getattr(recipes, name)(
    loss,
    local.optimizer('sgd', RATES.get(name, RATE)),
    upload=watched(uploads.identity(bitmap=name == 'hafl')),
    fold=adapters.fold,
    **{**SETTINGS.get(name, {}), **more},
  )
  state = algorithm.init(KEY, start(name))
  states = tree.broadcast(algorithm.init_client(state.params), K)
  step = jax.jit(algorithm.round)
  history: list = [(state, states, {})]
  for _ in range(num_rounds):
    profiles = {'layers': LAYERS, 'rank': RANKS.get(name, LAYERS)}
    of = cohort(states, profiles=jax.tree.map(np.int32, profiles))
    state, states, told = step(state, of, base())
    history.append((state, states, jax.device_get(told)))
  return algorithm, history, step


@pytest.mark.parametrize('name', ['fed_ra', 'slora', 'fed_hm', 'hafl'])
def test_the_loss_falls_and_bytes_are_those_of_a_message(name):
  _, history, _ = run(name)
  told = [told for *_, told in history[1:]]
  assert told[-1].metrics['local/loss'] < 0.75 * told[0].metrics['local/loss']
  for _, states, info in history[1:]:
    for k in range(K):
      # A bit a unit in the masks of a and of b says which were trained.
      bitmap = 2 * -(-L * 3 // 8) if name == 'hafl' else 0
      size = len(wire(states, k)) + bitmap
      assert size == info.bytes_up[k].sum()


# ------------------------------------------------------------------ fed_ra --


def held(history):
  """[T, K, L]: who trained which layer, as the messages say."""
  of = lambda states: np.asarray(states.upload[1]['layers']['q'].a)
  return np.stack([of(s).any((2, 3)) for _, s, _ in history[1:]])


def test_fed_ra_is_that_of_the_reference():
  _, history, _ = run('fed_ra')
  first, last = start()['layers']['q'], history[3][0].params['layers']['q']
  w = np.float64(base()['layers']['q']['kernel'])
  mine = held(history)[:3]
  wanted = ref.fed_ra(
    w, SCALE, {'a': first.a, 'b': first.b}, clients(), mine, RATE
  )
  np.testing.assert_allclose(last.a, wanted['a'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(last.b, wanted['b'], rtol=1e-5, atol=1e-5)


def test_fed_ra_draws_as_many_layers_as_a_client_has_anew_in_every_round():
  algorithm, history, _ = run('fed_ra')
  mine = held(history)
  assert (mine.sum(-1) == LAYERS).all()
  weak = mine[:, LAYERS == 1, 0]
  assert (weak.any(0) & ~weak.all(0)).any()
  told = history[1][2]
  sent = 4 * R * (D + F) * LAYERS
  assert told.bytes_up.sum(1).tolist() == sent.tolist()
  assert told.bytes_down.sum(1).tolist() == (sent + 4 * LAYERS).tolist()
  state = history[-1][0]
  assert (state.params['layers']['gate'] == 1).all()
  served = algorithm.personal(state.params, None)
  assert list(served['layers']) == ['q']


def test_fed_ra_with_all_layers_is_fed_it():
  ours, history, step = run('fed_ra')
  everything = {'layers': np.full(K, L, np.int32), 'rank': LAYERS}
  state, states, _ = history[2]
  new, *_ = step(state, cohort(states, profiles=everything), base())
  algorithm = recipes.fed_it(
    loss, toy.sgd(), aggregator=aggregators.uniform_mean()
  )
  state = algorithm.init(KEY, ours.personal(state.params, None))
  wanted, *_ = jax.jit(algorithm.round)(state, cohort(), base())
  toy.close(ours.personal(new.params, None), wanted.params)


def test_a_layer_whose_gate_is_shut_is_not_there():
  """The residual stream goes past it, as past a layer that writes nothing."""
  loaded = models.random(vocab_size=32, hidden_size=16, num_layers=2)
  params = adapters.lora(R).init(KEY, loaded.base)
  params = jax.tree.map(lambda x: x + 0.1, params)
  tokens = jnp.arange(8)[None] % 32
  ones = jnp.ones_like(tokens)
  batch = Batch(tokens, ones > 0, ones, jnp.arange(8)[None])

  @jax.jit
  def hidden(base, gate):
    inner = {**params['layers'], 'gate': gate}
    return loaded.model.hidden(base, {'layers': inner}, batch)

  everything = hidden(loaded.base, jnp.ones(2))
  for layer in range(2):
    others = jnp.arange(2) != layer

    def silent(path, x, others=others):
      name = jax.tree_util.keystr(path)
      writes = 'o_proj' in name or 'down_proj' in name
      return x * others[:, None, None] if writes else x

    mute = jax.tree_util.tree_map_with_path(silent, loaded.base)
    found = hidden(loaded.base, others.astype(jnp.float32))
    np.testing.assert_allclose(found, hidden(mute, jnp.ones(2)), atol=1e-6)
    assert jnp.abs(found - everything).max() > 0.1
  gated = gates.added(params)
  assert gates.without(gated).keys() == params.keys()


def test_fed_ra_says_what_is_missing():
  algorithm = recipes.fed_ra(loss, toy.sgd())
  state = algorithm.init(KEY, start())
  with pytest.raises(Error, match='number of layers of every client'):
    jax.eval_shape(algorithm.round, state, cohort(), base())
  with pytest.raises(Error, match='no adapter in the layers'):
    algorithm.init(KEY, {'head': jnp.ones(2)})
  with pytest.raises(Error, match='brings its own aggregator'):
    recipes.fed_ra(loss, toy.sgd(), aggregator=None)
  with pytest.raises(Error, match='they start at 1'):
    rooms.profiles.layers((0, 2), num_clients=3)


# ------------------------------------------------------------------- slora --


def test_slora_is_sparse_first_and_then_the_factors_of_what_it_found():
  _, history, _ = run('slora')
  first = history[0][0].params
  places = np.asarray(first.sparse['layers']['q'].places)
  assert places.shape == (L, R * (D + F))
  for row in places:
    assert len(set(row.tolist())) == len(row) and row.max() < D * F
  w = np.float64(base()['layers']['q']['kernel'])
  change, pull, dense = ref.sparse(w, places)
  weight = cohort().weight
  zero = {'v': np.zeros(places.shape)}
  early = ref.federated(zero, change, pull, clients(), weight, RATE, T1 - 1)
  found = history[T1 - 1][0].params
  values = found.sparse['layers']['q'].values
  np.testing.assert_allclose(values, early['v'], rtol=1e-5, atol=1e-5)
  # Only the sparse part moved, and only the factors move from T1 on.
  toy.close(found.factors, first.factors)
  wanted = ref.federated(zero, change, pull, clients(), weight, RATE, T1)
  a, b = ref.largest(dense(wanted['v']), R, SCALE)
  turned = history[T1][0].params
  node = turned.factors['layers']['q']
  np.testing.assert_allclose(
    node.scale[0] * node.a @ node.b, SCALE * a @ b, atol=1e-5
  )
  assert not turned.sparse['layers']['q'].values.any()
  node = {'a': np.float64(node.a), 'b': np.float64(node.b)}
  late = ref.federated(node, *ref.lora(w, SCALE), clients(), weight, RATE, 2)
  last = history[T1 + 2][0].params
  assert not last.sparse['layers']['q'].values.any()
  got = last.factors['layers']['q']
  np.testing.assert_allclose(got.a, late['a'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got.b, late['b'], rtol=1e-5, atol=1e-5)


def test_slora_sends_the_same_in_both_stages_and_serves_what_it_has():
  algorithm, history, _ = run('slora')
  for _, _, told in history[1:]:
    for counts in (told.bytes_up, told.bytes_down):
      assert (counts.sum(1) == 4 * L * R * (D + F)).all()
  for state, *_ in history[1 : T1 + 2]:
    served = algorithm.personal(state.params, None)
    x, y = cohort().batches.x[0, 0], np.zeros((B, F))
    rows = toy.Rows(x, y, np.ones(B, bool))
    folded, bare = adapters.fold(base(), served)
    one = loss(base(), served, rows, KEY).total
    np.testing.assert_allclose(
      loss(folded, bare, rows, KEY).total, one, rtol=1e-5
    )


def test_a_full_pattern_of_the_full_rank_loses_nothing_at_the_turn():
  factors = adapters.lora(F, 3.0, targets='q').init(KEY, base())
  sparse = slora._pattern(KEY, factors, 1.0)
  values = jax.random.normal(KEY, (L, D * F))
  sparse['layers']['q'] = sparse['layers']['q']._replace(values=values)
  staged = slora.Staged(sparse, factors)
  turned = slora._factored(staged)
  product = lambda p: adapters.product(slora._together(p)['layers']['q'])
  np.testing.assert_allclose(product(turned), product(staged), atol=1e-5)
  assert not turned.sparse['layers']['q'].values.any()


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(first_rounds=0), 'first_rounds=0 must be at least 1'),
    (dict(density=0.0), 'density=0.0 must be above 0'),
    (dict(scope=None), 'brings its own scope'),
  ],
)
def test_settings_of_slora_out_of_range_are_refused(settings, words):
  with pytest.raises(Error, match=words):
    recipes.slora(loss, toy.sgd(), **settings)


def test_slora_needs_factors():
  algorithm = slora.slora(loss, toy.sgd())
  with pytest.raises(Error, match='needs low-rank factors'):
    algorithm.init(KEY, adapters.vera(2, targets='q').init(KEY, base()))


# ------------------------------------------------------- fed_hm and hafl --


def test_fed_hm_is_that_of_the_reference():
  _, history, _ = run('fed_hm')
  first = start('fed_hm')['layers']['q']
  w = np.float64(base()['layers']['q']['kernel'])
  np.testing.assert_allclose(first.a @ first.b, w, atol=1e-5)
  merged = adapters.merge(base(), {'layers': {'q': first}})
  np.testing.assert_allclose(merged['layers']['q']['kernel'], w, atol=1e-5)

  def begin(p, k):
    rank = RANKS['fed_hm'][k]
    return {'a': p['a'][..., :rank], 'b': p['b'][:, :rank]}

  def finish(p):
    return dict(zip('ab', ref.largest(p['w'], F, 1.0)))

  wanted = ref.federated(
    {'a': first.a, 'b': first.b},
    *ref.fed_hm(0.01),
    clients(),
    cohort().weight,
    RATES['fed_hm'],
    3,
    settle=lambda p: {'w': p['a'] @ p['b']},
    begin=begin,
    finish=finish,
  )
  node = history[3][0].params['layers']['q']
  found = node.a @ node.b
  np.testing.assert_allclose(found, wanted['a'] @ wanted['b'], atol=1e-5)
  assert np.abs(found - w).max() > 0.1


def test_a_decay_of_nothing_is_no_decay():
  assert frobenius_decay(loss, 0.0) is loss
  rows = jax.tree.map(lambda x: x[0, 0], cohort().batches)
  params = start('hafl')
  product = np.float64(adapters.product(params['layers']['q']))
  more = frobenius_decay(loss, 0.3)(base(), params, rows, KEY).total
  plain = loss(base(), params, rows, KEY).total
  np.testing.assert_allclose(
    (more - plain) / B, 0.15 * (product**2).sum(), rtol=1e-4
  )
  with pytest.raises(Error, match='strength=-1 must not be negative'):
    frobenius_decay(loss, -1)


def test_hafl_is_that_of_the_reference():
  _, history, _ = run('hafl')
  first = start('hafl')['layers']['q']
  wanted, units = ref.hafl(
    np.float64(base()['layers']['q']['kernel']),
    float(first.scale[0]),
    first.a,
    first.b,
    RANKS['hafl'],
    clients(),
    cohort().weight,
    RATES['hafl'],
    3,
    0.6,
    0.7,
  )
  trained = [s.upload[1]['layers']['q'].a[:, :, 0] for _, s, _ in history[1:4]]
  np.testing.assert_array_equal(np.stack(trained), units)
  node = history[3][0].params['layers']['q']
  np.testing.assert_allclose(node.a, wanted['a'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(node.b, wanted['b'], rtol=1e-5, atol=1e-5)
  assert (units[0].sum(-1) == RANKS['hafl'][:, None]).all()
  assert (units[:, RANKS['hafl'] == 1, :, 1:]).any()  # not the first ones


def test_importance_needs_factors_and_betas_below_one():
  inner = local.sgd(loss, toy.sgd())
  with pytest.raises(Error, match=r'beta1=1.0 must be from 0 to below 1'):
    important(inner, loss, beta1=1.0)
  algorithm = recipes.hafl(loss, toy.sgd())
  state = algorithm.init(KEY, adapters.vera(2, targets='q').init(KEY, base()))
  states = tree.broadcast(algorithm.init_client(state.params), K)
  of = cohort(states, profiles=RANKS['hafl'])
  with pytest.raises(Error, match='ranks of clients need low-rank factors'):
    jax.eval_shape(algorithm.round, state, of, base())
  algorithm = recipes.hafl(loss, toy.sgd(), scope=scopes.everything())
  with pytest.raises(Error, match='important needs low-rank factors'):
    jax.eval_shape(algorithm.round, state, of, base())


def test_a_rule_on_factors_is_refused_where_there_are_none():
  for name in ('fedex_lora', 'flexlora', 'flora'):
    algorithm = getattr(recipes, name)(loss, toy.sgd(), fold=adapters.fold)
    params = adapters.vera(2, targets='q').init(KEY, base())
    with pytest.raises(Error, match='is a rule on low-rank factors'):
      algorithm.init(KEY, params)
