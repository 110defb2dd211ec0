"""A watermark is found where it was trained, and nowhere else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import local
from fedjax_llm.local import watermark
from fedjax_llm.types import Context, Error, LossSum, Masks

SECRET = watermark.mark(seed=7, num_bits=48, at='b')
SIZE = 600


def loss(base, params, batch, key):
  """A quadratic whose minimum is the batch."""
  del base, key
  error = params['b'] - batch
  return LossSum(0.5 * jnp.sum(error**2), jnp.float32(1.0), jnp.float32(0.0))


def trained(loss, params, goal, steps=200, rate=0.1):
  @jax.jit
  def run(params):
    of = lambda p: loss(None, p, goal, None).total
    step = lambda p, _: (
      jax.tree.map(lambda x, g: x - rate * g, p, jax.grad(of)(p)),
      None,
    )
    return jax.lax.scan(step, params, None, steps)[0]

  return run(params)


@pytest.fixture(scope='module')
def models():
  rng = np.random.default_rng(0)
  start = {'a': jnp.ones(9), 'b': jnp.float32(0.3 * rng.normal(size=SIZE))}
  goal = jnp.float32(0.3 * rng.normal(size=SIZE))
  marked = watermark.watermarked(loss, SECRET, strength=40.0, margin=0.2)
  return goal, trained(loss, start, goal), trained(marked, start, goal)


def test_the_bits_are_in_the_marked_model_alone(models):
  _, plain, marked = models
  assert watermark.verify(marked, SECRET) == (48, pytest.approx(48**0.5))
  assert abs(watermark.verify(plain, SECRET).z) < 3
  for seed in range(5):  # others' secrets
    other = SECRET._replace(seed=100 + seed)
    assert abs(watermark.verify(marked, other).z) < 3.5
  # What is learned stays close: the mark moves few of many directions.
  move = jnp.linalg.norm(marked['b'] - plain['b'])
  assert float(move) < 0.5 * float(jnp.linalg.norm(plain['b']))


def test_the_hinge_is_its_formula(models):
  _, plain, _ = models
  rows = jax.random.normal(jax.random.fold_in(jax.random.key(7), 0), (48, SIZE))
  numbers = np.asarray(rows, np.float64) @ np.asarray(plain['b'], np.float64)
  numbers = numbers / SIZE**0.5
  np.testing.assert_allclose(
    watermark.read(plain, SECRET), numbers, rtol=1e-4, atol=1e-5
  )
  marked = watermark.watermarked(loss, SECRET, strength=3.0, margin=0.5)
  goal = plain['b'] + 1.0
  hinge = np.maximum(0, 0.5 - SECRET.bits * numbers).mean()
  got = float(marked(None, plain, goal, None).total)
  assert got == pytest.approx(0.5 * SIZE + 3.0 * hinge, rel=1e-5)


def test_it_survives_pruning_and_further_training(models):
  goal, _, marked = models
  order = jnp.argsort(jnp.abs(marked['b']))
  pruned = {**marked, 'b': marked['b'].at[order[: SIZE // 3]].set(0.0)}
  assert watermark.verify(pruned, SECRET).z > 5
  # A tenth of the way back to what it would be without the mark.
  further = trained(loss, marked, goal, steps=1, rate=0.1)
  assert watermark.verify(further, SECRET).z > 5


def test_what_holds_no_mark_is_refused():
  with pytest.raises(Error, match='have 9 parameters, which do not hold 48'):
    watermark.read({'b': jnp.ones(9)}, SECRET)
  with pytest.raises(Error, match=r'strength=0.0 must be above 0'):
    watermark.watermarked(loss, SECRET, strength=0.0)
  with pytest.raises(Error, match='num_bits=0 must be at least 1'):
    watermark.mark(seed=0, num_bits=0)


def test_every_client_has_a_mark_of_its_own():
  """It is in no other message, and not in that of a free rider."""
  build = lambda loss: local.sgd(loss, local.optimizer('sgd', 0.1))
  marks: Any = dict(seed=5, num_bits=24, at='b')
  update = watermark.marked_clients(
    build, loss, **marks, strength=40.0, margin=0.3
  )
  rng = np.random.default_rng(1)
  start = {'b': jnp.float32(0.3 * rng.normal(size=SIZE))}
  goals = jnp.float32(0.3 * rng.normal(size=(3, 60, SIZE)))
  ids, masks = (
    np.array([4, 0, 7], np.int32),
    Masks(None, {'b': jnp.bool_(True)}),
  )

  @jax.jit
  def sent(goals):
    one = lambda client, goal: update.run(
      None, start, update.init(start), goal, masks,
      Context(client=client, key=tiny.KEY),
    )  # fmt: skip
    return jax.vmap(one)(ids, goals).update

  moves = sent(goals)
  ends = [{'b': start['b'] + moves['b'][row]} for row in range(3)]
  z = [
    [
      watermark.verify(end, watermark.client_mark(client=k, **marks)).z
      for k in ids
    ]
    for end in ends
  ]
  for i, row in enumerate(z):
    assert row[i] == pytest.approx(24**0.5)
    assert all(abs(x) < 3.5 for j, x in enumerate(row) if j != i)
  rider = watermark.verify(start, watermark.client_mark(client=4, **marks))
  assert abs(rider.z) < 3
  # The mean keeps the marks of all three: 72 bits in 600 parameters.
  served = {'b': start['b'] + moves['b'].mean(0)}
  for k in ids:
    mark = watermark.client_mark(client=k, **marks)
    assert watermark.verify(served, mark).z > 3.2
