"""Gradients through rounds: against finite differences, in bounded memory."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import aggregators, local, recipes, server, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.server import differentiable
from fedjax_llm.types import Batch, Cohort, Error, Model

K, S, B, T, V, D, R = 4, 3, 2, 6, 11, 8, 2
ROUNDS = 3
KEY = jax.random.key(0)


@contextlib.contextmanager
def double():
  """Everything in float64, what the package holds in float32 included."""
  with jax.enable_x64(True), mock.patch.object(jnp, 'float32', jnp.float64):
    yield


def base():
  rng = np.random.default_rng(1)
  return {'emb': rng.normal(size=(V, D)), 'w': rng.normal(size=(D, D))}


def hidden(base, params, batch):
  x, q = base['emb'][batch.tokens], params['q']
  return jnp.tanh(x @ base['w'] / D + (x @ q.a) @ q.b * q.scale)


MODEL = Model(hidden, lambda base, params, h: h @ base['emb'].T)
LOSS = local.causal_lm(MODEL)


def params():
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3)
  return {'q': LowRank(draw(D, R), draw(R, D), jnp.asarray(0.5))}


def texts(seed, *shape):
  rng = np.random.default_rng(seed)
  ones = np.ones((*shape, B, T), np.int32)
  tokens = rng.integers(0, V, (*shape, B, T)).astype(np.int32)
  return Batch(tokens, ones > 0, ones, np.cumsum(ones, -1) - 1)


def cohorts(num_rounds=ROUNDS, seed=3):
  """[rounds, K, ...]; client 0 has a step less, client K - 1 drops out once."""
  batches = texts(seed, num_rounds, K, S)
  for field in (batches.loss_mask, batches.segments):
    field[:, 0, -1] = 0
  valid = np.ones((num_rounds, K), bool)
  valid[1, -1] = False
  weight = np.where(valid, np.arange(1.0, K + 1), 0.0)
  ids = np.tile(np.arange(K, dtype=np.int32), (num_rounds, 1))
  return Cohort(ids, batches, weight, valid)


def sgd(rate=0.5):
  return local.optimizer('sgd', rate, differentiable=True)


def heldout(base, params):
  sums = LOSS(base, params, texts(9), KEY)
  return sums.total / sums.count


def after(algorithm, cohorts, start=None):
  """The held-out loss after all rounds."""
  weights = jax.tree.map(jnp.asarray, base())
  state = algorithm.init(KEY, params() if start is None else start)
  state, _, _ = differentiable.rounds(algorithm)(state, cohorts, weights)
  return heldout(weights, state.params)


# The same questions to the linear regression of `toy`, which compiles faster.


def linear(recipe=recipes.fed_avg, optimizer=None, **parts):
  return recipe(toy.loss, optimizer or sgd(0.1), measure=None, **parts)


def rows(num_rounds=ROUNDS):
  people = [toy.cohort(K, seed=i) for i in range(num_rounds)]
  return jax.tree.map(lambda *xs: np.stack(xs), *people)


def error(params):
  test = toy.cohort(1, seed=9, ragged=False).batches
  sums = toy.loss(toy.base(), params, test, None)
  return sums.total / sums.count


def weighed(method, people, start=None):
  """The error after all rounds, as a function of weights of clients."""

  def objective(weight):
    state = method.init(KEY, toy.params() if start is None else start)
    given = people._replace(weight=people.weight * weight)
    run = differentiable.rounds(method)
    return error(run(state, given, toy.base())[0].params)

  return objective


def of_numbers(given):
  """Of four kinds of numbers that a round computes with, all at once."""

  def softmax_mean(update, weight):
    norms = jax.vmap(tree.norm)(update)
    shares = weight * jnp.exp(-norms / given['temperature'])
    return tree.weighted_sum(update, tree.normalise(shares))

  method = recipes.fed_avg(
    LOSS,
    sgd(given['local_rate'])._replace(clip_norm=1.0),
    aggregator=aggregators.from_rule(softmax_mean),
    server=server.sgd(given['server_rate']),
    measure=None,
  )
  people = cohorts()
  weight = people.weight * given['client_weights']
  return after(method, people._replace(weight=weight))


def of_mixing(given):
  method = differentiable.mixed(linear(), given['mixing'])
  state = method.init(KEY, toy.params())
  run = differentiable.rounds(method)
  state, _, _ = run(state, rows(), toy.base())
  losses = jax.vmap(error)(state.params)
  return jnp.dot(losses, jnp.arange(1.0, K + 1))  # not the same for all


def numbers():
  return {
    'server_rate': np.float64(0.8),
    'local_rate': np.float64(0.5),
    'client_weights': np.linspace(0.5, 2, K),
    'temperature': np.float64(0.4),
  }


def matrix():
  return {'mixing': np.random.default_rng(5).dirichlet(np.ones(K), K)}


def differences(fn, x, eps):
  """Central differences of a dictionary of arrays, an entry at a time."""
  out = {}
  for name, value in x.items():
    out[name] = np.zeros(value.shape)
    for i in np.ndindex(value.shape):
      step = np.zeros(value.shape)
      step[i] = eps
      near = [float(fn({**x, name: value + s})) for s in (step, -step)]
      out[name][i] = (near[0] - near[1]) / (2 * eps)
  return out


@pytest.mark.parametrize('wide', [False, True], ids=['float32', 'float64'])
@pytest.mark.parametrize(
  'fn, start', [(of_numbers, numbers), (of_mixing, matrix)]
)
def test_gradients_through_three_rounds_are_finite_differences(fn, start, wide):
  # Rounding falls with the step of the difference, its error grows with it.
  eps, tolerance = (1e-4, 1e-5) if wide else (2e-2, 1e-2)
  with double() if wide else contextlib.nullcontext():
    x, both = start(), jax.jit(jax.value_and_grad(fn))
    gradients = both(jax.tree.map(jnp.asarray, x))[1]
    expected = differences(lambda x: both(x)[0], x, eps)
  for name, gradient in gradients.items():
    assert gradient.dtype == (np.float64 if wide else np.float32)
    size = np.abs(expected[name]).max()
    error = np.abs(np.asarray(gradient) - expected[name]).max()
    assert size > 1e-3
    assert error < tolerance * size


def test_a_round_of_all_steps_is_the_round_that_stops_early():
  people = tree.take(cohorts(), 1)
  weights = jax.tree.map(jnp.asarray, base())

  def told(optimizer):
    method = recipes.fed_avg(LOSS, optimizer, measure=None)
    state = method.init(KEY, params())
    state, _, metrics = jax.jit(method.round)(state, people, weights)
    return state.params, metrics

  toy.close(told(sgd()), told(local.optimizer('sgd', 0.5)))


def test_without_the_switch_there_is_no_gradient():
  method = recipes.fed_avg(LOSS, local.optimizer('sgd', 0.5), measure=None)

  def objective(weight):
    given = cohorts()
    return after(method, given._replace(weight=given.weight * weight))

  with pytest.raises(
    Error, match='build its optimizer with differentiable=True'
  ):
    jax.eval_shape(jax.grad(objective), jnp.ones(K))


def test_a_root_of_squared_gradients_needs_something_below_it():
  with pytest.raises(Error, match=r'adamw has no gradient .* local.eps_root'):
    local.optimizer('adamw', 0.1, differentiable=True)

  start = {'q': toy.params()['q']._replace(b=jnp.zeros((toy.R, toy.F)))}
  adam = local.optimizer('adam', 0.01, differentiable=True, eps_root=1e-12)
  objective = weighed(linear(optimizer=adam), rows(1), start)
  gradient = jax.jit(jax.grad(objective))(jnp.ones(K))
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_a_round_more_keeps_its_state_and_nothing_of_its_training():
  method = linear()

  def memory(num_rounds):
    people = rows(num_rounds)

    def objective(weight, people):
      return weighed(method, people)(weight)

    lowered = jax.jit(jax.grad(objective)).lower(jnp.ones(K), people)
    needed = lowered.compile().memory_analysis()
    assert needed is not None
    return needed.temp_size_in_bytes

  state = method.init(KEY, toy.params())._replace(key=None)
  kept = sum(x.nbytes for x in jax.tree.leaves(state))
  activations = K * 3 * 4 * (toy.D + toy.F) * 4  # of one round, at least
  growth = (memory(18) - memory(2)) / 16
  assert kept <= growth < 2 * kept < activations / 8


def test_rounds_in_one_scan_are_rounds_one_after_another():
  num, ids = 6, np.array([[0, 1, 2, 3], [5, 3, 1, -1], [3, 0, 5, 4]], np.int32)
  people = rows()._replace(ids=ids, valid=ids >= 0)
  method = linear(recipes.scaffold, num_clients=num)
  state = begun = method.init(KEY, toy.params())
  kept = tree.broadcast(method.init_client(state.params), num)
  start, step = kept, jax.jit(method.round)
  for i in range(ROUNDS):
    cohort = tree.take(people, i)
    cohort = cohort._replace(states=tree.take(kept, ids[i]))
    state, new, _ = step(state, cohort, toy.base())
    for row in np.flatnonzero(cohort.valid):
      put = lambda all, x, i=i, row=row: all.at[ids[i, row]].set(x[row])
      kept = jax.tree.map(put, kept, new)
  run = jax.jit(differentiable.rounds(method))
  found = run(begun, people, toy.base(), start)
  toy.close(found[0]._replace(key=None), state._replace(key=None))
  toy.close(found[1], kept)
  assert found[2].metrics['local/loss'].shape == (ROUNDS,)


def test_an_identity_mixes_nothing_and_equal_shares_are_an_average():
  people, plain = tree.take(rows(), 0), linear()

  @jax.jit
  def mixed(matrix):
    method = differentiable.mixed(plain, matrix)
    return method.round(method.init(KEY, toy.params()), people, toy.base())

  @jax.jit
  def alone(valid, weight):
    state = plain.init(KEY, toy.params())
    given = people._replace(valid=valid, weight=weight)
    return plain.round(state, given, toy.base())[0].params

  apart, _, told = mixed(np.eye(K, dtype=np.float32))
  assert told.metrics['local/loss'].shape == told.reported.shape == (K,)
  shared, _, _ = mixed(np.full((K, K), 1 / K, np.float32))
  average = alone(np.ones(K, bool), np.ones(K))
  for k in range(K):
    one = alone(np.arange(K) == k, np.ones(K))
    toy.close(tree.take(apart.params, k), one)
    toy.close(tree.take(shared.params, k), average)


def test_a_matrix_of_another_size_is_refused():
  with pytest.raises(Error, match=r'the matrix is \(4, 3\), not \[K, K\]'):
    differentiable.mixed(linear(), jnp.ones((4, 3)))
  small = differentiable.mixed(linear(), jnp.eye(K - 1))
  state = small.init(KEY, toy.params())
  with pytest.raises(Error, match='matrix of 3 clients met a cohort of 4'):
    small.round(state, tree.take(rows(), 0), toy.base())


RULES = toy.rules(krum={'num_byzantine': 0})
# Their factorisations have no gradient where singular values coincide, as the
# zeros beyond the rank do.
FACTORISING = ('fedrot', 'fedrpca', 'fedsvd', 'flexlora')
FACTORISING += ('product_geometric_median',)
# `fltrust` trusts nobody here, so nobody moves it.


@pytest.mark.parametrize('name', sorted({*RULES} - {*FACTORISING, 'fltrust'}))
def test_a_rule_has_a_gradient_where_a_client_is_missing(name):
  rule, (sent, start) = RULES[name], toy.uploads(K)
  node = start['q']._replace(b=jnp.zeros_like(start['q'].b))  # as LoRA begins
  start = {'q': node}
  valid = jnp.arange(K) < K - 1

  def size(update, weight):
    given = sent._replace(
      update=tree.where(valid, update, tree.zeros_like(update)),
      start=tree.broadcast(start, K),
      weight=weight * valid,
      valid=valid,
    )
    state = rule.init(start, KEY)
    out, _ = rule.aggregate(given, state, start, jax.random.key(1))
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))

  gradient = jax.jit(jax.grad(size, (0, 1)))(sent.update, sent.weight)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  of_b = np.abs(gradient[0]['q'].b)
  assert of_b[:-1].max() > 0 == of_b[-1].max()


def test_learned_weights_leave_out_who_learns_the_opposite():
  people, rng = rows(2), np.random.default_rng(4)
  x, y = people.batches.x, people.batches.y
  y[:] = x @ rng.normal(size=(toy.D, toy.F))  # what is to be learned ...
  y[:, 2:] *= -1  # ... and two clients of four have it wrong
  trusted = people.batches._replace(
    x=x[0, 0], y=y[0, 0], mask=y[0, 0, ..., 0] < np.inf
  )

  def heldout(base, params):
    sums = toy.loss(base, params, trusted, None)
    return sums.total / sums.count

  method = linear()
  people = people._replace(weight=np.ones((2, K), np.float32))
  learned = differentiable.learn_client_weights(
    method,
    method.init(KEY, toy.params()),
    people,
    toy.base(),
    heldout,
    num_clients=K,
    num_steps=10,
  )
  np.testing.assert_allclose(learned.weight[0], np.ones(K), rtol=1e-6)
  np.testing.assert_allclose(learned.weight.mean(1), 1, rtol=1e-5)
  assert learned.weight[-1, 2:].max() < 0.5 < learned.weight[-1, :2].min()
  assert learned.loss[-1] < learned.loss[0] - 0.05
