"""Families: every kind of checkpoint computes what torch computes.

The golden models are tiny and random; one compiled program a model serves its
tests (`run`), which is why all of them use batches of one shape.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import local
from fedjax_llm.models import families
from fedjax_llm.models import generate as generate_text
from fedjax_llm.models.files import load
from fedjax_llm.models.network import rope
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Error, Model

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'models'
NAMES = sorted(p.name for p in GOLDEN.iterdir())
CONFIGS = {name: families.read_config(GOLDEN / name) for name in NAMES}
# What `golden/make_training.py` wrote: two batches, and torch's loss of them.
LOSSES = json.loads((GOLDEN.parent / 'losses.json').read_text())
BATCHES = dict(np.load(GOLDEN.parent / 'batches.npz'))
DECODERS = [name for name in NAMES if CONFIGS[name].causal]
# `test_image_models.py` has the others.
OF_TEXTS = set(families.FAMILIES) - {'vit', 'dinov2', 'clip'}
LENGTH = 24


@functools.cache
def golden(name):
  loaded = load.pretrained(GOLDEN / name)

  def outputs(batch):
    hidden = loaded.model.hidden(loaded.base, {}, batch)
    if loaded.config.head == 'none':
      return hidden
    return loaded.model.logits(loaded.base, {}, hidden)

  return loaded, jax.jit(outputs)


def texts(tokens, lengths) -> Batch:
  """Two rows of 24 tokens."""
  tokens = np.asarray(tokens, np.int32)
  assert tokens.shape == (2, LENGTH)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  inside = positions < np.asarray(lengths)[:, None]
  return Batch(tokens, inside, inside.astype(np.int32), positions)


# ------------------------------------------------------------------ parity --


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_those_of_torch(name):
  loaded, outputs = golden(name)
  data = np.load(GOLDEN / name / 'logits.npz')
  wanted = data['logits']
  batch = texts(data['tokens'], data['lengths'])
  found = np.asarray(outputs(batch))
  if loaded.config.head == 'classifier':
    found = found[:, 0]  # the first token speaks for the text
  else:
    found = found * batch.loss_mask[..., None]
  scale = np.abs(wanted).max()
  assert scale > 0.5  # the weights were not so small that all is near zero
  np.testing.assert_allclose(found, wanted, atol=1e-5 * scale)


def test_golden_models_cover_what_the_families_can_say():
  configs = CONFIGS.values()
  has = lambda name: {getattr(c, name) for c in configs}
  assert has('family') == OF_TEXTS
  assert has('residual') == {'pre', 'post', 'sandwich', 'parallel', 'shared'}
  assert has('norm') == {'rms', 'rms_plus_one', 'layer'}
  assert has('head') == {'lm', 'masked_lm', 'classifier', 'none'}
  assert {c.rope.kind for c in configs} == set(rope.KINDS)
  for name in ('tied', 'mlp_bias', 'qkv_bias', 'qk_norm', 'gated', 'head_bias'):
    assert has(name) == {True, False}, name
  assert {len(set(c.windows)) for c in configs} == {0, 1, 2}
  assert {len(set(c.layer_ropes)) for c in configs} == {0, 2}
  assert {1.0, 0.25, 0.5, 0.75} <= has('partial_rotary')
  windows = {w for c in configs for w in c.windows}
  assert windows and max(windows) < LENGTH


@pytest.mark.parametrize('name', NAMES)
def test_packed_texts_equal_separate_ones(name):
  _, outputs = golden(name)
  rng = np.random.default_rng(0)
  first, second = rng.integers(3, 97, 11), rng.integers(3, 97, 9)
  packed = np.concatenate([first, second, np.zeros(4, int)])
  places = np.concatenate([np.arange(11), np.arange(9), np.arange(40, 44)])
  row = Batch(packed, None, np.repeat([1, 2, 0], [11, 9, 4]), places)
  other = Batch(packed[::-1], None, np.repeat([0, 1], [4, 20]), places * 0)
  both = (None if x is None else np.stack([x, y]) for x, y in zip(row, other))
  found = outputs(Batch(*both)._replace(loss_mask=np.ones((2, LENGTH), bool)))[
    0
  ]
  apart = np.zeros((2, LENGTH), np.int32)
  apart[0, :11], apart[1, :9] = first, second
  wanted = outputs(texts(apart, [11, 9]))
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found[:11], wanted[0, :11], atol=2e-5 * scale)
  np.testing.assert_allclose(found[11:20], wanted[1, :9], atol=2e-5 * scale)


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_losses_of_padded_and_packed_texts_are_those_of_torch(name):
  """Their own loss, and their own reading of packed rows."""
  loaded, outputs = golden(name)
  head = loaded.config.head
  packs = head != 'classifier'  # which has one text a row
  assert set(LOSSES[name]) == ({'padded', 'packed'} if packs else {'padded'})
  for kind, wanted in LOSSES[name].items():
    get = lambda what, kind=kind: BATCHES[f'{kind}/{what}']
    batch = Batch(
      get('tokens'), get('next') >= 0, get('segments'), get('positions')
    )
    logits = outputs(batch)
    if loaded.config.causal:
      at_once = Model(lambda *_, x=logits: x, lambda base, params, x: x)
      sums = local.causal_lm(at_once)({}, {}, batch, jax.random.key(0))
      found = sums.total / sums.count
    else:
      logits, labels = np.asarray(logits, np.float64), get('masked')
      if head == 'classifier':
        logits, labels = logits[:, 0], BATCHES['classes']
      picked = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      found = -np.log(picked[labels >= 0, labels[labels >= 0]]).mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=kind)


def test_packed_golden_texts_are_longer_than_every_window():
  families_seen = {CONFIGS[name].family for name in LOSSES}
  assert families_seen == OF_TEXTS
  longest = BATCHES['packed/positions'].max() + 1
  assert max(w for c in CONFIGS.values() for w in c.windows) < longest


@pytest.mark.parametrize('name', NAMES)
def test_only_encoders_see_what_comes_later(name):
  loaded, outputs = golden(name)
  tokens = np.arange(3, 3 + 2 * LENGTH).reshape(2, LENGTH)
  other = tokens.copy()
  other[:, -1] += 7
  lengths = [LENGTH, LENGTH]
  change = outputs(texts(tokens, lengths)) - outputs(texts(other, lengths))
  change = np.abs(change).max((0, 2))
  assert change[-1] > 1e-4
  assert (change[0] > 1e-6) == (not loaded.config.causal)


GRADIENTS = ['gemma3', 'gpt2', 'phi', 'roberta_classifier']


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_of_many_adapters_are_finite_and_not_zero(name):
  loaded, _ = golden(name)
  rng = np.random.default_rng(0)

  def factors(group, target):
    num_layers, d, f = loaded.base['layers'][group][target]['kernel'].shape
    return LowRank(
      jnp.asarray(rng.normal(size=(2, num_layers, d, 2)) / d**0.5, jnp.float32),
      jnp.asarray(rng.normal(size=(2, num_layers, 2, f)) / 8, jnp.float32),
      jnp.full([2, num_layers], 0.5),
    )

  targets = [('self_attn', f'{x}_proj') for x in 'qkvo']
  params = {'layers': {'self_attn': {t: factors(g, t) for g, t in targets}}}
  params['layers']['mlp'] = {'up_proj': factors('mlp', 'up_proj')}
  if loaded.config.head == 'classifier':
    params['classifier'] = jax.tree.map(
      lambda w: jnp.zeros((2, *w.shape)), loaded.base['classifier']
    )
  tokens = rng.integers(3, 97, (2, 1, 12)).astype(np.int32)
  places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  segments = np.broadcast_to(np.repeat([1, 0], [9, 3]), tokens.shape)
  batch = Batch(tokens, segments > 0, segments, places)

  def loss(params, batch):
    hidden = loaded.model.hidden(loaded.base, params, batch)
    logits = loaded.model.logits(loaded.base, params, hidden)
    nll = -jax.nn.log_softmax(logits)[..., 1]
    return jnp.sum(nll * batch.loss_mask)

  gradient = jax.jit(jax.vmap(jax.grad(loss)))(params, batch)
  for path, leaf in jax.tree.leaves_with_path(gradient):
    assert jnp.isfinite(leaf).all(), path
    assert (jnp.abs(leaf).max(range(1, leaf.ndim)) > 1e-6).all(), path


@pytest.mark.parametrize('name', ['gemma3', 'smollm3', 'gpt2'])
def test_text_read_in_two_parts_equals_text_read_at_once(name):
  loaded, outputs = golden(name)
  tokens = np.random.default_rng(0).integers(3, 97, (2, LENGTH))
  batch = texts(tokens, [LENGTH, LENGTH])
  half = [
    jax.tree.map(lambda x, i=i: np.split(x, 2, axis=1)[i], batch)
    for i in (0, 1)
  ]

  @jax.jit
  def read(batch, cache, slot):
    hidden, cache = loaded.decoder.extend(loaded.base, {}, batch, cache, slot)
    return loaded.model.logits(loaded.base, {}, hidden), cache

  first, cache = read(half[0], loaded.decoder.empty(2, LENGTH), 0)
  second, _ = read(half[1], cache, LENGTH // 2)
  found = np.concatenate([first, second], axis=1)
  np.testing.assert_allclose(found, outputs(batch), atol=1e-4)


# ------------------------------------------------------------------- files --


@pytest.mark.parametrize('name', NAMES)
def test_a_config_survives_the_way_out_and_back(tmp_path, name):
  (tmp_path / 'config.json').write_text(
    json.dumps(families.to_hf(CONFIGS[name]))
  )
  assert families.read_config(tmp_path) == CONFIGS[name]


@pytest.mark.parametrize('name', NAMES)
def test_what_is_written_is_what_transformers_wrote(tmp_path, name):
  loaded = load.pretrained(GOLDEN / name, dtype='bfloat16')
  load.save(tmp_path, loaded.config, loaded.base)
  found, wanted = (
    safetensors.numpy.load_file(directory / 'model.safetensors')
    for directory in (tmp_path, GOLDEN / name)
  )
  # A pooler that transformers makes for a bare body, and that nothing reads.
  wanted = {
    key: value
    for key, value in wanted.items()
    if not families.says_nothing(key, loaded.config) or key in found
  }
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize('name', NAMES)
def test_module_names_go_both_ways(name):
  config = CONFIGS[name]
  for module in families.modules(config):
    layer = 1 if module.path[0] == 'layers' else None
    fused = families.fused_rows(config, module.path)
    if fused is not None:
      with pytest.raises(Error, match='only a part'):
        families.hf_module_name(module.path, layer, config)
    theirs = families.hf_module_name(module.path, layer, config, part=True)
    paths, where = families.our_paths(theirs, config)
    assert module.path in paths and where == layer
    if len(paths) == 1:
      assert families.our_path(theirs, config) == (module.path, layer)
    assert (fused is not None) == (len(paths) > 1)
  with pytest.raises(Error, match='x_proj'):
    families.hf_module_name('layers/x_proj', 0, config)
  with pytest.raises(Error, match='layers'):
    families.our_path('layers.x', config)


def test_rows_of_fused_modules_are_a_partition():
  for name in ('gpt2', 'phi3', 'gpt_neox'):
    config = CONFIGS[name]
    paths = [('layers', 'self_attn', f'{x}_proj') for x in 'qkv']
    parts = [families.fused_rows(config, path) or ([], 0) for path in paths]
    rows = np.concatenate([rows for rows, _ in parts])
    assert {total for _, total in parts} == {len(rows)}
    assert sorted(rows) == list(range(len(rows)))


def test_a_network_that_its_family_cannot_say_is_not_written():
  config = CONFIGS['llama']._replace(qkv_bias=True)
  with pytest.raises(Error, match=r'llama config\.json cannot say'):
    families.to_hf(config)


# ---------------------------------------------------------- other spellings --


def copy(tmp_path, name, weights=None, **changes):
  """A golden model with another config.json, and its tensors renamed."""
  directory = tmp_path / name
  shutil.copytree(GOLDEN / name, directory)
  file = directory / 'config.json'
  values = json.loads(file.read_text())
  values.update(changes)
  file.write_text(json.dumps(values))
  if weights is not None:
    file = directory / 'model.safetensors'
    tensors = safetensors.numpy.load_file(file)
    tensors = {weights(key): value for key, value in tensors.items()}
    safetensors.numpy.save_file(tensors, file)
  return directory


@pytest.mark.parametrize(
  'name, rename',
  [
    ('gpt2', lambda key: key.removeprefix('transformer.')),
    (
      'bert_masked_lm',
      lambda key: key.replace('LayerNorm.weight', 'LayerNorm.gamma'),
    ),
    ('minilm', lambda key: f'bert.{key}'),
    ('gpt_neox', lambda key: key.replace('embed_out', 'lm_head')),
  ],
)
def test_tensors_are_found_under_their_other_names(tmp_path, name, rename):
  loaded, _ = golden(name)
  again = load.pretrained(copy(tmp_path, name, rename))
  jax.tree.map(np.testing.assert_array_equal, again.base, loaded.base)


def test_a_new_classifier_is_drawn_by_its_seed_and_keeps_the_body():
  labels = ['business', 'sport', 'world']
  body, _ = golden('minilm')
  one, same, other = (
    load.pretrained(GOLDEN / 'minilm', labels=labels, seed=seed)
    for seed in (0, 0, 1)
  )
  assert one.config.labels == tuple(labels)
  kernel = one.base['classifier']['kernel']
  assert kernel.shape == (32, 3) and 0.005 < np.std(kernel) < 0.05
  assert (one.base['classifier']['bias'] == 0).all()
  jax.tree.map(np.testing.assert_array_equal, one.base, same.base)
  assert (kernel != other.base['classifier']['kernel']).any()
  jax.tree.map(
    np.testing.assert_array_equal, one.base['layers'], body.base['layers']
  )
  # The pooler of the checkpoint serves; that of a masked LM has to be drawn.
  file = GOLDEN / 'minilm' / 'model.safetensors'
  stored = safetensors.numpy.load_file(file)['pooler.dense.weight']
  np.testing.assert_array_equal(one.base['pooler']['kernel'], stored.T)
  loaded = load.pretrained(GOLDEN / 'distilbert_masked_lm', labels=labels)
  assert loaded.base['pooler']['kernel'].shape == (32, 32)


def test_changes_of_a_classifier_reach_kernel_and_bias():
  loaded, outputs = golden('bert_classifier')
  batch = texts(np.arange(3, 51).reshape(2, LENGTH), [LENGTH, 9])
  hidden = loaded.model.hidden(loaded.base, {}, batch)
  rng = np.random.default_rng(0)
  change = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32),
    {name: loaded.base[name] for name in ('pooler', 'classifier')},
  )
  merged = {**loaded.base, **jax.tree.map(
    jnp.add, {name: loaded.base[name] for name in change}, change
  )}  # fmt: skip
  wanted = loaded.model.logits(merged, {}, hidden)
  found = loaded.model.logits(loaded.base, change, hidden)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert np.abs(wanted - outputs(batch)).max() > 0.1
  with pytest.raises(Error, match='classifier/bias'):
    loaded.model.hidden(
      loaded.base, {'classifier': {'bias': np.zeros(5)}}, batch
    )


# ---------------------------------------------------------------- refusals --


@pytest.mark.parametrize(
  'name, changes, words',
  [
    ('gemma', {'use_bidirectional_attention': True}, 'use_bidirectional'),
    ('gemma3', {'attn_logit_softcapping': 5.0}, 'attn_logit_softcapping=5.0'),
    ('gemma2', {'layer_types': ['full_attention']}, 'layer_types'),
    ('smollm3', {'no_rope_layers': [1, 0]}, 'no_rope_layers'),
    ('phi', {'qk_layernorm': True}, 'qk_layernorm=True'),
    (
      'phi',
      {'partial_rotary_factor': 0.4, 'rope_parameters': None},
      '3 rotate',
    ),
    ('phi3', {'hidden_act': 'mish'}, "hidden_act='mish'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer_idx'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention'),
    ('gpt2', {'activation_function': 'mish'}, "activation_function='mish'"),
    ('opt', {'do_layer_norm_before': False}, 'do_layer_norm_before'),
    ('opt', {'word_embed_proj_dim': 16}, 'word_embed_proj_dim=16'),
    ('bert_masked_lm', {'is_decoder': True}, 'is_decoder'),
    (
      'bert_masked_lm',
      {'position_embedding_type': 'relative_key'},
      'position_embedding_type',
    ),
    ('distilbert_masked_lm', {'sinusoidal_pos_embds': True}, 'sinusoidal'),
    (
      'bert_masked_lm',
      {'architectures': ['BertForTokenClassification']},
      'BertForTokenClassification',
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(
  tmp_path, name, changes, words
):
  with pytest.raises(Error, match=words) as caught:
    families.read_config(copy(tmp_path, name, **changes))
  assert 'config.json' in str(caught.value)


@pytest.mark.parametrize(
  'name, bound', [('llama_dynamic', 64), ('phi3_longrope', 32)]
)
def test_texts_that_would_change_the_rotation_are_refused(name, bound):
  loaded, _ = golden(name)
  ones = np.ones((1, bound + 1), np.int32)
  with pytest.raises(Error, match=f'longer than the {bound}'):
    loaded.model.hidden(loaded.base, {}, Batch(ones, ones > 0, ones, ones))
  with pytest.raises(Error, match=f'{bound} positions'):
    generate_text(loaded, loaded.base, {}, [[5] * bound], max_new_tokens=1)


def test_a_place_beyond_the_learned_ones_is_never_computed_wrongly():
  _, outputs = golden('gpt2')
  batch = texts(np.full((2, LENGTH), 5), [LENGTH, LENGTH])
  far = outputs(batch._replace(positions=batch.positions + 12))
  assert np.isnan(far[:, -1]).all()


def test_encoders_write_no_text_and_bodies_have_no_logits():
  loaded, _ = golden('bert_masked_lm')
  with pytest.raises(Error, match='encoder'):
    generate_text(loaded, loaded.base, {}, [[5]], max_new_tokens=1)
  loaded, _ = golden('minilm')
  with pytest.raises(Error, match='no head'):
    loaded.model.logits(loaded.base, {}, jnp.zeros([1, 32]))
  with pytest.raises(Error, match='classifier'):
    load.pretrained(GOLDEN / 'vaultgemma', labels=['a', 'b'])
  with pytest.raises(Error, match='labels'):
    load.pretrained(GOLDEN / 'minilm', labels=['a', 'a'])
  with pytest.raises(Error, match=r'classifier.*has shape \[3'):
    load.pretrained(GOLDEN / 'bert_classifier', labels=['a', 'b'])


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
  yarn = Rope('yarn', 1e4, factor=4.0, original_max_positions=4096)
  ratio = rope.rope_frequencies(yarn, 128) / rope.rope_frequencies(Rope(), 128)
  turns = 4096 * 1e4 ** -(np.arange(64) / 64) / (2 * np.pi)
  np.testing.assert_allclose(ratio[turns > 34], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[turns < 0.9], 1 / 4, rtol=1e-6)
  assert (np.diff(ratio) <= 1e-7).all()
