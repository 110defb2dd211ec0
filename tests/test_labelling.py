"""Few labels and many texts: LP-FL against float64, and a whole run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_labels as ref

from fedjax_llm import local, narration, recipes
from fedjax_llm.data import population, sources, tokenizers
from fedjax_llm.types import Batch, ClientState, Cohort, Error, Model

KEY = jax.random.key(0)
K, S, B, T, D, C = 4, 3, 6, 2, 5, 3
V, RATE, ROUNDS = 40, 0.5, 4

MODEL = Model(
  lambda base, params, batch: jnp.asarray(base)[batch.tokens],
  lambda base, params, hidden: hidden @ params['w'],
)


def base():
  return np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)


def cohort(share=0.4):
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, V, (K, S, B, T)).astype(np.int32)
  teacher = rng.normal(size=(D, C))
  label = (base()[tokens[..., 0]] @ teacher).argmax(-1)
  label = np.where(rng.random((K, S, B)) < share, label, -1)
  segments = np.ones_like(tokens)
  segments[0, :, -2:] = 0  # client 0 has rows of padding, one with a label
  label[0, :, -1] = 1
  label[1] = -1  # client 1 has no label at all
  label[1, 0, 0] = 0
  batches = Batch(tokens, tokens < 0, segments, tokens * 0, label)
  ids = np.arange(K, dtype=np.int32)
  weight = np.full(K, 7, np.float32)
  return Cohort(ids, batches, weight, np.ones(K, bool), (), ClientState())


@functools.cache
def built(name, **settings):
  more = {'model': MODEL, **settings} if name == 'lp_fl' else settings
  algorithm = getattr(recipes, name)(
    local.classification(MODEL), local.optimizer('sgd', RATE), **more
  )
  return algorithm, jax.jit(algorithm.round)


def run(rounds=ROUNDS, of=None, name='lp_fl', **settings):
  algorithm, step = built(name, **settings)
  state, told = algorithm.init(KEY, {'w': jnp.zeros((D, C))}), []
  for _ in range(rounds):
    state, _, metrics = step(state, of or cohort(), base())
    told.append(metrics)
  return np.asarray(state.params['w']), told


@pytest.mark.parametrize('soft', [True, False])
def test_lp_fl_equals_a_float64_loop(soft):
  of = cohort()
  y = np.where(of.batches.segments[..., 0] > 0, of.batches.label, -2)
  x = base()[of.batches.tokens[..., 0]]
  want, counts = ref.lp_fl(
    x, y, np.zeros((D, C)), RATE, threshold=0.5, soft=soft, rounds=ROUNDS
  )
  got, told = run(threshold=0.5, soft=soft)
  np.testing.assert_allclose(got, want, atol=1e-5)
  taught = [float(info.metrics['local/tokens']) for info in told]
  assert taught == counts.sum(1).tolist()
  # The set grows: nobody is confident at w = 0, later many are.
  assert (counts[0] == (y >= 0).sum((1, 2))).all()
  assert taught[-1] > 1.5 * taught[0]


def test_while_nothing_is_confident_it_is_fedavg_on_the_labelled_texts():
  of = cohort()
  real = (of.batches.label >= 0) & (of.batches.segments[..., 0] > 0)
  plain = of._replace(weight=real.sum((1, 2)).astype(np.float32))
  got, _ = run(threshold=1.0)
  want, _ = run(of=plain, name='fed_avg')
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_with_all_labels_it_is_fedavg():
  of = cohort(share=2.0)
  of.batches.label[1] = 2
  real = of.batches.segments[..., 0] > 0
  plain = of._replace(weight=real.sum((1, 2)).astype(np.float32))
  got, _ = run(of=of, threshold=0.0)
  want, _ = run(of=plain, name='fed_avg')
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_distribution_on_one_class_is_that_label():
  batch = jax.tree.map(lambda x: x[0, 0], cohort().batches)
  params = {'w': jax.random.normal(KEY, (D, C))}
  loss = local.classification(MODEL, per_row=True)
  q = np.eye(C, dtype=np.float32)[batch.label] * (batch.label >= 0)[:, None]
  hard = jax.jit(loss)(base(), params, batch, KEY)
  soft = jax.jit(loss)(base(), params, batch._replace(label=q), KEY)
  for one, other in zip(hard, soft):
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_client_without_any_text_to_learn_counts_nothing():
  of = cohort()
  of.batches.label[1] = -1
  got, _ = run(rounds=1, of=of, threshold=1.0)
  without = of._replace(valid=np.arange(K) != 1)
  want, _ = run(rounds=1, of=without, threshold=1.0)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('threshold', [-0.1, 1.1])
def test_a_threshold_is_a_probability(threshold):
  with pytest.raises(Error, match='from 0 to 1'):
    run(threshold=threshold)


def test_texts_that_are_not_classified_are_refused():
  of = cohort()
  of = of._replace(batches=of.batches._replace(label=None))
  with pytest.raises(Error, match='are classes of texts'):
    run(of=of, rounds=1)


# -------------------------------------------------------------------- data --


def people(**settings):
  records = sources.packaged()
  names = sorted({str(r.label) for r in records})
  return population.build(
    records, tokenizers.bytes(), labels=names, max_length=32, **settings
  )


def test_a_share_of_the_labels_stays_whoever_else_there_is():
  whole, some = people(), people(labelled=0.25)
  few = people(labelled=0.25, max_clients=3)
  for name, full, own in zip(whole.names, whole.train, some.train):
    kept = [e for e in own if e.label != -1]
    assert len(kept) == max(1, round(0.25 * len(own)))
    texts = lambda one: [e.tokens.tolist() for e in one]
    assert texts(own) == texts(full)
    assert all(e.label in (-1, f.label) for e, f in zip(own, full))
    if name in few.names:
      other = few.train[few.names.index(name)]
      assert [e.label for e in other] == [e.label for e in own]
  assert all(e.label != -1 for own in some.heldout for e in own)
  hidden = sum(e.label == -1 for own in some.train for e in own)
  assert some.report['unlabelled'] == hidden > 0
  assert whole.report['unlabelled'] == 0
  assert f'labels hidden from {hidden} ' in narration.describe(some)
  assert 'hidden' not in narration.describe(whole)


def test_labels_can_only_be_hidden_where_there_are_any():
  with pytest.raises(Error, match='is a share from 0 to 1'):
    people(labelled=1.5)
  with pytest.raises(Error, match='classification'):
    population.build(sources.packaged(), tokenizers.bytes(), labelled=0.5)
