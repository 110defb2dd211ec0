"""Networks of images and dual encoders compute what torch computes.

The golden models are tiny and random (`golden/make_images.py`); a program is
compiled once a model.
"""

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from references_peft import loading, random_adapter, saving

from fedjax_llm import adapters, models
from fedjax_llm.adapters import peft
from fedjax_llm.adapters.peft.directory import nodes_of
from fedjax_llm.models import families
from fedjax_llm.models.network import vision
from fedjax_llm.nodes import Prompt
from fedjax_llm.run import builders, sections, texts
from fedjax_llm.types import Error, Images

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'images'
NAMES = sorted(p.name for p in GOLDEN.iterdir())
DUAL = [name for name in NAMES if name.startswith('clip')]
ALONE = [name for name in NAMES if name not in DUAL]


@functools.cache
def golden(name) -> tuple[Any, dict[str, Any]]:
  return models.pretrained(GOLDEN / name), dict(
    np.load(GOLDEN / name / 'outputs.npz')
  )


def pictures(pixels) -> Any:
  count = np.ones(len(pixels), np.int32)
  return Images(pixels, count, count > 0)


def close(found, wanted, atol=1e-5):
  scale = np.abs(wanted).max()
  assert scale > 0.3  # the weights were not so small that all is near zero
  np.testing.assert_allclose(found, wanted, atol=atol * scale)


@pytest.mark.parametrize('name', ALONE)
def test_networks_of_images_equal_torch(name):
  loaded, data = golden(name)

  @jax.jit
  def run(base, pixels):
    hidden = loaded.model.hidden(base, {}, pictures(pixels))
    if loaded.config.head == 'none':
      return hidden
    return loaded.model.logits(base, {}, hidden)

  found = run(loaded.base, data['pixels'])
  close(found, data['logits'] if 'logits' in data else data['states'][:, 0])
  floats = data['pixels'].astype(np.float32) / 255
  np.testing.assert_allclose(run(loaded.base, floats), found, atol=1e-5)


def test_positions_are_interpolated_as_by_torch():
  loaded, data = golden('dinov2')
  see = jax.jit(vision.states(loaded.config))
  close(see(loaded.base, {}, data['pixels'])[0], data['states'])
  close(see(loaded.base, {}, data['wide'])[0], data['wide_states'])


@functools.cache
def towers(name):
  loaded, _ = golden(name)
  assert loaded.dual is not None
  return jax.jit(loaded.dual.text), jax.jit(loaded.dual.image)


@pytest.mark.parametrize('name', DUAL)
def test_dual_encoders_equal_torch(name):
  loaded, data = golden(name)
  text, image = towers(name)
  words = text(loaded.base, {}, data['tokens'])
  whole, local = image(loaded.base, {}, data['pixels'])
  close(words, data['text'])
  close(np.concatenate([whole[:, None], local], axis=1), data['states'])
  scale = loaded.dual.scale(loaded.base, {})
  found = scale * models.dual.cosine(whole, words)
  np.testing.assert_allclose(found, data['logits'], atol=1e-4)


def test_embedded_texts_equal_their_tokens():
  """Leading axes, and the place of the end as an argument."""
  loaded, data = golden('clip')
  tokens, text = data['tokens'], towers('clip')[0]
  embedded = loaded.dual.embed(loaded.base, {}, tokens)
  ends = np.argmax(tokens == 96, axis=1)
  found = text(loaded.base, {}, embedded=embedded[:, None], ends=ends[:, None])
  np.testing.assert_allclose(found[:, 0], data['text'], atol=1e-5)
  other = embedded.at[:, ends.max() + 1 :].set(7.0)  # behind every end
  found = text(loaded.base, {}, embedded=other[:, None], ends=ends[:, None])
  np.testing.assert_allclose(found[:, 0], data['text'], atol=1e-5)


def projections(file, **changed):
  rng = np.random.default_rng(3)
  arrays = {
    'text_kernel': rng.normal(size=(32, 5)),
    'text_bias': rng.normal(size=5),
    'image_kernel': rng.normal(size=(64, 5)),
    'image_bias': rng.normal(size=5),
    'logit_scale': np.float64(0.5),
  }
  np.savez(file, **{**arrays, **changed})
  return arrays


def test_joined_encoders_are_their_states_and_two_projections(tmp_path):
  """MPNet and DINOv2, against the states that torch computed."""
  texts = GOLDEN.parent / 'models' / 'mpnet'
  arrays = projections(tmp_path / 'x.npz')
  loaded = models.joined(texts, GOLDEN / 'dinov2', tmp_path / 'x.npz')
  assert loaded.dual is not None
  words, seen = np.load(texts / 'logits.npz'), golden('dinov2')[1]
  lengths = words['lengths']
  text = jax.jit(loaded.dual.text)
  found = text(loaded.base, {}, words['tokens'], ends=lengths - 1)
  mean = words['logits'].sum(1) / lengths[:, None]  # zeros behind the ends
  want = mean @ arrays['text_kernel'] + arrays['text_bias']
  close(found, want)
  embedded = loaded.dual.embed(loaded.base, {}, words['tokens'])
  found = text(loaded.base, {}, embedded=embedded, ends=lengths - 1)
  close(found, want)
  whole, local = jax.jit(loaded.dual.image)(loaded.base, {}, seen['pixels'])
  first, patches = seen['states'][:, 0], seen['states'][:, 1:]
  both = np.concatenate([first, patches.mean(1)], axis=-1)
  close(whole, both @ arrays['image_kernel'] + arrays['image_bias'])
  np.testing.assert_allclose(local.mean(1), whole, atol=1e-4)
  for name, shape in (('text_bias', 4), ('image_kernel', (32, 5))):
    projections(tmp_path / 'y.npz', **{name: np.zeros(shape)})
    with pytest.raises(Error, match=f'y.npz has {name} '):
      models.joined(texts, GOLDEN / 'dinov2', tmp_path / 'y.npz')
  with pytest.raises(Error, match=r'model.image: .*mpnet is no network of im'):
    models.joined(texts, texts, tmp_path / 'x.npz')


# ----------------------------------------------------------------- prompts --


def numpy_states(loaded, pixels, front, deep):
  """The image tower of CLIP with visual prompts, in NumPy float64."""
  c = loaded.config.vision
  base = jax.tree.map(lambda w: np.asarray(w, np.float64), loaded.base)[
    'vision'
  ]
  mean, std = np.float64(c.image.mean), np.float64(c.image.std)

  def norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
    return x * w['scale'] + w['bias']

  x = (pixels / 255 - mean) / std  # [H, W, C]
  side = c.image.patch
  rows = [
    x[i : i + side, j : j + side].transpose(2, 0, 1).ravel()
    for i in range(0, x.shape[0], side)
    for j in range(0, x.shape[1], side)
  ]
  rows = np.stack(rows) @ base['embed_patches']['kernel']
  x = np.concatenate([base['embed_class']['embedding'], rows])
  x = np.concatenate([front, x + base['embed_positions']['embedding']])
  x = norm(x, base['embed_norm'])
  for layer in range(c.num_layers):
    w = jax.tree.map(lambda leaf, i=layer: leaf[i], base['layers'])
    if layer:
      x = np.concatenate([deep[layer - 1], x[len(front) :]])
    y = norm(x, w['input_layernorm'])
    project = lambda y, name, w=w: (
      y @ w['self_attn'][name]['kernel'] + w['self_attn'][name]['bias']
    )
    heads = lambda name, y=y, project=project: np.stack(
      np.split(project(y, name), c.num_heads, axis=-1)
    )
    q, k, v = heads('q_proj'), heads('k_proj'), heads('v_proj')
    scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(c.head_dim))
    y = scores / scores.sum(-1, keepdims=True) @ v
    x = x + project(np.concatenate(list(y), axis=-1), 'o_proj')
    y = norm(x, w['post_attention_layernorm'])
    y = y @ w['mlp']['up_proj']['kernel'] + w['mlp']['up_proj']['bias']
    y = y / (1 + np.exp(-1.702 * y))
    x = x + y @ w['mlp']['down_proj']['kernel'] + w['mlp']['down_proj']['bias']
  return norm(x, base['norm'])[len(front) :] @ (
    np.asarray(loaded.base['visual_projection']['kernel'], np.float64)
  )


def test_visual_prompts_equal_their_reference():
  """VPT at the input and in every layer, as arguments and as a node."""
  loaded, data = golden('clip')
  image, rng = towers('clip')[1], np.random.default_rng(0)
  front, deep = rng.normal(size=(2, 32)), rng.normal(size=(2, 2, 32))
  want = np.stack(
    [numpy_states(loaded, p, front, deep) for p in data['pixels']]
  )
  take = lambda pair: np.concatenate([pair[0][:, None], pair[1]], axis=1)
  found = image(loaded.base, {}, data['pixels'], prompts=front, deep=deep)
  close(take(found), want, atol=2e-5)
  plain = image(loaded.base, {}, data['pixels'], prompts=front)
  assert np.abs(take(plain) - want).max() > 0.01
  params = {'vision': {'inputs': Prompt(jnp.asarray(front, jnp.float32))}}
  found = image(loaded.base, params, data['pixels'])
  np.testing.assert_allclose(take(found), take(plain), atol=1e-5)


# ---------------------------------------------------------------- adapters --


def moved(adapter):
  """Parameters of an adapter away from their start."""
  loaded, _ = golden('clip')
  params = adapter.init(jax.random.key(0), loaded.base)
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  noise = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  return jax.tree.unflatten(structure, noise)


ADAPTERS = {
  'lora': lambda: adapters.lora(
    rank=2, targets=['vision/.*/(q|v)_proj', 'text/.*/up_proj', '.*_projection']
  ),
  'bitfit': adapters.bitfit,
  'bottleneck': lambda: adapters.within(
    adapters.bottleneck(2), 'text', 'vision'
  ),
  'prefix': lambda: adapters.within(adapters.prefix(2), 'text', 'vision'),
  'soft_prompt': lambda: adapters.within(
    adapters.soft_prompt(2), 'text', 'vision'
  ),
}


@pytest.mark.parametrize('name', ADAPTERS)
def test_adapters_act_on_both_towers(name):
  loaded, data = golden('clip')
  adapter = ADAPTERS[name]()
  params = moved(adapter)
  text, image = towers('clip')
  words = text(loaded.base, params, data['tokens'])
  whole, _ = image(loaded.base, params, data['pixels'])
  assert np.abs(words - data['text']).max() > 1e-3
  assert np.abs(whole - data['states'][:, 0]).max() > 1e-3
  if name in ('lora', 'bitfit'):
    merged = adapter.merge(loaded.base, params)
    again = text(merged, {}, data['tokens'])
    np.testing.assert_allclose(again, words, atol=1e-4)
    again, _ = image(merged, {}, data['pixels'])
    np.testing.assert_allclose(again, whole, atol=1e-4)


def test_a_config_puts_an_adapter_into_a_tower():
  section = {
    'name': 'within',
    'of': {'name': 'soft_prompt', 'length': 3},
    'towers': ('text',),
  }
  adapter = builders.build(section, sections.SPEC.sections['adapter'])
  base, key = golden('clip')[0].base, jax.random.key(0)
  want = adapters.within(adapters.soft_prompt(3), 'text').init(key, base)
  jax.tree.map(np.testing.assert_array_equal, adapter.init(key, base), want)
  assert set(want) == {'text'}
  with pytest.raises(Error, match="the model has no tower 'text'"):
    adapter.init(key, golden('vit')[0].base)


@pytest.mark.parametrize('name', ['vit', 'dinov2'])
def test_lora_of_a_network_of_images_goes_to_peft_and_back(tmp_path, name):
  (loaded, data), config = golden(name), families.read_config(GOLDEN / name)
  params, adapter = random_adapter(config), tmp_path / 'adapter'
  peft.save(adapter, params, base_model=name, **saving(config))
  again = peft.load(adapter, template=params, **loading(config))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  # The file's factors, in torch's layout, added to torch's weights.
  factors = safetensors.numpy.load_file(adapter / 'adapter_model.safetensors')
  theirs = safetensors.numpy.load_file(GOLDEN / name / 'model.safetensors')
  for path, node in nodes_of(params):
    for layer in range(len(node.a)):
      module = families.hf_module_name(path, layer, config, part=True)
      a, b = (
        np.float64(factors.pop(f'base_model.model.{module}.lora_{x}.weight'))
        for x in 'AB'
      )
      change = float(node.scale[layer]) * np.matmul(b, a)
      theirs[f'{module}.weight'] = np.asarray(
        theirs[f'{module}.weight'] + change, np.float32
      )
  assert not factors  # every tensor of the file is of a module that torch has
  shutil.copytree(GOLDEN / name, tmp_path / 'model')
  safetensors.numpy.save_file(theirs, tmp_path / 'model/model.safetensors')
  changed = models.pretrained(tmp_path / 'model').base
  run = jax.jit(lambda base, params: loaded.model.hidden(
    base, params, pictures(data['pixels'])))  # fmt: skip
  ours, plain = run(loaded.base, again), run(loaded.base, {})
  close(ours, run(changed, {}), atol=1e-4)
  assert np.abs(ours - plain).max() > 0.02 * np.abs(plain).max()


def test_gates_leave_layers_of_a_tower_out():
  loaded, data = golden('clip')
  image = towers('clip')[1]
  lora = moved(adapters.lora(rank=2, targets=['vision/.*/q_proj']))
  gated = {'vision': adapters.gates.added(lora['vision'])}
  np.testing.assert_allclose(
    image(loaded.base, gated, data['pixels'])[0],
    image(loaded.base, lora, data['pixels'])[0],
  )
  gated['vision']['layers']['gate'] = jnp.zeros(3)
  found, _ = image(loaded.base, gated, data['pixels'])
  base = dict(loaded.base, vision=dict(loaded.base['vision']))
  off = lambda w: jax.tree.map(jnp.zeros_like, w)
  below = dict(base['vision']['layers'])
  below['self_attn'] = dict(below['self_attn'])
  below['mlp'] = dict(below['mlp'])
  below['self_attn']['o_proj'] = off(below['self_attn']['o_proj'])
  below['mlp']['down_proj'] = off(below['mlp']['down_proj'])
  base['vision']['layers'] = below
  want, _ = image(base, {}, data['pixels'])
  np.testing.assert_allclose(found, want, atol=1e-5)


# ------------------------------------------------------------------- files --


@pytest.mark.parametrize('name', NAMES)
def test_what_is_written_is_what_transformers_wrote(tmp_path, name):
  loaded = models.pretrained(GOLDEN / name, dtype='bfloat16')
  models.save(tmp_path, loaded.config, loaded.base)
  assert families.read_config(tmp_path) == loaded.config
  found, wanted = (
    safetensors.numpy.load_file(directory / 'model.safetensors')
    for directory in (tmp_path, GOLDEN / name)
  )
  wanted = {
    key: value
    for key, value in wanted.items()
    if not families.says_nothing(key, loaded.config)
  }
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    assert found[key].shape == value.shape, key
    np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_network_of_images_alone_needs_no_tokenizer():
  assert texts.tokenizer_of(golden('vit')[0]).name == 'bytes'
  with pytest.raises(Error, match='no tokenizer in this directory'):
    texts.tokenizer_of(golden('clip')[0])  # its text tower reads words


def test_golden_models_cover_the_families_of_images():
  named = {families.read_config(GOLDEN / name).family for name in NAMES}
  assert named == {'vit', 'dinov2', 'clip'}


def test_every_module_has_a_name_that_leads_back():
  for name in NAMES:
    config = families.read_config(GOLDEN / name)
    for tensor in families.tensors(config):
      module = tensor.path[:-1]
      theirs = families.hf_module_name(module, tensor.layer, config)
      assert families.our_path(theirs, config) == (module, tensor.layer)


def test_mean_and_std_are_those_of_the_preprocessor(tmp_path):
  shutil.copytree(GOLDEN / 'vit', tmp_path, dirs_exist_ok=True)
  file = tmp_path / 'preprocessor_config.json'
  values = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [1, 2, 4]}
  file.write_text(json.dumps(values))
  image = families.read_config(tmp_path).image
  assert image is not None
  assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
  file.write_text(json.dumps({**values, 'do_normalize': False}))
  image = families.read_config(tmp_path).image
  assert image is not None
  assert (image.mean, image.std) == ((0.0,) * 3, (1.0,) * 3)
  for key, value, message in (
    (
      'image_mean',
      [0.5],
      'image_mean is [0.5]; it must be a list of 3',
    ),
    ('image_std', [1, 0, 1], 'image_std is [1, 0, 1]; it must be above 0'),
    ('do_rescale', False, 'do_rescale is False and rescale_factor is 0.003921'),
    ('rescale_factor', 1, 'rescale_factor is 1; pixels are divided by 255'),
  ):
    file.write_text(json.dumps({**values, key: value}))
    with pytest.raises(Error) as caught:
      families.read_config(tmp_path)
    assert message in str(caught.value)
