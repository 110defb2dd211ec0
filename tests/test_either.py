"""Clients with pictures, texts or both: their loss, their towers, the mean."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import clients, data, local, recipes, types
from fedjax_llm.data import collate
from fedjax_llm.data.sources import Record
from fedjax_llm.local.either import either
from fedjax_llm.recipes.images.towers import by_tower
from fedjax_llm.run import images
from fedjax_llm.types import (
  Batch,
  ClientState,
  Cohort,
  Eithers,
  Error,
  Images,
)

KEY, RATE, SCALE = jax.random.key(0), 0.5, 3.0
K, S, B, T, C, D, P, V = 3, 2, 4, 3, 3, 5, 4, 11
PICTURE, TEXT, BOTH = range(K)
RNG = np.random.default_rng(6)
WORDS = RNG.normal(size=(V, D)).astype(np.float32)
DUAL = SimpleNamespace(
  text=lambda base, params, tokens, ends: (
    jnp.asarray(WORDS)[
      jnp.take_along_axis(jnp.asarray(tokens), ends[:, None], 1)[:, 0]
    ]
    @ params['text']['w']
  ),
  image=lambda base, params, pixels: (
    jnp.reshape(pixels, (len(pixels), -1)) @ params['vision']['w'],
    None,
  ),
  scale=lambda base, params: jnp.float32(SCALE),
)
NAMES = RNG.integers(1, V, (C, 2)).astype(np.int32), np.array([1, 0, 1])
LOSS = either(DUAL, *NAMES)
START = {
  'text': {'w': RNG.normal(size=(D, P)).astype(np.float32)},
  'vision': {'w': RNG.normal(size=(D, P)).astype(np.float32)},
}


def batches():
  """Batches [K, S, B]: client 0 has pictures, 1 texts, 2 both in some rows."""
  pictured, worded = np.zeros((2, K, S, B), bool)
  pictured[PICTURE], worded[TEXT] = True, True
  pictured[BOTH], worded[BOTH] = RNG.random((2, S, B)) < 0.7
  pictured[BOTH, 0, 0] = worded[BOTH, 0, 0] = True
  label = RNG.integers(0, C, (K, S, B)).astype(np.int32)
  label[~(pictured | worded)] = -1
  label[PICTURE, 1, 2:] = -1  # padding
  pictured[PICTURE, 1, 2:] = False
  length = np.where(worded, RNG.integers(1, T + 1, (K, S, B)), 0)
  segments = (np.arange(T) < length[..., None]).astype(np.int32)
  tokens = RNG.integers(1, V, (K, S, B, T)).astype(np.int32) * segments
  pixels = RNG.normal(size=(K, S, B, D, 1, 1)).astype(np.float32)
  pixels[~pictured] = 0
  text = Batch(tokens, segments < 0, segments, segments * 0)
  return Eithers(pixels, pictured, text, label)


BATCHES = batches()


def unit(x):
  return x / np.linalg.norm(x)


def by_hand(batch, text, vision):
  """The loss of a batch [B, ...], row by row in float64."""
  text, vision = np.float64(text), np.float64(vision)
  classes = [unit(WORDS[t[e]] @ text) for t, e in zip(*NAMES)]
  total = count = 0

  def add(features, label):
    z = np.array([SCALE * unit(features) @ name for name in classes])
    return np.log(np.exp(z).sum()) - z[label]

  for i, label in enumerate(batch.label):
    if label < 0:
      continue
    length = batch.text.segments[i].sum()
    if length:
      last = batch.text.tokens[i, length - 1]
      total, count = total + add(WORDS[last] @ text, label), count + 1
    if batch.pictured[i]:
      pixels = batch.pixels[i].reshape(-1)
      total, count = total + add(pixels @ vision, label), count + 1
  return total, count


def step_of(client, number):
  return jax.tree.map(lambda x: x[client, number], BATCHES)


def test_the_loss_is_that_of_what_a_row_has():
  loss = jax.jit(lambda params, batch: LOSS(None, params, batch, KEY))
  for client in range(K):
    batch = step_of(client, 1)
    sums = loss(START, batch)
    want, count = by_hand(batch, START['text']['w'], START['vision']['w'])
    assert float(sums.total) == pytest.approx(want, rel=1e-5)
    assert float(sums.count) == count == batch.learned().sum()


def trained_alone(client, names):
  """SGD on the towers `names` of one client; the others stay as they are."""
  slope = jax.jit(
    jax.grad(lambda params, batch: LOSS(None, params, batch, KEY).total)
  )
  params = START
  for number in range(S):
    batch = step_of(client, number)
    count = batch.learned().sum()
    grads = slope(params, batch)
    params = {
      name: {'w': x['w'] - RATE * grads[name]['w'] / count * (name in names)}
      for name, x in params.items()
    }
  return {name: params[name]['w'] - START[name]['w'] for name in names}


def cohort():
  weight = np.array([3.0, 1.0, 2.0], np.float32)
  return Cohort(
    np.arange(K, dtype=np.int32), BATCHES, weight, np.ones(K, bool), (),
    ClientState(),
  )  # fmt: skip


def test_a_tower_is_the_mean_over_those_who_trained_it():
  method: Any = by_tower(LOSS, local.optimizer('sgd', RATE))
  state = method.init(KEY, jax.tree.map(jnp.asarray, START))
  new, _, info = jax.jit(method.round)(state, cohort())
  uploads, *_ = jax.jit(method.train)(state, cohort(), None)
  own = {
    PICTURE: trained_alone(PICTURE, ['vision']),
    TEXT: trained_alone(TEXT, ['text']),
    BOTH: trained_alone(BOTH, ['text', 'vision']),
  }
  for client, absent in ((PICTURE, 'text'), (TEXT, 'vision')):
    assert not np.asarray(uploads.update[absent]['w'][client]).any()
    assert not np.asarray(uploads.masks.trained[absent]['w'][client]).any()
  for name, first, weight in (('vision', PICTURE, 3.0), ('text', TEXT, 1.0)):
    want = weight * own[first][name] + 2 * own[BOTH][name]
    got = np.asarray(new.params[name]['w']) - START[name]['w']
    np.testing.assert_allclose(got, want / (weight + 2), atol=1e-5)
  # Who lacks one kind sends half of what the other client sends.
  sent = np.asarray(info.bytes_up).sum(1)
  assert sent[PICTURE] == sent[TEXT] == 4 * D * P and sent[BOTH] == 8 * D * P
  # Federated averaging counts what a client lacks as a vote for no change, and
  # the names of classes train the text tower of a client without texts.
  plain: Any = recipes.fed_avg(LOSS, local.optimizer('sgd', RATE))
  other, *_ = jax.jit(plain.round)(state, cohort())
  for name in START:
    apart = other.params[name]['w'] - new.params[name]['w']
    assert np.abs(apart).max() > 1e-2


def test_other_batches_and_parameters_are_refused():
  method: Any = by_tower(LOSS, local.optimizer('sgd', RATE))
  pictures = Images(BATCHES.pixels, BATCHES.label, np.asarray(BATCHES.pictured))
  state = method.init(KEY, jax.tree.map(jnp.asarray, START))
  with pytest.raises(Error, match='need task'):
    jax.eval_shape(method.round, state, cohort()._replace(batches=pictures))
  state = method.init(KEY, {'scores': jnp.ones(2)})
  with pytest.raises(Error, match='trains no tower of a dual encoder'):
    jax.eval_shape(method.round, state, cohort())


def test_records_become_rows_that_lack_what_they_lack():
  pixels = np.full((2, 2, 3), 7, np.uint8)
  task = images.images_or_texts(['cat', 'dog'])
  how = data.Encoding(data.bytes(), labels=('cat', 'dog'))
  records = [
    Record(image=pixels, label='dog'),
    Record(text='barks', label='dog'),
    Record(image=pixels, text='purrs', label='cat'),
  ]
  examples = [task.encode(record, how).examples[0] for record in records]
  batch = task.collate(examples, 8, 0)([*([x] for x in examples), []])
  assert batch.label.tolist() == [1, 1, 0, -1]
  assert batch.pictured.tolist() == [True, False, True, False]
  assert batch.worded().tolist() == [False, True, True, False]
  assert bytes(batch.text.tokens[1, 1:6].tolist()).decode() == 'barks'
  assert batch.pixels[2].min() == 7 and batch.pixels[1].max() == 0
  assert batch.learned().tolist() == 4 and batch.real()
  # Texts alone leave pictures of no size, which no tower reads.
  alone = collate.either(examples[1:2], 8)([[examples[1]]])
  assert alone.pixels.shape == (1, 0, 0, 0)
  text = jax.tree.map(lambda x: x % V, alone.text)
  sums = LOSS(None, START, alone._replace(text=text), KEY)
  assert float(sums.count) == 1
  for record, words in (
    (Record(label='cat'), 'needs an image or a text'),
    (Record(text='neighs', label='horse'), "'horse' is not one of task.labels"),
  ):
    with pytest.raises(Error, match=words):
      task.encode(record, how)


def test_the_words_of_drawn_shapes_are_checked():
  with pytest.raises(Error, match='it holds picture, text or both'):
    data.pictures.shapes_or_words(shows=('sound',))


def test_examples_without_a_text_bound_nothing():
  text = types.Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool))
  examples = [[types.Either(None, text, 0), types.Either(None, None, 0)], []]
  limits = clients.cohorts.bounds(examples, batch_size=2, max_length=4)
  pair = types.Pair(text, text)
  assert limits == clients.cohorts.bounds([[text]], batch_size=2, max_length=4)
  with pytest.raises(Error, match='same number of texts each, not 1, 2'):
    clients.cohorts.bounds([[text, pair]], batch_size=2, max_length=4)
