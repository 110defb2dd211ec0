"""FedRS: the restricted softmax against float64, and its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_labels as references

from fedjax_llm import local, recipes
from fedjax_llm.recipes.labels.fed_rs import restricted
from fedjax_llm.types import (
  Batch,
  ClientState,
  Cohort,
  Error,
  Images,
  LossSum,
  Model,
)

KEY, RATE, C = jax.random.key(0), 0.5, 4
MODEL = Model(
  lambda base, params, batch: jnp.asarray(batch.pixels),
  lambda base, params, hidden: hidden @ params['w'],
)
RNG = np.random.default_rng(3)
X = RNG.normal(size=(3, 2, 5, 6)).astype(np.float32)  # [K, S, B, D]
LABEL = RNG.integers(0, C, (3, 2, 5)).astype(np.int32)
LABEL[0] = np.minimum(LABEL[0], 1)  # client 0 has two classes
LABEL[1] = 3  # client 1 has one
PRESENT = np.ones((3, 2, 5), bool)
PRESENT[0, 1, 2:] = False
LABEL[0, 1, 3] = 2  # padding has no class
LABEL[2, 0, :2] = -1
W = np.float32(RNG.normal(size=(6, C)) * 0.3)
COUNT = ((LABEL >= 0) & PRESENT).sum((1, 2))


def served(name, **settings):
  more = {'model': MODEL, **settings} if name == 'fed_rs' else settings
  method = getattr(recipes, name)(
    local.classification(MODEL), local.optimizer('sgd', RATE), **more
  )
  cohort = Cohort(
    np.arange(3, dtype=np.int32), Images(X, LABEL, PRESENT),
    COUNT.astype(np.float32), np.ones(3, bool), (), ClientState(),
  )  # fmt: skip
  state, step = method.init(KEY, {'w': jnp.asarray(W)}), jax.jit(method.round)
  for _ in range(2):
    state, *_ = step(state, cohort)
  return np.asarray(state.params['w'])


def want(alpha, by_counts):
  y = np.where(PRESENT, LABEL, -1)
  return references.fed_rs(X, y, W, RATE, alpha, by_counts, 2)


@pytest.mark.parametrize('by_counts', [False, True])
def test_fed_rs_equals_a_float64_loop(by_counts):
  got = served('fed_rs', alpha=0.3, by_counts=by_counts)
  np.testing.assert_allclose(got, want(0.3, by_counts), atol=1e-5)
  # The other form and federated averaging are elsewhere.
  assert np.abs(got - want(0.3, not by_counts)).max() > 1e-2
  assert np.abs(got - want(1.0, by_counts)).max() > 1e-2


def test_with_alpha_of_one_it_is_federated_averaging():
  plain = served('fed_avg')
  np.testing.assert_allclose(plain, want(1.0, False), atol=1e-5)
  np.testing.assert_allclose(served('fed_rs', alpha=1.0), plain, atol=1e-6)


def test_with_alpha_of_zero_a_class_that_nobody_has_stays_as_it_is():
  def columns(alpha):
    mine = Images(X[1], LABEL[1], PRESENT[1])  # class 3 alone
    loss = local.on_model(
      local.classification(MODEL), restricted(MODEL, mine, alpha)
    )
    batch = Images(X[1, 0], LABEL[1, 0], PRESENT[1, 0])
    total = lambda w: loss(None, {'w': w}, batch, KEY).total
    return np.abs(jax.grad(total)(jnp.asarray(W))).max(0)

  assert (columns(0.0)[:3] == 0).all() and columns(0.0)[3] > 0.1
  assert (columns(1.0)[:3] > 0.1).all()


def test_rows_of_texts_that_are_padding_have_no_class():
  tokens = np.ones((1, 3, 2), np.int32)
  segments = np.array([[[1, 1], [0, 0], [1, 0]]])
  batch = Batch(tokens, tokens > 1, segments, tokens, np.array([[2, 1, -1]]))
  ones = Model(MODEL.hidden, lambda base, params, hidden: jnp.ones((1, C)))
  got = restricted(ones, batch, 0.25).logits(None, {}, jnp.zeros(1))
  assert got.tolist() == [[0.25, 0.25, 1.0, 0.25]]


def test_it_is_refused_without_classes_or_in_micro_batches():
  plain = lambda base, params, batch, key: LossSum(*jnp.ones(3))
  parts = local.micro_batches(local.classification(MODEL), 1)
  batches = Images(X[0], LABEL[0], PRESENT[0])
  start = {'w': jnp.asarray(W)}
  for loss in (plain, parts):
    method = recipes.fed_rs(loss, local.optimizer('sgd'), model=MODEL)
    cohort = Cohort(
      np.arange(1), jax.tree.map(lambda x: x[None], batches), np.ones(1),
      np.ones(1, bool), (), ClientState(),
    )  # fmt: skip
    state = method.init(KEY, start)
    with pytest.raises(Error, match='without memory'):
      jax.eval_shape(method.round, state, cohort)
  with pytest.raises(Error, match='have no class each'):
    restricted(MODEL, batches._replace(label=None), 0.5)
