import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.nodes import LowRank
from fedjax_llm.server import optimizers
from fedjax_llm.types import Error

few = settings(max_examples=15, deadline=None, derandomize=True)

ADAPTIVE = ('fed_adagrad', 'fed_adam', 'fed_yogi')
DEFAULTS = {
  'fed_adagrad': dict(learning_rate=10**-1.5, b1=0.0, b2=None, tau=1e-3),
  'fed_adam': dict(learning_rate=1e-2, b1=0.9, b2=0.99, tau=1e-3),
  'fed_yogi': dict(learning_rate=1e-2, b1=0.9, b2=0.99, tau=1e-3),
}
EVERY = {
  'sgd': optimizers.sgd,
  'fed_avgm': optimizers.fed_avgm,
  **{name: getattr(optimizers, name) for name in ADAPTIVE},
}


def make(seed, dtype=np.float32, size=1e-3):
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return (size * rng.normal(size=shape)).astype(dtype)

  return {'q': LowRank(leaf(3, 2), leaf(2, 4), None), 'bias': leaf(5)}


def rounds(server, params, deltas):
  """The one place of the sign: a server optimizer sees -delta."""
  state = server.init(params)
  for delta in deltas:
    grads = jax.tree.map(lambda d: -d, delta)
    updates, state = server.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@functools.cache
def program(name, *settings):
  return jax.jit(functools.partial(rounds, EVERY[name](*settings)))


def every_leaf(fn, *trees):
  return [
    fn(*map(np.float64, leaves)) for leaves in zip(*map(jax.tree.leaves, trees))
  ]


def close(params, wanted, rtol=1e-5, atol=1e-7):
  for p, w in zip(jax.tree.leaves(params), wanted, strict=True):
    np.testing.assert_allclose(p, w, rtol, atol)


# -------------------------------------------------------------- references --


@pytest.mark.parametrize('name', ADAPTIVE)
@few
@given(st.integers(0, 2**30), st.sampled_from([1e-5, 1e-3, 1.0]))
def test_adaptive_servers_follow_algorithm_2_with_its_defaults(
  name, seed, size
):
  params = make(seed, size=1.0)
  deltas = [make(seed + t, size=size) for t in range(1, 5)]
  values = DEFAULTS[name]

  def reference(x, *deltas):
    m, v = np.zeros_like(x), np.full_like(x, values['tau'] ** 2)
    for delta in deltas:
      x, m, v = references.fed_adaptive(name, x, m, v, delta, **values)
    return x

  close(
    program(name)(params, deltas)[0], every_leaf(reference, params, *deltas)
  )


@few
@given(st.integers(0, 2**30))
def test_server_momentum_matches_its_reference(seed):
  params = make(seed, size=1.0)
  deltas = [make(seed + t) for t in range(1, 5)]

  def reference(x, *deltas):
    m = np.zeros_like(x)
    for delta in deltas:
      x, m = references.fed_avgm(x, m, delta, 0.5, 0.7)
    return x

  close(
    program('fed_avgm', 0.5, 0.7)(params, deltas)[0],
    every_leaf(reference, params, *deltas),
  )


# -------------------------------------------------------------- identities --


def test_the_default_server_takes_the_delta_as_it_is():
  params, delta = make(1), make(2)
  wanted = every_leaf(np.add, params, delta)
  close(program('sgd')(params, [delta])[0], wanted, rtol=1e-6, atol=1e-9)


def test_momentum_zero_is_sgd():
  params, deltas = make(3), [make(4), make(5)]
  plain = program('sgd', 0.3)(params, deltas)[0]
  momentum = program('fed_avgm', 0.3, 0.0)(params, deltas)[0]
  close(momentum, jax.tree.leaves(plain))


@pytest.mark.parametrize('name', EVERY)
def test_no_change_of_the_clients_is_no_step(name):
  params = make(6)
  zero = jax.tree.map(np.zeros_like, params)
  out = program(name)(params, [zero, zero])[0]
  close(out, jax.tree.leaves(params), rtol=0, atol=0)


@pytest.mark.parametrize('name', EVERY)
def test_the_first_step_points_where_the_clients_went(name):
  params = jax.tree.map(np.zeros_like, make(7))
  delta = make(8)
  moved = program(name)(params, [delta])[0]
  for p, d in zip(jax.tree.leaves(moved), jax.tree.leaves(delta)):
    np.testing.assert_array_equal(np.sign(p), np.sign(d))


def test_adam_without_bias_correction_starts_slowly():
  # The first step of optax.adam is eta; here m is only a tenth of delta.
  delta = np.full(3, 10.0, np.float32)  # far above tau
  moved = program('fed_adam', 1.0)(np.zeros(3, np.float32), [delta])[0]
  np.testing.assert_allclose(moved, 0.1 * 10 / (0.1 * 10 + 1e-3), rtol=1e-4)


# -------------------------------------------------------------- guarantees --


@pytest.mark.parametrize('name', EVERY)
def test_an_absent_leaf_gets_no_step_and_keeps_its_moments(name):
  params, delta = make(9), make(10)
  server = EVERY[name]()
  state = server.init(params)
  _, state = server.update(delta, state, params)
  partial = {**make(16), 'bias': None}
  updates, after = server.update(partial, state, params)
  assert updates['bias'] is None
  assert jax.tree.structure(after) == jax.tree.structure(state)
  if name != 'sgd':
    for old, new in zip(state[0], after[0]):
      if old:
        np.testing.assert_array_equal(old['bias'], new['bias'])
        assert np.any(old['q'].a != new['q'].a)
  # A server that never heard of the leaf does the same to the others.
  without = {**params, 'bias': None}
  apart = server.init(without)
  _, apart = server.update({**delta, 'bias': None}, apart, without)
  alone, _ = server.update(partial, apart, without)
  close(updates, jax.tree.leaves(alone))


@pytest.mark.parametrize('name', EVERY)
def test_moments_are_float32_and_steps_have_the_dtype_of_the_leaf(name):
  params, delta = jax.tree.map(
    jnp.asarray, (make(11, jnp.bfloat16), make(12, jnp.bfloat16))
  )
  server = EVERY[name]()
  state = server.init(params)
  updates, after = server.update(delta, state, params)
  assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
    assert x.dtype == y.dtype == jnp.float32


@pytest.mark.parametrize('name', ['sgd', 'fed_avgm', 'fed_adam'])
def test_a_schedule_of_the_learning_rate_counts_rounds(name):
  params = make(13)
  deltas = [make(14), make(15)]
  falling = EVERY[name](lambda count: jnp.where(count == 0, 0.5, 0.0))
  twice, _ = jax.jit(functools.partial(rounds, falling))(params, deltas)
  once, _ = program(name, 0.5)(params, deltas[:1])
  close(twice, jax.tree.leaves(once))


def test_settings_that_make_no_sense_are_refused():
  for name, build in EVERY.items():
    with pytest.raises(Error, match=f'{name}: learning_rate=0.*positive'):
      build(0.0)
  for name in ADAPTIVE:
    with pytest.raises(Error, match=f'{name}: tau=0.*positive'):
      EVERY[name](tau=0.0)
    with pytest.raises(Error, match=f'{name}: b1=1.0'):
      EVERY[name](b1=1.0)
  for name in ('fed_adam', 'fed_yogi'):
    with pytest.raises(Error, match=f'{name}: b2=-0.1'):
      EVERY[name](b2=-0.1)
  with pytest.raises(Error, match=r'momentum=1\.0'):
    optimizers.fed_avgm(momentum=1.0)
