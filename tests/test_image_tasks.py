"""Tasks of images: losses against NumPy, sources, refusals, the program."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import adapters, data, models
from fedjax_llm.adapters import peft
from fedjax_llm.data import collate, pictures, tokenizers
from fedjax_llm.models.network import vision
from fedjax_llm.nodes import Prompt
from fedjax_llm.plan import work
from fedjax_llm.run import experiment, images, tasks, warm
from fedjax_llm.types import (
  Batch,
  Cohort,
  Error,
  Images,
  ImagesWithTexts,
  ImageWithText,
)

NAMES = ('cat', 'big_dog', 'owl')
# All sizes of its matrices differ, so that a program's text tells them apart.
LOADED: Any = models.random_clip(
  labels=NAMES, num_layers=1, hidden_size=24, intermediate_size=56
)
TEXT, IMAGE = jax.jit(LOADED.dual.text), jax.jit(LOADED.dual.image)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)


def cosines(x, y):
  unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
  return unit(np.asarray(x, np.float64)) @ unit(np.asarray(y, np.float64)).T


def log_softmax(s):
  s = s - s.max(-1, keepdims=True)
  return s - np.log(np.exp(s).sum(-1, keepdims=True))


# ------------------------------------------------------------------ losses --


def test_zero_shot_is_cross_entropy_of_scaled_cosines():
  """And a row without a label counts nothing."""
  texts = images.texts_of(LOADED)
  letters = 'a photo of a big dog.'
  assert texts.tokens[1].tolist() == [257, *letters.encode(), 258]
  assert texts.ends[1] == len(letters) + 1 and texts.tokens[0, 18] == 258
  label = np.array([2, 0, 1, -1], np.int32)
  batch = Images(PIXELS, label, np.array([1, 1, 1, 0], bool))
  loss = jax.jit(images.zero_shot().loss(LOADED, per_row=True))
  found = loss(LOADED.base, {}, batch, jax.random.key(0))
  behind = np.arange(texts.tokens.shape[1]) > texts.ends[:, None]
  other = np.where(behind, 7, texts.tokens)  # whatever stands behind the ends
  words = TEXT(LOADED.base, {}, other, ends=texts.ends)
  seen, _ = IMAGE(LOADED.base, {}, PIXELS)
  scores = np.exp(LOADED.base['logit_scale']['value']) * cosines(seen, words)
  want = -log_softmax(scores)[np.arange(3), label[:3]]
  np.testing.assert_allclose(found.total[:3], want, rtol=1e-4)
  assert found.total[3] == 0 and found.count.tolist() == [1, 1, 1, 0]
  right = scores[:3].argmax(1) == label[:3]
  assert found.correct[:3].tolist() == right.tolist()


def captions():
  """Four rows of pictures with texts, the last of them padding."""
  words = [tokenizers.bytes().encode(x) for x in ('one', 'a two', 'three!')]
  examples = [
    ImageWithText(
      picture, data.encoding.Example(np.array(w, np.int32), np.ones(len(w)) > 0)
    )
    for picture, w in zip(PIXELS, words)
  ]
  return collate.images_with_texts(examples, 8)([[x] for x in examples] + [[]])


def test_contrast_is_symmetric_cross_entropy_without_padding():
  batch = captions()
  loss = jax.jit(images.contrastive().loss(LOADED, per_row=True))
  found = loss(LOADED.base, {}, batch, jax.random.key(0))
  ends = batch.text.segments[:3].sum(-1) - 1
  words = TEXT(LOADED.base, {}, batch.text.tokens[:3], ends=ends)
  seen, _ = IMAGE(LOADED.base, {}, PIXELS)
  seen = seen[:3]
  scores = np.exp(LOADED.base['logit_scale']['value']) * cosines(seen, words)
  rows, columns = log_softmax(scores), log_softmax(scores.T)
  want = -(np.diagonal(rows) + np.diagonal(columns)) / 2
  np.testing.assert_allclose(found.total[:3], want, rtol=1e-4)
  assert np.abs(want + np.diagonal(rows)).max() > 1e-2  # one side alone
  assert found.total[3] == 0 and found.count.tolist() == [1, 1, 1, 0]
  assert found.correct[:3].tolist() == (scores.argmax(1) == range(3)).tolist()

  whole = images.contrastive().loss(LOADED)

  @jax.jit
  def slope(base, batch):
    return jax.grad(lambda b: whole(b, {}, batch, jax.random.key(0)).total)(
      base
    )

  gradient = slope(LOADED.base, batch)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
  # A step of padding alone changes nothing.
  empty = jax.tree.map(np.zeros_like, batch)
  gradient = slope(LOADED.base, empty)
  assert all(bool((x == 0).all()) for x in jax.tree.leaves(gradient))


# -------------------------------------------------------------------- data --


def test_records_of_an_npz_and_of_folders(tmp_path):
  file = tmp_path / 'two.npz'
  np.savez(
    file,
    pixels=PIXELS[:2],
    kind=np.array([3, 1]),
    domain=np.array(['photo', 'art']),
    name=np.array(['a cat', 'an owl']),
  )
  read = pictures.images(
    str(file), client_key='domain', label_key='kind', text_key='name'
  )
  assert [(r.client, r.label, r.text) for r in read] == [
    ('photo', '3', 'a cat'),
    ('art', '1', 'an owl'),
  ]
  np.testing.assert_array_equal(read[1].image, PIXELS[1])
  Pillow = pytest.importorskip('PIL.Image')
  for domain, kind, i in (('art', 'owl', 0), ('photo', 'cat', 1)):
    (tmp_path / 'all' / domain / kind).mkdir(parents=True)
    Pillow.fromarray(PIXELS[i]).save(
      tmp_path / 'all' / domain / kind / f'{i}.png'
    )
  read = pictures.images(str(tmp_path / 'all'))
  assert [(r.client, r.label) for r in read] == [
    ('art', 'owl'),
    ('photo', 'cat'),
  ]
  np.testing.assert_array_equal(read[1].image, PIXELS[1])
  small = pictures.images(str(tmp_path / 'all'), size=4)
  assert small[0].image.shape == (4, 4, 3)
  Pillow.new('L', (5, 8)).save(tmp_path / 'all' / 'photo' / 'cat' / '2.png')
  with pytest.raises(Error, match=r'2.png is 8 x 5, and .*0.png is 8 x 8: set'):
    pictures.images(str(tmp_path / 'all'))


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'label': ['a', 'b']}, "has no array 'pixels'; it has 'label'."),
    (
      {'pixels': PIXELS[0], 'label': ['a']},
      r'pixels: its shape is \[8, 8, 3\]; \[M, H, W, C\] is needed.',
    ),
    (
      {'pixels': PIXELS[:2].astype(int), 'label': ['a', 'b']},
      r'pixels: its dtype is int64; uint8 \(0 to 255\) or a float dtype',
    ),
    (
      {'pixels': PIXELS[:2] / 1.0, 'label': ['a', 'b']},
      'pixels: its values go from 0 to 255; floats from 0 to 1 are needed',
    ),
    (
      {'pixels': PIXELS[:2], 'label': ['a']},
      r"'label' is <U1 \[1\]; strings or integers \[2\] are needed",
    ),
  ],
)
def test_a_wrong_npz_is_refused_by_array(tmp_path, arrays, message):
  np.savez(tmp_path / 'x.npz', **arrays)
  with pytest.raises(Error, match=message):
    pictures.images(str(tmp_path / 'x.npz'))


def test_clients_are_domains_or_skewed_labels():
  records = pictures.shapes(num=64)
  task = images.zero_shot()
  labels = task.labels(records)
  assert labels == pictures.SHAPES
  build = lambda partition: data.build(
    records,
    data.bytes(),
    partition=partition,
    labels=labels,
    encode=task.encode,
  )
  assert build(data.natural()).names == tuple(sorted(pictures.STYLES))
  skewed = build(data.dirichlet(num_clients=4, alpha=0.1, min_size=2))
  shares = [
    max(np.bincount([x.label for x in own])) / len(own) for own in skewed.train
  ]
  assert np.mean(shares) > 0.5  # a quarter without a skew


# ---------------------------------------------------------------- refusals --


def test_images_and_texts_are_not_mistaken_for_each_other():
  text, vit = models.random(), models.random_vit(labels=NAMES)
  for task, loaded, message in (
    (images.zero_shot(), text, 'random-0 reads texts .llama., and task.name='),
    (images.zero_shot(), vit, 'random-vit-0 .vit. has no text tower'),
    (images.image_classification(), LOADED, 'has no classifier'),
    (tasks.causal_lm(), LOADED, 'random-clip-0 reads images .clip.'),
    (tasks.classification(), vit, 'random-vit-0 reads images .vit.'),
  ):
    with pytest.raises(Error, match=message):
      task.check(loaded)
  images.image_classification().check(vit)
  images.contrastive().check(LOADED)
  record = data.Record(text='hi', label='cat', where='a.jsonl:3')
  how = data.Encoding(data.bytes(), labels=NAMES)
  with pytest.raises(Error, match=r'a.jsonl:3: this record has no image'):
    images.zero_shot().encode(record, how)
  tokens = np.ones((1, 4), np.int32)
  batch: Any = Batch(tokens, tokens > 0, tokens, tokens)
  with pytest.raises(Error, match='this batch holds no pictures'):
    vit.model.hidden(vit.base, {}, batch)


@pytest.mark.parametrize(
  'pixels, message',
  [
    (PIXELS[:, :4], 'pixels are 4 x 8; the clip model reads 8 x 8'),
    (PIXELS[..., :1], r'the shape \[4, 8, 8, 1\]; .* reads \[..., H, W, 3\]'),
    (PIXELS.astype(int), 'the dtype int(32|64); uint8'),
  ],
)
def test_pixels_that_the_network_cannot_read_are_refused(pixels, message):
  with pytest.raises(Error, match=message):
    LOADED.dual.image(LOADED.base, {}, pixels)


@pytest.mark.parametrize(
  'names, template, message',
  [
    ((), '{}', 'task.labels is empty'),
    (('cat', 'cat'), '{}', "task.labels names the class 'cat' twice"),
    (('cat', ' '), '{}', 'a class has an empty name'),
    (('cat',), 'a photo', "task.template is 'a photo'; it must hold {} once"),
    (('cat' * 30,), '{}', 'is longer than the 77 tokens'),
  ],
)
def test_class_texts_that_make_no_classes_are_refused(names, template, message):
  with pytest.raises(Error, match=message):
    images.class_texts(tokenizers.bytes(), names, template)


def test_other_braces_of_a_template_stay():
  texts = images.class_texts(tokenizers.bytes(), ['cat'], '{a} {}')
  assert texts.tokens[0].tolist() == [257, *b'{a} cat', 258]
  how = data.Encoding(data.bytes())
  record = data.Record(image=PIXELS[0], text='cat')
  pair = images.contrastive('{a} {}').encode(record, how).examples[0]
  assert pair.text.tokens.tolist() == [257, *b'{a} cat', 258]


def test_other_wrong_values_are_named():
  with pytest.raises(Error, match=r"task.labels names the class 'a' twice"):
    images.zero_shot(labels=['a', 'a']).labels([])
  record = data.Record(image=PIXELS[0], label='fox')
  how = data.Encoding(data.bytes(), labels=NAMES)
  with pytest.raises(Error, match=r"the label 'fox' is not one of task.labels"):
    images.zero_shot().encode(record, how)
  with pytest.raises(Error, match=r'deep prompts have the shape \[1, 2, 24\]'):
    LOADED.dual.image(
      LOADED.base,
      {},
      PIXELS,
      prompts=np.zeros((2, 24)),
      deep=np.ones((1, 2, 24)),
    )
  wide = vision.Patches(8, 4, resized=True)
  with pytest.raises(Error, match='both sides must be multiples of the patch'):
    vision.check(np.zeros((10, 8, 3), np.uint8), wide, 'dinov2')


# ------------------------------------------------------------- the program --


def test_a_cohort_meets_the_image_tower_in_unbatched_products():
  """Reads the HLO of a round of clients with LoRA and prompts of their own."""
  K, loaded = 5, LOADED
  adapter = adapters.beside(
    adapters.lora(rank=1, targets=['vision/.*/(q|v)_proj']),
    adapters.within(adapters.soft_prompt(3), 'vision', 'text'),
  )
  params = adapter.init(jax.random.key(0), loaded.base)
  algorithm = fl.recipes.fed_avg(
    images.zero_shot().loss(loaded), fl.local.optimizer('sgd', 0.1)
  )
  state = algorithm.init(jax.random.key(1), params)
  pixels = np.broadcast_to(PIXELS[:2], (K, 1, 2, 8, 8, 3))
  label = np.broadcast_to(np.array([0, 2], np.int32), (K, 1, 2))
  cohort = Cohort(
    ids=np.arange(K),
    batches=Images(pixels, label, label >= 0),
    weight=np.ones(K, np.float32),
    valid=np.ones(K, bool),
  )
  step = jax.jit(algorithm.round).lower(state, cohort, loaded.base).compile()
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(loaded.base)
    if path[-1].key == 'kernel'
  }
  text, shapes, products = step.as_text() or '', {}, 0
  for found, dims in re.findall(r'(%[\w.-]+) = f32\[([\d,]+)\]', text):
    shapes[found] = tuple(int(n) for n in dims.split(',') if n != '1')
  for line in text.splitlines():
    if ' dot(' in line:
      names = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
      if any(tuple(sorted(shapes.get(n, ()))) in kernels for n in names):
        products += 1
        assert not re.search(r'lhs_batch_dims=\{\d', line), line
  assert products >= 14  # six matrices of a layer, of both towers, and others
  _, _, info = step(state, cohort, loaded.base)
  assert bool(jnp.isfinite(info.metrics['local/loss']))
  sent = sum(
    x.size
    for x, label in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(fl.scopes.everything().labels(params)),
    )
    if label.value == 'shared'
  )
  assert info.bytes_up.sum(1).tolist() == [4 * sent] * K


def test_a_plan_has_the_images_of_the_network():
  for task in (images.zero_shot(), images.contrastive()):
    batch = work.batches_of(task, (3, 2, 2, 8), 259, LOADED.config)
    assert batch.pixels.shape == (3, 2, 2, 8, 8, 3)
    assert isinstance(batch, Images | ImagesWithTexts)


def test_adapters_of_both_towers_survive_peft_files(tmp_path):
  """Towers of different depths; a prompt of a tower has no file."""
  sizes = LOADED.config.vision._replace(num_layers=3)
  layers = jax.tree.map(
    lambda w: np.repeat(w, 3, axis=0), LOADED.base['vision']['layers']
  )
  tower = {**LOADED.base['vision'], 'layers': layers}
  loaded = LOADED._replace(
    config=LOADED.config._replace(vision=sizes),
    base={**LOADED.base, 'vision': tower},
  )
  adapter = adapters.lora(rank=2, targets=['q_proj', '.*_projection'])
  params = jax.tree.map(
    lambda x: x + 0.5, adapter.init(jax.random.key(0), loaded.base)
  )
  task = images.zero_shot()
  experiment.save_adapter(
    tmp_path / 'a', params, loaded, task, base_model='x', peft_fields={}
  )
  again = warm.load_adapter(tmp_path / 'a', loaded)
  for x, y in zip(*map(jax.tree.leaves, (params, again)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)
  node = {'vision': {'inputs': Prompt(jnp.ones((2, 24)))}}
  reason = peft.refusal(node, loaded.config)
  assert reason == 'vision/inputs: PEFT has no prompts of a part of a network.'
