"""Fed-L2P: keys against a float64 reference, prompts against fed_avg."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, local, models, recipes
from fedjax_llm.types import Batch, Cohort, Error

K, B, T, V, TOP = 2, 3, 6, 17, 2
QUESTION = 3  # tokens before the reply, which choose the prompts
RATE, STRENGTH = 0.5, 0.25
WEIGHT = np.array([3.0, 1.0], np.float32)


@functools.cache
def loaded():
  return models.random(
    vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1,
    max_positions=32,
  )  # fmt: skip


def start():
  """A pool whose keys are apart, so that texts choose different prompts."""
  params = adapters.prompt_pool(1, size=5, top=TOP).init(
    jax.random.key(0), loaded().base
  )
  keys = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
  return {'inputs': params['inputs']._replace(keys=jnp.asarray(keys))}


def batches():
  tokens = np.random.default_rng(2).integers(1, V, (K, 1, B, T), np.int32)
  there = np.ones(tokens.shape, np.int32)
  there[0, 0, 0, 2:] = 0  # padding, which is no part of a query
  places = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
  learned = (there > 0) & (places >= QUESTION)
  learned[0, 0, 0, 1] = True
  return Batch(tokens, learned, there, places)


@functools.cache
def trained(name, **settings):
  algorithm = getattr(recipes, name)(
    local.causal_lm(loaded().model), local.optimizer('sgd', RATE), **settings
  )
  state = algorithm.init(jax.random.key(3), start())
  cohort = Cohort(np.arange(K), batches(), WEIGHT, np.ones(K, bool))
  state, _, info = jax.jit(algorithm.round)(state, cohort, loaded().base)
  return jax.device_get(state.params['inputs']), info


def reference(keys):
  """The keys after a round: SGD on the second term of L2P's loss, averaged."""
  table = np.asarray(loaded().base['embed_tokens']['embedding'], np.float64)
  unit = lambda x: x / np.linalg.norm(x)
  data, ends = batches(), []
  for k in range(K):
    grads = np.zeros_like(keys)
    for b in range(B):
      first = np.argmax(data.loss_mask[k, 0, b])
      query = unit(table[data.tokens[k, 0, b, :first]].mean(0))
      cosines = np.array([query @ unit(key) for key in keys])
      for i in np.argsort(-cosines)[:TOP]:
        norm = np.linalg.norm(keys[i])
        grads[i] -= (query - cosines[i] * unit(keys[i])) / norm / B
    ends.append(keys - RATE * STRENGTH * grads)
  return np.average(ends, axis=0, weights=WEIGHT)


def test_keys_move_to_the_queries_of_the_texts_that_chose_them():
  node, _ = trained('fed_l2p', strength=STRENGTH)
  keys = np.asarray(start()['inputs'].keys, np.float64)
  want = reference(keys)
  np.testing.assert_allclose(node.keys, want, rtol=1e-5, atol=1e-6)
  still = np.all(want == keys, 1)
  assert 0 < still.sum() < len(keys)  # some were chosen by no text
  # A mean over the chosen prompts instead of the sum is half as far.
  assert np.abs(node.keys - (keys + want) / 2).max() > 1e-3


def test_prompts_are_averaged_as_by_fed_avg_which_moves_no_key():
  node, info = trained('fed_l2p', strength=STRENGTH)
  plain, _ = trained('fed_avg')
  zero, _ = trained('fed_l2p', strength=0.0)
  np.testing.assert_array_equal(plain.keys, start()['inputs'].keys)
  np.testing.assert_allclose(node.rows, plain.rows, rtol=1e-5, atol=1e-7)
  assert np.abs(plain.rows - start()['inputs'].rows).max() > 1e-4
  np.testing.assert_allclose(zero.rows, plain.rows, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(zero.keys, plain.keys, rtol=1e-6)
  assert info.bytes_up.sum(1).tolist() == [(5 * 8 + 5 * 8) * 4] * K


def test_a_negative_strength_is_refused():
  with pytest.raises(Error, match=r'fed_l2p: strength is -1; it must be 0'):
    recipes.fed_l2p(None, local.optimizer('sgd'), strength=-1)
