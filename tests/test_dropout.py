"""Dropout of adapters: closed forms, keys, and what evaluations see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import adapters, local, recipes
from fedjax_llm.nodes import Dora, Dropped, LowRank
from fedjax_llm.nodes.dropped import drop, thinned
from fedjax_llm.types import Error

RATE = 0.25


def _node(seed=0, d=6, f=5):
  rng = np.random.default_rng(seed)
  normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  return normal(3, 4, d), LowRank(normal(d, 2), normal(2, f), jnp.float32(0.5))


def _mask(x, key):
  """The mask of `thinned`: entries of ones that are kept, in float64."""
  kept = thinned(jnp.ones_like(x), key, RATE) > 0
  return np.asarray(kept, np.float64)


def test_thinned_keeps_the_expected_value():
  x = jnp.asarray(np.linspace(-2, 3, 24).reshape(1, 4, 6), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 20_000)
  draws = jax.vmap(lambda key: thinned(x, key, RATE))(keys)
  kept = np.asarray(draws != 0)
  np.testing.assert_allclose(kept.mean(0), 1 - RATE, atol=0.016)  # 5 sigma
  np.testing.assert_allclose(draws.mean(0), x, atol=0.07)  # E[x m / (1-p)] = x
  scaled = np.broadcast_to(x / np.float32(1 - RATE), draws.shape)
  np.testing.assert_array_equal(np.asarray(draws)[kept], scaled[kept])
  pair = np.mean(kept[:, 0, 0, 0] & kept[:, 0, 0, 1])
  assert abs(pair - (1 - RATE) ** 2) < 0.018  # entries are independent


@pytest.mark.parametrize('residual', [False, True])
def test_lora_sees_the_dropped_input_and_the_base_sees_all(residual):
  x, node = _node()
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), 'float32')
  if residual:
    node = node._replace(residual=0.1 * weight)
  key, y = jax.random.key(3), x @ weight
  new = Dropped(node, key, jnp.float32(RATE)).act(x, y, weight)
  a, b, w, z = (np.asarray(v, np.float64) for v in (*node[:2], weight, x))
  dropped = z * _mask(x, key) / (1 - RATE)
  wanted = z @ w * (1.1 if residual else 1) + 0.5 * dropped @ a @ b
  np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-5)


def test_a_dora_sees_the_dropped_input_in_its_whole_change():
  x, low = _node()
  rng = np.random.default_rng(1)
  weight = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
  node = Dora(low, jnp.asarray(rng.uniform(1, 2, 5), jnp.float32))
  key = jax.random.key(4)
  new = Dropped(node, key, jnp.float32(RATE)).act(x, x @ weight, weight)
  a, b, w, z = (np.asarray(v, np.float64) for v in (*low[:2], weight, x))
  v = w + 0.5 * a @ b
  gain = np.asarray(node.magnitude, np.float64) / np.linalg.norm(v, axis=0)
  dropped = z * _mask(x, key) / (1 - RATE)
  wanted = z @ w + (gain - 1) * (dropped @ w) + gain * 0.5 * (dropped @ a @ b)
  np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-5)


def test_places_and_layers_have_masks_of_their_own():
  _, node = _node()
  two = jax.tree.map(lambda x: jnp.stack([x, x]), node)
  tree = drop({'q': two, 'v': two}, RATE, jax.random.key(0))
  keys = np.concatenate([jax.random.key_data(tree[n].key) for n in 'qv'])
  assert len(np.unique(keys, axis=0)) == 4
  same = drop({'v': two}, RATE, jax.random.key(0))['v'].key
  assert (same == tree['v'].key).all()


def test_rate_zero_is_the_loss_itself_and_others_are_refused():
  assert local.dropout(tiny.loss, 0.0) is tiny.loss
  with pytest.raises(Error, match=r'lora_dropout is 1; it must be at least 0'):
    local.dropout(tiny.loss, 1)
  with pytest.raises(Error, match=r'lora_dropout is -0.1; it must be'):
    adapters.lora(lora_dropout=-0.1)
  with pytest.raises(Error, match='a Scaled node has no dropout'):
    from fedjax_llm.nodes import Scaled

    drop({'q': Scaled(jnp.ones(2))}, RATE, jax.random.key(0))


def _apart(x, y):
  pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y))
  return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def test_a_round_has_masks_of_client_and_step_only():
  params, cohort = tiny.lora(), tiny.cohort()
  loss = local.dropout(tiny.loss, 0.5)

  def update(order, **parts):
    method = recipes.fed_avg(loss, tiny.sgd(), **parts)
    shuffled = jax.tree.map(lambda x: x[order], cohort)
    return tiny.run(method, params, shuffled)[0].params

  whole = update(np.arange(tiny.K))
  tiny.close(update(np.array([2, 0, 1]), block_size=1), whole)


def test_packed_rows_train_with_dropout():
  batch = tiny.texts(2)._replace(
    segments=np.array([[1, 1, 1, 2, 2, 2]] * 2),
    positions=np.array([[0, 1, 2, 0, 1, 2]] * 2),
  )
  loss = local.dropout(tiny.loss, 0.5)
  of = lambda p, key: loss(tiny.base(), p, batch, key).total
  one, two, again = (
    jax.grad(of)(tiny.lora(), jax.random.key(k)) for k in (0, 1, 0)
  )
  tiny.close(one, again)
  assert _apart(one, two) > 1e-3
