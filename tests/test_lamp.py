"""LAMP: orders of tokens, one discrete step by hand, losses that never rise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.evals import lamp, matching
from fedjax_llm.types import Error

T, D, V = 5, 4, 6
_rng = np.random.default_rng(0)
TABLE = jnp.float32(_rng.normal(size=(V, D)))
WEIGHT = _rng.normal(size=(T, D))  # of a gradient that reads places
TOKENS = np.array([[4, 1, 0, 5, 2], [3, 0, 2, 1, 4]])
ALPHA = 0.2


def gradient(x):
  """Of a sum over places and one over tokens, two leaves."""
  placed = x * jnp.float32(WEIGHT)
  return {'a': placed.sum((0, 1)), 'b': jnp.tanh(x).sum((0, 1))}


def prior(tokens):
  """A language in which each token is followed by the next larger one."""
  return jnp.mean(jnp.abs(tokens[:, 1:] - tokens[:, :-1] - 1.0))


SEEN = gradient(TABLE[TOKENS])


def value(x):
  away = matching.distance(SEEN, gradient(x), 'cosine') / 2
  return away + ALPHA * prior(matching.nearest(x, TABLE))


STEP = jax.jit(lambda x, order: lamp.discrete(value, x, order))


def by_hand(x):
  """The value of inputs in NumPy float64."""
  wide = lambda x: np.asarray(x, np.float64)
  x, table, seen = wide(x), wide(TABLE), wide(TABLE[TOKENS])
  away = 0.0
  for read in (
    lambda z: (z * WEIGHT).sum((0, 1)),
    lambda z: np.tanh(z).sum((0, 1)),
  ):
    g, h = read(seen), read(x)
    away += 1 - g @ h / np.linalg.norm(g) / np.linalg.norm(h)
  cosine = x @ table.T / np.linalg.norm(x, axis=-1, keepdims=True)
  tokens = np.argmax(cosine / np.linalg.norm(table, axis=1), -1)
  return away / 2 + ALPHA * np.abs(np.diff(tokens) - 1.0).mean()


def candidates(num=13, seed=0):
  rng = np.random.default_rng(seed)
  return np.stack([lamp.orders(T, num, rng) for _ in range(2)])


def test_orders_are_moves_of_their_kinds():
  rng = np.random.default_rng(3)
  drawn = lamp.orders(9, 401, rng, first=1, last=2)
  np.testing.assert_array_equal(drawn[0], np.arange(9))
  np.testing.assert_array_equal(
    np.sort(drawn, 1), np.tile(np.arange(9), (401, 1))
  )
  np.testing.assert_array_equal(drawn[:, [0, 7, 8]], [[0, 7, 8]] * 401)
  inner = drawn[1:, 1:7] - 1
  breaks = (np.diff(inner) != 1).sum(1)
  rises = lambda row: list(row) == sorted(row)
  kinds = {name: inner[i::4] for i, name in enumerate(lamp.MOVES)}
  # A moved sequence leaves at most three seams, a rotation one.
  assert breaks[0::4].max() == 3 and breaks[1::4].max() == 3
  assert breaks[2::4].max() == 1
  assert all(
    (row == np.roll(np.arange(6), -row[0])).all() for row in kinds['prefix']
  )
  assert set((kinds['swap'] != np.arange(6)).sum(1)) == {0, 2}
  for row in kinds['token']:  # without one token the others keep their order
    assert any(rises(np.delete(row, i)) for i in range(6))
  # Sequences of two tokens and more are moved as well.
  assert not all(
    any(rises(np.delete(row, i)) for i in range(6)) for row in kinds['sequence']
  )
  with pytest.raises(Error, match='at least 2'):
    lamp.orders(4, 5, rng, first=2, last=1)


def test_a_discrete_step_is_the_best_of_its_candidates():
  x = np.array(TABLE[TOKENS[:, [2, 0, 4, 1, 3]]])
  order = candidates()
  got = STEP(jnp.asarray(x), order)
  for b in range(2):  # row after row, each on the row before
    tried = []
    for o in order[b]:
      new = x.copy()
      new[b] = x[b][o]
      tried.append(by_hand(new))
    best = int(np.argmin(tried))
    x[b] = x[b][order[b, best]]
    assert best > 0  # the step does something
    assert float(got.values[b]) == pytest.approx(tried[best], rel=1e-5)
  np.testing.assert_array_equal(got.inputs, x)


def test_discrete_steps_never_raise_the_value():
  for seed in range(6):
    rng = np.random.default_rng(seed)
    x, before = jnp.float32(rng.normal(size=(2, T, D))), np.inf
    for turn in range(4):
      result = STEP(x, candidates(seed=10 * seed + turn))
      first, second = map(float, result.values)
      assert second <= first and first <= before
      assert first <= float(jax.jit(value)(x)) + 1e-6
      before, x = second, result.inputs
  nan = lambda x: jnp.where(x[0, 0, 0] == 1.0, 2.0, jnp.nan)
  kept = lamp.discrete(
    nan, jnp.arange(1.0, 4.0).reshape(1, 3, 1), [[[0, 1, 2], [1, 0, 2]]]
  )
  assert kept.inputs.ravel().tolist() == [1.0, 2.0, 3.0]


def test_a_prior_finds_an_order_that_the_gradient_does_not_hold():
  """The gradient of a sum over places is that of every order."""
  blind = lambda x: {'b': jnp.tanh(x).sum((0, 1))}
  true = jnp.arange(T)[None]
  table = 3.0 * jnp.eye(V)[:, :V]
  seen = blind(table[true])
  start = table[true[:, ::-1]]

  def order_of(weight):
    result = lamp.lamp(
      blind, seen, start, prior, table, prior_weight=weight, steps=30,
      every=2, num_orders=25, learning_rate=1e-3, lengths=0.0,
    )  # fmt: skip
    assert float(result.distance) < 1e-3
    return matching.nearest(result.inputs, table)[0].tolist()

  assert order_of(1.0) == list(range(T))
  assert order_of(0.0) != list(range(T))
  wrong: Any = ({'steps': 0}, {'every': 0}, {'burn_in': 1.5})
  for more in wrong:
    ((field, number),) = more.items()
    with pytest.raises(Error, match=f'lamp: {field}={number} must be'):
      lamp.lamp(blind, seen, start, prior, table, **more)
