"""PEFT directories of others: layers, embeddings beside, damaged values."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import models, rebuild
from fedjax_llm.adapters import peft
from fedjax_llm.types import Error

GOLDEN = pathlib.Path(__file__).parent / 'golden'
Q = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight'
EMBEDDING = 'base_model.model.model.embed_tokens.weight'


@pytest.fixture(scope='module')
def loaded():
  return models.pretrained(GOLDEN / 'models' / 'llama')


@pytest.fixture(scope='module')
def tied():
  return models.pretrained(GOLDEN / 'models' / 'llama3_tied')


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(GOLDEN / 'adapters' / 'lora', tmp_path / 'adapter')


def edit(folder, change=None, **fields):
  config = json.loads((folder / peft.CONFIG).read_text())
  config.update(fields)
  (folder / peft.CONFIG).write_text(json.dumps(config))
  if change is not None:
    tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)


def drop(tensors, layer=1):
  for name in [n for n in tensors if f'.layers.{layer}.' in n]:
    del tensors[name]


# ------------------------------------------------------------------ layers --


@pytest.mark.parametrize(
  'fields',
  [
    {'layers_to_transform': [0]},
    {'layers_to_transform': 0},
    {'target_modules': r'.*layers\.0\..*_proj'},
    {'target_modules': ['layers.0.self_attn.q_proj']},
    {'exclude_modules': r'.*\.1\..*'},
  ],
)
def test_layers_that_are_left_out_compute_as_the_base(folder, loaded, fields):
  whole = rebuild.load_adapter(folder, loaded)
  edit(folder, drop, **fields)
  some = rebuild.load_adapter(folder, loaded)
  for name, node in whole['layers']['self_attn'].items():
    part = some['layers']['self_attn'][name]
    np.testing.assert_array_equal(part.a[0], node.a[0])
    np.testing.assert_array_equal(part.b[0], node.b[0])
    assert not jnp.any(part.a[1]) and not jnp.any(part.b[1])
    assert part.a.shape == node.a.shape and jnp.isfinite(part.scale).all()


@pytest.mark.parametrize(
  ('layer', 'fields', 'message'),
  [
    (1, {}, r'no adapter in the layers \[1\]; every one of the 2 layers'),
    (0, {}, r'no adapter in the layers \[0\]'),
    (
      1,
      {'layers_to_transform': [0, 1]},
      r'in the layers \[0\], but layers_to_transform is \[0, 1\]',
    ),
    (None, {'layers_to_transform': [0]}, r'layers \[0, 1\], but layers_to_tr'),
    (1, {'layers_to_transform': [-1]}, 'must be an integer of at least 0'),
  ],
)
def test_layers_that_nothing_leaves_out_are_missed(
  folder, loaded, layer, fields, message
):
  edit(folder, lambda t: layer is not None and drop(t, layer), **fields)
  with pytest.raises(Error, match=message):
    rebuild.load_adapter(folder, loaded)


def test_a_magnitude_in_some_layers_is_refused(loaded, tmp_path):
  dora = shutil.copytree(GOLDEN / 'adapters' / 'dora', tmp_path / 'dora')
  edit(dora, drop, layers_to_transform=[0])
  with pytest.raises(Error, match='a DoRA of some layers only is not'):
    rebuild.load_adapter(dora, loaded)


# -------------------------------------------------------------- embeddings --


def test_an_embedding_that_is_trained_whole_is_refused_where_it_is_tied(
  folder, loaded, tied
):
  def add(tensors):
    shape = tied.base['embed_tokens']['embedding'].shape
    tensors[EMBEDDING] = np.ones(shape, np.float32)

  edit(folder, add, modules_to_save=['embed_tokens'])
  with pytest.raises(
    Error, match=r'saves the embedding whole .*tie_word_embed'
  ):
    rebuild.load_adapter(folder, tied)


def test_an_adapter_of_an_untied_head_comes_with_copies_of_the_base(
  folder, loaded
):
  """PEFT writes embedding and head beside an adapter that touches one."""
  rng = np.random.default_rng(0)
  head = np.asarray(loaded.base['lm_head']['kernel'], np.float32)  # [D, V]
  a = rng.normal(size=(4, head.shape[0])).astype(np.float32)
  b = rng.normal(size=(head.shape[1], 4)).astype(np.float32)
  embedding = np.asarray(loaded.base['embed_tokens']['embedding'])

  def add(tensors):
    prefix = 'base_model.model.lm_head'
    tensors[f'{prefix}.lora_A.weight'] = a
    tensors[f'{prefix}.lora_B.weight'] = b
    kernel = np.ascontiguousarray(head.T)
    tensors[f'{prefix}.base_layer.weight'] = kernel.astype(embedding.dtype)
    tensors[EMBEDDING] = embedding

  edit(folder, add, target_modules=['q_proj', 'v_proj', 'lm_head'])
  params = rebuild.load_adapter(folder, loaded)
  node = params['lm_head']
  np.testing.assert_array_equal(node.a, a.T)
  np.testing.assert_array_equal(node.b, b.T)
  assert sorted(params) == ['layers', 'lm_head']
  edit(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING] + 1}))
  with pytest.raises(Error, match='beside the adapter differs from'):
    rebuild.load_adapter(folder, loaded)


# ------------------------------------------------------------------ values --


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'r': 0}, 'r is 0, but must be an integer from 1'),
    ({'r': 4.0}, 'r is 4.0, but must be an integer from 1'),
    ({'r': True}, 'r is True, but must be an integer from 1'),
    ({'r': 10**30}, 'r is 10*, but must be an integer from 1'),
    ({'lora_alpha': 'x'}, "lora_alpha is 'x', but must be a finite number"),
    ({'lora_alpha': float('nan')}, 'lora_alpha is nan, but must be a finite'),
    ({'lora_alpha': 10**400}, 'lora_alpha is .*, but must be a finite'),
    (
      {'lora_dropout': 2},
      'lora_dropout is 2, but must be a finite number from',
    ),
    ({'rank_pattern': {'q_proj': 'x'}}, "rank_pattern is .*'x'.*, but must be"),
    ({'rank_pattern': [1]}, 'rank_pattern is .1., but must be an object'),
    (
      {'alpha_pattern': {'q': float('inf')}},
      'alpha_pattern is .*, but must be',
    ),
    (
      {'modules_to_save': 'lm_head'},
      "modules_to_save is 'lm_head', but must be",
    ),
    ({'use_rslora': 'no'}, "use_rslora is 'no', but must be true or false"),
    ({'target_modules': 3}, 'target_modules is 3, but must be a string'),
    ({'init_lora_weights': []}, 'init_lora_weights is .., which changes'),
    ({'peft_type': []}, r"peft_type is \[\]; supported is 'LORA'"),
    (
      {'rank_pattern': {'(': 4}},
      r"rank_pattern: '\(' is no regular expression",
    ),
  ],
)
def test_a_value_that_no_adapter_has_is_named(folder, loaded, fields, message):
  edit(folder, **fields)
  with pytest.raises(Error, match=message):
    rebuild.load_adapter(folder, loaded)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_values_of_an_adapter_are_finite(folder, loaded, value, dtype):
  def spoil(tensors):
    tensor = tensors[Q.format(1, 'B')].astype(dtype)
    tensor.flat[3] = value
    tensors[Q.format(1, 'B')] = tensor

  edit(folder, spoil)
  with pytest.raises(Error, match=r'1\.self_attn\.q_proj.* not finite'):
    rebuild.load_adapter(folder, loaded)


def test_whole_numbers_are_no_factors(folder, loaded):
  edit(folder, lambda t: t.update({Q.format(0, 'A'): np.ones((4, 32), int)}))
  with pytest.raises(Error, match='is stored as int64'):
    rebuild.load_adapter(folder, loaded)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'phi3'])
def test_values_of_a_base_are_finite(tmp_path, name, value):
  folder = shutil.copytree(GOLDEN / 'models' / name, tmp_path / 'm')
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  spoiled = sorted(tensors)[len(tensors) // 2]
  tensor = tensors[spoiled].copy()
  tensor.flat[-1] = value
  file.unlink()
  safetensors.numpy.save_file({**tensors, spoiled: tensor}, file)
  with pytest.raises(
    Error, match=rf'model\.safetensors: {spoiled} holds values'
  ):
    models.pretrained(folder)


def test_a_base_that_its_dtype_cannot_hold_is_refused(tmp_path):
  folder = shutil.copytree(GOLDEN / 'models' / 'gpt2', tmp_path / 'm')
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  name = min(n for n in tensors if tensors[n].ndim == 2)
  big = tensors[name].astype(np.float32)
  big.flat[0] = 1e30
  file.unlink()
  safetensors.numpy.save_file({**tensors, name: big}, file)
  assert jax.tree.leaves(models.pretrained(folder).base)
  with pytest.raises(Error, match='not finite'):
    models.pretrained(folder, dtype='float16')
