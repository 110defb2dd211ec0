"""Adapters as PEFT directories, out and in."""

import json
import os
import pathlib
import re
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import adapters, models
from fedjax_llm.adapters import peft
from fedjax_llm.models import families
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Error

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = ('lora', 'rslora', 'patterns', 'dora')
PREFIX = 'base_model.model.model.layers.'


@pytest.fixture(scope='module')
def loaded():
  return models.pretrained(GOLDEN / 'models' / 'llama')


@pytest.fixture(scope='module')
def names(loaded):
  """The two ways of naming, as keyword arguments of `save` and of `load`."""
  config = loaded.config
  return (
    dict(module_name=lambda p, i: families.hf_module_name(p, i, config)),
    dict(path_of=lambda name: families.our_path(name, config)),
  )


def tensors_of(directory):
  return safetensors.numpy.load_file(directory / peft.WEIGHTS)


def config_of(directory):
  return json.loads((directory / peft.CONFIG).read_text())


def change(directory, **fields):
  config = {**config_of(directory), **fields}
  (directory / peft.CONFIG).write_text(json.dumps(config))


def assert_equal(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def random_adapter(seed=0, scale=(2.0, 2.0), ranks=(3, 3), residual=None):
  """Two layers, q (6 -> 6) and down (8 -> 6), with random factors."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  node = lambda d, f, r: LowRank(
    draw(2, d, r), draw(2, r, f), np.float32(scale), residual
  )
  return {
    'layers': {
      'self_attn': {'q_proj': node(6, 6, ranks[0])},
      'mlp': {'down_proj': node(8, 6, ranks[1])},
    }
  }


@pytest.fixture(scope='module')
def logits(loaded):
  """(base, params, tokens [B, T]) -> [B, T, V]."""

  @jax.jit
  def run(base, params, tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, ones > 0, ones, positions)
    hidden = loaded.model.hidden(base, params, batch)
    return loaded.model.logits(base, params, hidden)

  return lambda base, params, tokens: np.asarray(
    run(base, params, jnp.asarray(tokens, jnp.int32))
  )


@pytest.mark.parametrize('name', NAMES)
def test_the_adapter_of_peft_gives_the_logits_of_peft(
  loaded, names, logits, name
):
  _, load = names
  params = peft.load(GOLDEN / 'adapters' / name, **load)
  golden = np.load(GOLDEN / 'adapters' / name / 'logits.npz')
  found = logits(loaded.base, params, golden['tokens'])
  np.testing.assert_allclose(found, golden['logits'], rtol=0, atol=1e-4)
  plain = logits(loaded.base, {}, golden['tokens'])
  assert np.abs(plain - golden['logits']).max() > 1
  merged = adapters.merge(loaded.base, params)
  found = logits(merged, {}, golden['tokens'])
  np.testing.assert_allclose(found, golden['logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_what_peft_wrote_is_written_again_as_it_was(tmp_path, names, name):
  save, load = names
  theirs, ours = GOLDEN / 'adapters' / name, tmp_path / name
  before = config_of(theirs)
  params = peft.load(theirs, **load)
  peft.save(
    ours,
    params,
    base_model=before['base_model_name_or_path'],
    use_rslora=before['use_rslora'],
    **save,
  )
  a, b = tensors_of(theirs), tensors_of(ours)
  assert set(a) == set(b)
  for key in a:
    assert b[key].dtype == np.float32
    np.testing.assert_array_equal(a[key], b[key])
  after = config_of(ours)
  for field in after:
    if field not in ('rank_pattern', 'alpha_pattern', 'r', 'lora_alpha'):
      expected, found = before[field], after[field]
      if field == 'target_modules':
        # PEFT may list every module; the ends of the names are enough.
        expected = sorted({full.split('.')[-1] for full in expected})
      assert found == expected, field
  if name != 'patterns':
    assert (after['r'], after['lora_alpha']) == (
      before['r'],
      before['lora_alpha'],
    )
    assert after['rank_pattern'] == after['alpha_pattern'] == {}
  assert_equal(peft.load(ours, **load), params)


@pytest.mark.parametrize('use_rslora', [False, True])
def test_an_adapter_comes_back_bit_by_bit(tmp_path, names, use_rslora):
  save, load = names
  params = random_adapter(scale=(16 / 3, 0.1), ranks=(3, 5))
  # Not stacked over layers.
  node = jax.tree.map(lambda x: x[0], params['layers']['mlp']['down_proj'])
  params['lm_head'] = node
  peft.save(
    tmp_path / 'x', params, base_model='b', use_rslora=use_rslora, **save
  )
  assert_equal(peft.load(tmp_path / 'x', template=params, **load), params)


def test_files_have_the_layout_of_peft(tmp_path, names):
  save, _ = names
  params = random_adapter(scale=(2.0, 0.5), ranks=(3, 4))
  out = tmp_path / 'deep' / 'x'
  peft.save(out, params, base_model='owner/model', **save)
  assert sorted(p.name for p in out.iterdir()) == [peft.CONFIG, peft.WEIGHTS]
  node = params['layers']['self_attn']['q_proj']
  tensors = tensors_of(out)
  key = PREFIX + '1.self_attn.q_proj.lora_{}.weight'
  np.testing.assert_array_equal(tensors[key.format('A')], node.a[1].T)
  np.testing.assert_array_equal(tensors[key.format('B')], node.b[1].T)
  assert len(tensors) == 8
  with safetensors.safe_open(out / peft.WEIGHTS, 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  config = config_of(out)
  down, q = 'model.layers.{}.mlp.down_proj', 'model.layers.{}.self_attn.q_proj'
  # alpha = scale * rank: 8 and 2 of down, 6 and 1.5 of q.
  ranks = {name.format(i): r for name, r in [(down, 4), (q, 3)] for i in (0, 1)}
  alphas = {down.format(0): 8.0, down.format(1): 2.0, q.format(0): 6.0}
  alphas[q.format(1)] = 1.5
  for patterns, default, expected in [
    ('rank_pattern', 'r', ranks),
    ('alpha_pattern', 'lora_alpha', alphas),
  ]:
    told = {n: config[patterns].get(n, config[default]) for n in expected}
    assert told == expected
  assert config['target_modules'] == ['down_proj', 'q_proj']
  assert config['base_model_name_or_path'] == 'owner/model'
  # Readable by whoever may read what this process writes.
  umask = os.umask(0)
  os.umask(umask)
  for path, mode in [(out, 0o777), (out / peft.WEIGHTS, 0o666)]:
    assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask


def test_layers_of_unequal_rank_are_padded_and_compute_the_same(
  tmp_path, names
):
  save, load = names
  params = random_adapter(ranks=(3, 3))
  peft.save(tmp_path / 'x', params, base_model='b', **save)
  tensors = tensors_of(tmp_path / 'x')
  for kind, keep in [('A', np.s_[:2]), ('B', np.s_[:, :2])]:
    key = f'{PREFIX}1.mlp.down_proj.lora_{kind}.weight'
    tensors[key] = np.ascontiguousarray(tensors[key][keep])
  safetensors.numpy.save_file(tensors, tmp_path / 'x' / peft.WEIGHTS)
  change(tmp_path / 'x', rank_pattern={'layers.1.mlp.down_proj': 2})
  node = peft.load(tmp_path / 'x', **load)['layers']['mlp']['down_proj']
  original = params['layers']['mlp']['down_proj']
  np.testing.assert_allclose(node.scale, [6 / 3, 6 / 2])
  for layer, rank, scale in [(0, 3, 2), (1, 2, 3)]:
    a, b = original.a[layer, :, :rank], original.b[layer, :rank]
    np.testing.assert_allclose(
      adapters.product(node)[layer], scale * a @ b, rtol=1e-5, atol=1e-5
    )


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path, names):
  save, load = names
  out = tmp_path / 'x'
  for seed in (0, 1):
    peft.save(out, random_adapter(seed), base_model='b', **save)
    (out / 'README.md').write_text('mine')
  assert_equal(peft.load(out, **load), random_adapter(1))
  assert (out / 'README.md').read_text() == 'mine'
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_disk_that_refuses_leaves_what_was_there(
  tmp_path, names, monkeypatch
):
  save, load = names
  peft.save(tmp_path / 'x', random_adapter(0), base_model='b', **save)

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  for name in ('x', 'y'):
    with pytest.raises(Error, match=f'{name}: .*No space left on device'):
      peft.save(tmp_path / name, random_adapter(1), base_model='b', **save)
  assert [p.name for p in tmp_path.iterdir()] == ['x']
  assert_equal(peft.load(tmp_path / 'x', **load), random_adapter(0))


@pytest.mark.parametrize(
  'params, words',
  [
    (random_adapter(residual=np.zeros((2, 6, 6))), 'residual of layers/mlp/'),
    ({'layers': {'head': np.zeros(3)}}, 'layers/head holds ndarray'),
    ({}, 'no low-rank adapter'),
  ],
)
def test_what_a_plain_adapter_cannot_say_is_not_written(
  tmp_path, names, params, words
):
  save, _ = names
  with pytest.raises(Error, match=words):
    peft.save(tmp_path / 'x', params, base_model='b', **save)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'peft_type': 'LOHA'}, "peft_type is 'LOHA'"),
    ({'peft_type': 'IA3'}, 'is no part of (IA)3'),
    ({'use_dora': True}, 'lacks a magnitude'),
    ({'bias': 'all'}, "bias = 'all'"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'init_lora_weights': 'pissa'}, "'pissa', which changes the base"),
    ({'some_new_switch': 1}, 'some_new_switch = 1'),
    ({'r': 3}, 'rank 3'),
    ({'lora_alpha': None}, 'lora_alpha is None, but must be a finite'),
    ({'rank_pattern': {'(': 4}}, 'no regular expression'),
  ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, names, fields, words):
  _, load = names
  out = shutil.copytree(GOLDEN / 'adapters' / 'lora', tmp_path / 'x')
  change(out, **fields)
  with pytest.raises(Error, match=re.escape(words)):
    peft.load(out, **load)


def without(key):
  return lambda tensors: tensors.pop(PREFIX + key)


def with_extra(key):
  return lambda tensors: tensors.update({key: np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(
  'edit, words',
  [
    (
      without('1.self_attn.q_proj.lora_B.weight'),
      r'1\.self_attn\.q_proj\.lora_B\.weight is missing',
    ),
    (with_extra('base_model.model.lm_head.weight'), 'no part of a plain LoRA'),
    (
      with_extra(PREFIX + '7.self_attn.q_proj.lora_A.weight'),
      r'7\.self_attn\.q_proj\.lora_B\.weight is missing',
    ),
    (lambda tensors: tensors.clear(), 'holds no tensor'),
  ],
)
def test_missing_and_superfluous_tensors_are_named(
  tmp_path, names, edit, words
):
  _, load = names
  out = shutil.copytree(GOLDEN / 'adapters' / 'lora', tmp_path / 'x')
  tensors = tensors_of(out)
  edit(tensors)
  safetensors.numpy.save_file(tensors, out / peft.WEIGHTS)
  with pytest.raises(Error, match=words):
    peft.load(out, **load)


def test_a_layer_without_its_adapter_is_named(tmp_path, names):
  _, load = names
  out = shutil.copytree(GOLDEN / 'adapters' / 'lora', tmp_path / 'x')
  tensors = tensors_of(out)
  for kind in 'AB':
    del tensors[f'{PREFIX}1.self_attn.q_proj.lora_{kind}.weight']
  safetensors.numpy.save_file(tensors, out / peft.WEIGHTS)
  with pytest.raises(Error, match=r'q_proj has no adapter in the layers \[1\]'):
    peft.load(out, **load)


def test_missing_and_damaged_files_are_named(tmp_path, names):
  _, load = names
  with pytest.raises(Error, match=r'adapter_config\.json cannot be read'):
    peft.load(tmp_path, **load)
  out = shutil.copytree(GOLDEN / 'adapters' / 'lora', tmp_path / 'x')
  (out / peft.WEIGHTS).write_bytes(b'damaged')
  with pytest.raises(Error, match='is not a safetensors file'):
    peft.load(out, **load)
  (out / peft.WEIGHTS).unlink()
  with pytest.raises(Error, match=r'adapter_model\.safetensors cannot be read'):
    peft.load(out, **load)
  (out / 'adapter_model.bin').touch()
  with pytest.raises(Error, match='pickled'):
    peft.load(out, **load)
  (out / peft.CONFIG).write_text('{')
  with pytest.raises(Error, match='not valid JSON'):
    peft.load(out, **load)


def test_an_adapter_that_does_not_fit_the_template_is_refused(loaded, names):
  _, load = names
  directory = GOLDEN / 'adapters' / 'lora'

  def shapes(**settings):
    adapter = adapters.lora(**settings)
    return jax.eval_shape(adapter.init, jax.random.key(0), loaded.base)

  peft.load(directory, template=shapes(rank=4), **load)
  with pytest.raises(Error, match=r'\(2, 32, 4\), and \(2, 32, 8\) is needed'):
    peft.load(directory, template=shapes(rank=8), **load)
  with pytest.raises(Error, match=r'too many, for layers/self_attn/v_proj'):
    peft.load(directory, template=shapes(rank=4, targets='q_proj'), **load)
  targets = ['q_proj', 'v_proj', 'o_proj']
  with pytest.raises(Error, match='no adapter for layers/self_attn/o_proj'):
    peft.load(directory, template=shapes(rank=4, targets=targets), **load)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize('use_rslora', [False, True])
def test_peft_loads_our_directory_and_computes_our_logits(
  tmp_path, loaded, names, logits, use_rslora
):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  save, _ = names
  adapter = adapters.rslora if use_rslora else adapters.lora
  params = adapter(rank=3, alpha=5, targets='all-linear').init(
    jax.random.key(0), loaded.base
  )
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  params = jax.tree.unflatten(
    tree,
    [x if x.ndim == 1 else 0.3 * rng.normal(size=x.shape) for x in leaves],
  )
  # Every layer of one target with a scale of its own.
  node = params['layers']['mlp']['up_proj']
  node = node._replace(scale=jnp.array([0.7, 1.9]))
  params['layers']['mlp']['up_proj'] = node
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  base_model = str(GOLDEN / 'models' / 'llama')
  peft.save(
    tmp_path / 'x', params, base_model=base_model, use_rslora=use_rslora, **save
  )
  model = theirs.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(
      base_model, dtype=torch.float32
    ),
    tmp_path / 'x',
  ).eval()
  tokens = np.arange(3, 27).reshape(2, 12)
  with torch.no_grad():
    expected = model(torch.asarray(tokens)).logits.numpy()
  found = logits(loaded.base, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
