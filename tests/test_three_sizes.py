"""Phones, laptops and servers in one round, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import local, recipes, tree
from fedjax_llm.nodes import directions
from fedjax_llm.types import Cohort, Error, LossSum

L, D, S, RATE, SLOW, EPS = 3, 2, 2, 0.1, 0.02, 1e-2
KINDS = np.array([1, 2, 3, 2], np.int32)  # phone, laptop, server, laptop
IDS = np.array([5, 2, 9, 4], np.int32)
WEIGHT = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
START = np.random.default_rng(0).normal(size=(L, D)).astype(np.float32)
# 0 marks padding: rows [K, S, B] of targets, all of them above it.
ROWS = np.random.default_rng(1).uniform(0.5, 2, (4, S, 2)).astype(np.float32)


def loss(base, params, x, key):
  """sum over rows of (sum_l c_l |p_l|^2 / 2 - x sum p): gradient c p - x."""
  real = x > 0
  p = params['layers']['w']
  curved = 0.5 * jnp.sum(jnp.arange(1.0, L + 1)[:, None] * p**2)
  total = jnp.sum(jnp.where(real, curved - x * jnp.sum(p), 0.0))
  return LossSum(total, jnp.sum(real).astype(jnp.float32), jnp.float32(0))


def gradient(p, x):
  return np.arange(1.0, L + 1)[:, None] * p - x.mean()


def method(**settings):
  settings = {'laptop_layers': 1, 'directions': 1, 'eps': EPS, **settings}
  return recipes.three_sizes(
    loss, local.optimizer('sgd', RATE), phone_learning_rate=SLOW, **settings
  )


def cohort(kinds=KINDS):
  return Cohort(IDS, ROWS, WEIGHT, np.ones(4, bool), {'device': kinds})


def ends(kinds=KINDS):
  """What each client's update is, [K, L, D], in float64."""
  result = []
  keys = tiny.client_key(IDS)
  for k, kind in enumerate(kinds):
    p = START.astype(np.float64)
    for s in range(S):
      g = gradient(p, ROWS[k, s].astype(np.float64))
      if kind == 2:
        g[: L - 1] = 0
      if kind == 1:  # exact for a quadratic: the slope along z
        key = jax.random.split(jax.random.fold_in(keys[k], s), 1)[0]
        like = {'layers': {'w': jnp.asarray(START)}}
        z = directions.draw(key, like)['layers']['w']
        z = np.asarray(z, np.float64)
        g = np.sum(g * z) * z
      p = p - (SLOW if kind == 1 else RATE) * g
    result.append(p - START)
  return np.stack(result)


@functools.cache
def program(block_size=None):
  algorithm = method(block_size=block_size)
  return algorithm, jax.jit(algorithm.round)


def served(one, state=None, block_size=None):
  algorithm, step = program(block_size)
  params = {'layers': {'w': jnp.asarray(START)}}
  return step(algorithm.init(tiny.KEY, params) if state is None else state, one)


def test_each_kind_trains_by_its_own_method_into_one_model():
  update = ends()
  layers = np.ones((4, L, 1))
  layers[KINDS == 2, : L - 1] = 0
  w = WEIGHT.astype(np.float64)[:, None, None] * layers
  expected = START + (w * update).sum(0) / w.sum(0)
  state, _, info = served(cohort())
  got = np.asarray(state.params['layers']['w'])
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
  # A plain mean dilutes the layers below those of laptops.
  plain = START + np.average(update, 0, WEIGHT)
  assert np.abs(plain - got).max() > 1e-2
  # If all were servers, or phones, the model would be another one.
  for kind in (1, 3):
    other = START + np.average(ends(np.full(4, kind)), 0, WEIGHT)
    assert np.abs(other - got).max() > 1e-2
  # Laptops send one layer of three; all receive everything.
  up = np.asarray(info.bytes_up).sum(1)
  assert up.tolist() == [4 * L * D, 4 * D, 4 * L * D, 4 * D]
  assert np.asarray(info.bytes_down).sum(1).tolist() == [4 * L * D] * 4


def test_blocks_and_a_resumed_run_change_nothing():
  """Blocks of one client compute no step of other kinds."""
  first, states, _ = served(cohort(), block_size=1)
  whole, _, _ = served(cohort())
  np.testing.assert_allclose(
    first.params['layers']['w'], whole.params['layers']['w'], rtol=1e-6
  )
  assert jax.tree.leaves(states) == []  # clients keep nothing
  second, _, _ = served(cohort(), first, 1)
  kept = first._replace(key=None)
  kept = jax.tree.map(jnp.asarray, jax.tree.map(np.array, kept))
  again, _, _ = served(cohort(), kept._replace(key=first.key), 1)
  np.testing.assert_array_equal(
    again.params['layers']['w'], second.params['layers']['w']
  )
  before = tree.norm({'w': START - ROWS.mean()})
  after = tree.norm({'w': second.params['layers']['w'] - ROWS.mean()})
  assert after < before


def test_what_does_not_fit_is_refused():
  with pytest.raises(Error) as error:
    method(laptop_layers=0)
  assert str(error.value) == (
    'algorithm.laptop_layers is 0; it must be at least 1.'
  )
  with pytest.raises(Error, match='an adapter in all of the layers'):
    method().init(tiny.KEY, {'w': jnp.ones(2)})
  with pytest.raises(Error, match='needs the kind of device'):
    served(cohort()._replace(profiles=()))
