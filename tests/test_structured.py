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

from fedjax_llm import adapters, local, models, recipes, tree, uploads
from fedjax_llm import clients as rooms
from fedjax_llm.adapters import gates
from fedjax_llm.recipes import structured
from fedjax_llm.types import Batch, Error

RATE, SCALE, ROUNDS, T1 = 0.1, 3.0 / R, 8, 3
LAYERS = np.array([1, 2, 1, 1], np.int32)


def start():
  return adapters.lora(R, 3.0, targets='q').init(KEY, base())


@functools.cache
def run(name, num_rounds=ROUNDS, **more):
  """Every round's (state, client states, metrics), the first before any."""
  settings = {'slora': dict(first_rounds=T1)}.get(name, {})
  algorithm = getattr(recipes, name)(
    loss,
    local.optimizer('sgd', RATE),
    upload=watched(uploads.identity()),
    fold=adapters.fold,
    **{**settings, **more},
  )
  state = algorithm.init(KEY, start())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  step = jax.jit(algorithm.round)
  history = [(state, states, {})]
  for _ in range(num_rounds):
    of = cohort(states, profiles={'layers': LAYERS})
    state, states, told = step(state, of, base())
    history.append((state, states, jax.device_get(told)))
  return algorithm, history


@pytest.mark.parametrize('name', ['fed_ra', 'slora'])
def test_the_loss_falls_and_bytes_are_those_of_a_message(name):
  _, history = run(name)
  told = [told for *_, told in history[1:]]
  assert told[-1]['local/loss'] < 0.75 * told[0]['local/loss']
  for _, states, metrics in history[1:]:
    for k in range(K):
      assert len(wire(states, k)) == metrics['uploads/bytes'][k].sum()


# ------------------------------------------------------------------ fed_ra --


def held(history):
  """[T, K, L]: who trained which layer, as the messages say."""
  of = lambda states: np.asarray(states.upload[1]['layers']['q'].a)
  return np.stack([of(s).any((2, 3)) for _, s, _ in history[1:]])


def test_fed_ra_is_that_of_the_reference():
  _, history = run('fed_ra')
  first, last = start()['layers']['q'], history[3][0].params['layers']['q']
  w = np.float64(base()['layers']['q']['kernel'])
  mine = held(history)[:3]
  wanted = ref.fed_ra(
    w, SCALE, {'a': first.a, 'b': first.b}, clients(), mine, RATE
  )
  np.testing.assert_allclose(last.a, wanted['a'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(last.b, wanted['b'], rtol=1e-5, atol=1e-5)


def test_fed_ra_draws_as_many_layers_as_a_client_has_anew_in_every_round():
  algorithm, history = run('fed_ra')
  mine = held(history)
  assert (mine.sum(-1) == LAYERS).all()
  weak = mine[:, LAYERS == 1, 0]
  assert (weak.any(0) & ~weak.all(0)).any()
  told = history[1][2]
  sent = 4 * R * (D + F) * LAYERS
  assert told['uploads/bytes'].sum(1).tolist() == sent.tolist()
  assert told['downloads/bytes'].sum(1).tolist() == (sent + 4 * LAYERS).tolist()
  state = history[-1][0]
  assert (state.params['layers']['gate'] == 1).all()
  served = algorithm.personal(state.params, None)
  assert list(served['layers']) == ['q']


def test_fed_ra_with_all_layers_is_fed_it():
  everything = np.full(K, L, np.int32)
  ours = recipes.fed_ra(loss, toy.sgd(), weighted=True)
  theirs = recipes.fed_it(loss, toy.sgd())
  states = [x.init(KEY, start()) for x in (ours, theirs)]
  for x in range(2):
    algorithm = (ours, theirs)[x]
    step = jax.jit(algorithm.round)
    for _ in range(2):
      states[x], _, _ = step(states[x], cohort(profiles=everything), base())
  found = ours.personal(states[0].params, None)
  toy.close(found, theirs.personal(states[1].params, None))


def test_a_layer_whose_gate_is_shut_is_not_there():
  loaded = models.random(vocab_size=32, hidden_size=16, num_layers=2)
  params = adapters.lora(R).init(KEY, loaded.base)
  some = lambda x: x + 0.1 * jax.random.normal(KEY, x.shape)
  params = jax.tree.map(some, params)
  tokens = jnp.arange(8)[None] % 32
  ones = jnp.ones_like(tokens)
  batch = Batch(tokens, ones > 0, ones, jnp.arange(8)[None])

  @jax.jit
  def hidden(gate):
    inner = {**params['layers'], 'gate': gate}
    return loaded.model.hidden(loaded.base, {'layers': inner}, batch)

  plain = loaded.model.hidden(loaded.base, params, batch)
  np.testing.assert_array_equal(hidden(jnp.ones(2)), plain)
  shallow = models.random(vocab_size=32, hidden_size=16, num_layers=1)
  for layer in range(2):
    one = lambda x: x[layer : layer + 1]
    cut = lambda x: {**x, 'layers': jax.tree.map(one, x['layers'])}
    want = shallow.model.hidden(cut(loaded.base), cut(params), batch)
    found = hidden(jnp.arange(2) == layer)
    np.testing.assert_allclose(found, want, atol=1e-6)
  assert gates.without(gates.added(params)).keys() == params.keys()


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
  _, history = run('slora')
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
  algorithm, history = run('slora')
  for _, _, told in history[1:]:
    for way in ('uploads', 'downloads'):
      assert (told[f'{way}/bytes'].sum(1) == 4 * L * R * (D + F)).all()
  for state, *_ in history[1 : T1 + 2]:
    served = algorithm.personal(state.params, None)
    x, y = cohort().batches.x[0, 0], jnp.zeros((B, F))
    rows = toy.Rows(x, y, jnp.ones(B, bool))
    folded, bare = adapters.fold(base(), served)
    one = loss(base(), served, rows, KEY).total
    np.testing.assert_allclose(
      loss(folded, bare, rows, KEY).total, one, rtol=1e-5
    )


def test_a_full_pattern_of_the_full_rank_loses_nothing_at_the_turn():
  algorithm = recipes.slora(loss, toy.sgd(), first_rounds=1, density=1.0)
  params = adapters.lora(F, 3.0, targets='q').init(KEY, base())
  state = algorithm.init(KEY, params)
  full = recipes.slora(loss, toy.sgd(), first_rounds=9, density=1.0)
  ends = []
  for one in (algorithm, full):
    state = one.init(KEY, params)
    state, *_ = jax.jit(one.round)(state, cohort(), base())
    ends.append(adapters.merge(base(), one.personal(state.params, None)))
  toy.close(*ends, atol=1e-5)


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
  algorithm = structured.slora(loss, toy.sgd())
  with pytest.raises(Error, match='needs low-rank factors'):
    algorithm.init(KEY, adapters.vera(2, targets='q').init(KEY, base()))
