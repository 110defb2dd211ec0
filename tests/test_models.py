"""Models: logits equal those of torch, packing, adapters, loading, text."""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import models
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families
from fedjax_llm.models.files import load
from fedjax_llm.models.generate import generate
from fedjax_llm.models.network import layers, transformer
from fedjax_llm.models.network.layers import Places
from fedjax_llm.models.network.rope import Rope, rope_frequencies
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Error

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'models'


def texts(tokens, lengths=None) -> Batch:
  tokens = np.asarray(tokens, np.int32)
  positions = np.broadcast_to(
    np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape
  )
  if lengths is None:
    inside = np.ones(tokens.shape, bool)
  else:
    inside = positions < np.asarray(lengths)[..., None]
  return Batch(tokens, inside, inside.astype(np.int32), positions)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, base, params, batch):
  return model.logits(base, params, model.hidden(base, params, batch))


def run(loaded, batch, params=None):
  return _run(loaded.model, loaded.base, params, batch)


def factors(loaded, seed=0, rank=3, targets=('q_proj', 'v_proj')):
  """Random LoRA factors, neither of them zero."""
  rng = np.random.default_rng(seed)

  def leaf(kernel):
    num_layers, d, f = kernel.shape
    return LowRank(
      jnp.asarray(rng.normal(size=(num_layers, d, rank)) / d**0.5, jnp.float32),
      jnp.asarray(rng.normal(size=(num_layers, rank, f)), jnp.float32),
      jnp.full([num_layers], 0.5),
    )

  groups = {'self_attn': {}, 'mlp': {}}
  for target in targets:
    group = 'mlp' if target in ('gate_proj', 'up_proj', 'down_proj') else None
    group = group or 'self_attn'
    kernel = loaded.base['layers'][group][target]['kernel']
    groups[group][target] = leaf(kernel)
  return {'layers': {k: v for k, v in groups.items() if v}}


@pytest.fixture(scope='module')
def tiny():
  return load.random(vocab_size=61, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope='module')
def windowed():
  return load.pretrained(GOLDEN / 'mistral')


# ---------------------------------------------------------------- position --


def test_a_window_changes_the_logits_only_behind_it(windowed):
  # Two layers of window 7 reach 12 places back.
  tokens = np.arange(3, 27)[None]
  other = tokens.copy()
  other[0, 0] = 90
  change = np.abs(run(windowed, texts(tokens)) - run(windowed, texts(other)))
  change = change.max(-1)[0]
  assert (change[:13] > 1e-4).all()
  assert (change[13:] == 0).all()


def test_llama3_keeps_fast_frequencies_and_stretches_slow_ones():
  rope = Rope('llama3', 500000.0, 8.0, 1.0, 4.0, 8192)
  ratio = rope_frequencies(rope, 128) / rope_frequencies(
    Rope(theta=500000.0), 128
  )
  # Wavelength 2 pi theta^(2 i / 128) against 8192 / 4 and 8192.
  assert ratio[0] == 1 and np.isclose(ratio[-1], 1 / 8)
  wavelength = 2 * np.pi * 500000.0 ** (np.arange(64) / 64)
  np.testing.assert_allclose(ratio[wavelength < 2048], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)
  between = ratio[(wavelength > 2048) & (wavelength < 8192)]
  assert ((between > 1 / 8) & (between < 1)).all()


# ----------------------------------------------------------------- padding --


def test_padding_may_stand_on_either_side(tiny):
  text = np.array([5, 9, 12, 40, 7], np.int32)
  left = Batch(
    np.concatenate([[0, 0, 0], text])[None],
    None,
    np.repeat([0, 1], [3, 5])[None],
    np.concatenate([[0, 0, 0], np.arange(5)])[None],
  )
  np.testing.assert_allclose(
    run(tiny, left)[0, 3:], run(tiny, texts(text[None]))[0], atol=1e-5
  )


def test_rows_of_padding_give_finite_values_and_gradients(tiny):
  batch = texts(np.zeros((2, 6)), [6, 0])
  params = factors(tiny)

  def loss(params):
    return jnp.sum(run(tiny, batch, params) ** 2)

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  assert jnp.isfinite(value)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_blocked_attention_equals_the_plain_form():
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (2, 50, 4, 8))
  k, v = (jax.random.normal(key, (2, 50, 2, 8)) for key in keys[1:])
  segments = np.repeat([[1, 2, 0], [1, 1, 1]], [20, 20, 10], axis=1)
  positions = np.stack([np.r_[0:20, 0:20, 0:10], np.r_[0:50]])
  places = Places(positions, segments)

  def form(name):
    def loss(qkv, window):
      q, k, v = qkv
      out = layers.attention(
        q, k, v, places, places, window=window, implementation=name, block=16
      )
      return jnp.sum(jnp.where(segments[..., None, None] > 0, out, 0) ** 2)

    return jax.jit(jax.value_and_grad(loss))

  plain, blocked = form('xla'), form('blocked')
  values = []
  for window in (0, 3, 200):
    wanted = plain((q, k, v), window)
    values.append(float(wanted[0]))
    for x, y in zip(
      jax.tree.leaves(wanted), jax.tree.leaves(blocked((q, k, v), window))
    ):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  assert values[0] == values[2] != values[1]  # 0 is no window at all


# ---------------------------------------------------------------- adapters --


def test_an_adapter_equals_its_product_merged_into_the_weights(tiny):
  params = factors(tiny, targets=('q_proj', 'o_proj', 'down_proj'))
  deltas = jax.tree.map(
    lambda leaf: jnp.einsum('ldr,lrf,l->ldf', leaf.a, leaf.b, leaf.scale),
    params,
    is_leaf=lambda x: isinstance(x, LowRank),
  )
  base = jax.tree.map(lambda x: x, tiny.base)
  for group, members in deltas['layers'].items():
    for name, delta in members.items():
      node = base['layers'][group][name]
      node['kernel'] = node['kernel'] + delta
  batch = texts(np.arange(1, 13).reshape(2, 6))
  wanted = run(tiny._replace(base=base), batch)
  assert np.abs(wanted - run(tiny, batch)).max() > 0.1
  np.testing.assert_allclose(run(tiny, batch, params), wanted, atol=2e-5)
  np.testing.assert_allclose(run(tiny, batch, deltas), wanted, atol=2e-5)


@pytest.mark.parametrize('tied', [False, True])
def test_dense_changes_reach_every_weight(tied):
  loaded = load.random(vocab_size=31, hidden_size=16, num_heads=2, tied=tied)
  rng = np.random.default_rng(0)
  changed = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
    loaded.base,
  )
  # A delta sits where the dict of the weight sits: {'kernel': x} becomes x.
  deltas = jax.tree.map(
    lambda new, old: next(iter(new.values())) - next(iter(old.values())),
    changed,
    loaded.base,
    is_leaf=lambda x: not isinstance(next(iter(x.values())), dict),
  )
  batch = texts(np.arange(1, 9)[None])
  wanted = run(loaded._replace(base=changed), batch)
  np.testing.assert_allclose(run(loaded, batch, deltas), wanted, atol=2e-5)


def test_a_residual_counts_until_it_is_folded(tiny):
  params = factors(tiny)
  leaf = params['layers']['self_attn']['q_proj']
  product = jnp.einsum('ldr,lrf,l->ldf', leaf.a, leaf.b, leaf.scale)
  moved = leaf._replace(b=jnp.zeros_like(leaf.b), residual=product)
  other = {'layers': {'self_attn': {**params['layers']['self_attn']}}}
  other['layers']['self_attn']['q_proj'] = moved
  batch = texts(np.arange(1, 7)[None])
  np.testing.assert_allclose(
    run(tiny, batch, other), run(tiny, batch, params), atol=2e-5
  )


@pytest.mark.parametrize(
  'params, words',
  [
    ({'layers': {'self_attn': {'qq_proj': None}}}, 'qq_proj.*q_proj'),
    (
      {'embed_tokens': LowRank(np.ones([61, 1]), np.ones([1, 32]), 1.0)},
      'embed_tokens',
    ),
    ({'layers': {'mlp': np.ones(3)}}, 'layers/mlp'),
  ],
)
def test_an_adapter_that_nothing_reads_is_refused(tiny, params, words):
  with pytest.raises(Error, match=words):
    run(tiny, texts([[1, 2]]), params)


def test_how_the_layers_are_run_changes_nothing(tiny):
  batch = texts(np.arange(1, 13).reshape(2, 6), [6, 4])

  def gradient(**settings):
    model = transformer.build(tiny.config, **settings)

    def loss(params):
      hidden = model.hidden(tiny.base, params, batch)
      logits = model.logits(tiny.base, params, hidden)
      return jnp.mean(jax.nn.logsumexp(logits, -1))

    return jax.jit(jax.value_and_grad(loss))(factors(tiny))

  plain = gradient()
  assert jax.tree.reduce(lambda s, x: s + jnp.abs(x).sum(), plain[1], 0.0) > 1
  for settings in ({'remat': 'full'}, {'remat': 'dots', 'unroll': 2}):
    other = gradient(**settings)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
      np.testing.assert_allclose(x, y, atol=1e-6)


def _clients(loaded, num):
  params = [factors(loaded, seed) for seed in range(num)]
  tokens = np.random.default_rng(1).integers(1, 61, (num, 2, 10))
  lengths = np.array([[10, 7], [4, 0], [10, 10]])[:num]
  return params, texts(tokens, lengths)


def _loss_and_gradient(loaded):
  def loss(params, base, batch):
    hidden = loaded.model.hidden(base, params, batch)
    logits = loaded.model.logits(base, params, hidden)
    nll = -jax.nn.log_softmax(logits)[..., 0]
    return jnp.sum(nll * batch.loss_mask)

  return jax.value_and_grad(loss)


@pytest.fixture(scope='module')
def together(tiny):
  """Three clients' losses and gradients as one compiled program."""
  params, batches = _clients(tiny, 3)
  stack = jax.tree.map(lambda *xs: jnp.stack(xs), *params)
  arguments = (stack, tiny.base, batches)
  program = jax.jit(jax.vmap(_loss_and_gradient(tiny), (0, None, 0)))
  return program.lower(*arguments).compile(), arguments


def test_vmap_over_adapters_equals_a_loop(tiny, together):
  program, arguments = together
  stacked = program(*arguments)
  params, batches = _clients(tiny, 3)
  step = jax.jit(_loss_and_gradient(tiny))
  for k, client in enumerate(params):
    own = jax.tree.map(lambda x, k=k: x[k], batches)
    alone = step(client, tiny.base, own)
    for x, y in zip(jax.tree.leaves(stacked), jax.tree.leaves(alone)):
      np.testing.assert_allclose(x[k], y, rtol=1e-4, atol=1e-4)


def test_the_base_product_is_one_matmul_for_all_clients(tiny, together):
  """In the optimised program no product with the base has a batch axis."""
  clients, rows, length = together[1][2].tokens.shape
  text = together[0].as_text()
  shape_of = {
    name: tuple(int(n) for n in dims.split(',') if n)
    for name, dims in re.findall(r'(%[\w.-]+) = \w+\[([\d,]*)\]', text)
  }
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(tiny.base)
    if path[-1].key == 'kernel'
  }
  merged = 0
  for line in text.splitlines():
    if not re.search(r' dot\(', line):
      continue
    inside = line.split(' dot(')[1].split(')')[0]
    operands = [shape_of[name] for name in re.findall(r'%[\w.-]+', inside)]
    dims = [tuple(sorted(d for d in s if d > 1)) for s in operands]
    if not any(d in kernels for d in dims):
      # Nor was the base repeated for every client.
      assert not any(
        tuple(sorted((clients, *kernel))) in dims for kernel in kernels
      ), line
      continue
    assert 'batch_dims={0' not in line, line
    merged += any(np.prod(s) % (clients * rows * length) == 0 for s in operands)
  assert merged >= 8  # seven matrices and the head, forwards


# ----------------------------------------------------------------- configs --


def copy(tmp_path, name='llama', **changes):
  """A golden model whose config.json is changed."""
  directory = tmp_path / name
  shutil.copytree(GOLDEN / name, directory)
  file = directory / 'config.json'
  values = json.loads(file.read_text())
  values.update(changes)
  file.write_text(json.dumps(values))
  return directory


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'architectures': ['MambaForCausalLM'], 'model_type': 'mamba'}, 'Mamba'),
    ({'architectures': ['LlamaForQuestionAnswering']}, 'LlamaForCausalLM'),
    ({'model_type': 'mistral'}, 'LlamaForCausalLM.*mistral'),
    ({'hidden_act': 'mish'}, "hidden_act='mish'"),
    ({'quantization_config': {'quant_method': 'x'}}, 'quantization_config'),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
    ({'rope_interleaved': True}, 'rope_interleaved=True'),
    ({'head_dim': 7}, 'head_dim.*7'),
    ({'num_key_value_heads': 3}, 'num_key_value_heads=3'),
    (
      {'rope_parameters': {'rope_theta': 1e4, 'rope_type': 'spiral'}},
      'spiral',
    ),
    (
      {'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}},
      'partial_rotary_factor=0.5',
    ),
    ({'vocab_size': 'many'}, 'many'),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, changes, words):
  with pytest.raises(Error, match=words) as caught:
    load.pretrained(copy(tmp_path, **changes))
  assert 'config.json' in str(caught.value)


@pytest.mark.parametrize(
  'name, types',
  [
    ('qwen2', ['full_attention', 'linear_attention']),
    ('qwen2', ['full_attention', 'sliding_attention']),
    ('qwen2', ['full_attention']),
  ],
)
def test_layer_types_that_do_not_fit_are_refused(tmp_path, name, types):
  with pytest.raises(Error, match='layer_types'):
    load.pretrained(copy(tmp_path, name, layer_types=types))


def test_a_mistral_with_layer_types_is_refused(tmp_path):
  types = ['full_attention', 'sliding_attention']
  with pytest.raises(Error, match=r'ministral|layer_types'):
    load.pretrained(copy(tmp_path, 'mistral', layer_types=types))


def test_old_rope_fields_are_read(tmp_path):
  directory = copy(
    tmp_path,
    rope_theta=500.0,
    rope_scaling={'type': 'linear', 'factor': 4.0},
  )
  file = directory / 'config.json'
  values = json.loads(file.read_text())
  del values['rope_parameters']
  file.write_text(json.dumps(values))
  rope = families.read_config(directory).rope
  assert rope == Rope('linear', 500.0, 4.0)


def test_module_names_go_both_ways(tiny):
  for module in families.modules(tiny.config):
    layer = 1 if module.path[0] == 'layers' else None
    name = families.hf_module_name(module.path, layer, tiny.config)
    assert families.our_path(name, tiny.config) == (module.path, layer)
  with pytest.raises(Error, match='x_proj'):
    families.hf_module_name('layers/x_proj', 0, tiny.config)
  with pytest.raises(Error, match=r'layers\.2\.'):
    families.our_path('model.layers.2.mlp.up_proj', tiny.config)


# ----------------------------------------------------------------- loading --


def change(directory, edit):
  file = directory / 'model.safetensors'
  weights = safetensors.numpy.load_file(file)
  edit(weights)
  safetensors.numpy.save_file(weights, file, metadata={'format': 'pt'})


def _drop(weights):
  del weights['model.layers.1.mlp.up_proj.weight']


def _add(weights):
  weights['model.layers.1.self_attn.q_norm.weight'] = np.ones(3, np.float32)


def _reshape(weights):
  weights['model.norm.weight'] = np.ones(33, np.float32)


def _integers(weights):
  weights['model.norm.weight'] = np.ones(32, np.int8)


@pytest.mark.parametrize(
  'edit, words',
  [
    (_drop, r'lacks .*layers\.1\.mlp\.up_proj\.weight'),
    (_add, r'q_norm\.weight'),
    (_reshape, r'model\.norm\.weight has shape \[33\].*\[32\]'),
    (_integers, r'model\.norm\.weight is stored as I8'),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, edit, words):
  directory = copy(tmp_path)
  change(directory, edit)
  with pytest.raises(Error, match=words):
    load.pretrained(directory)


def test_a_tied_head_may_be_written_twice_but_not_differ(tmp_path):
  directory = copy(tmp_path, 'qwen2')

  def twice(weights):
    head = weights['model.embed_tokens.weight'].copy()
    weights['lm_head.weight'] = head

  change(directory, twice)
  assert 'lm_head' not in load.pretrained(directory).base

  def differ(weights):
    weights['lm_head.weight'][0, 0] += 1

  change(directory, differ)
  with pytest.raises(Error, match=r'lm_head\.weight.*differs'):
    load.pretrained(directory)


def test_directories_without_a_model_are_refused(tmp_path):
  with pytest.raises(Error, match='neither a directory'):
    load.pretrained(tmp_path / 'nowhere')
  with pytest.raises(Error, match=r'no config\.json'):
    load.pretrained(tmp_path)
  directory = copy(tmp_path)
  weights = directory / 'model.safetensors'
  whole = weights.read_bytes()
  weights.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(Error, match=r'model\.safetensors cannot be read'):
    load.pretrained(directory)
  weights.rename(directory / 'pytorch_model.bin')
  with pytest.raises(Error, match=r'no weights.*pytorch_model\.bin'):
    load.pretrained(directory)
  (directory / 'config.json').write_text('{')
  with pytest.raises(Error, match=r'config\.json is not valid JSON'):
    load.pretrained(directory)


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(monkeypatch):
  import huggingface_hub

  def offline(name, **kwargs):
    raise ConnectionError('no network')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(Error, match=r'someone/model .*no network'):
    load.pretrained('someone/model')


def test_a_sharded_checkpoint_equals_a_single_file(tmp_path):
  directory = copy(tmp_path)
  whole = load.pretrained(directory)
  weights = safetensors.numpy.load_file(directory / 'model.safetensors')
  (directory / 'model.safetensors').unlink()
  weight_map = {}
  for shard in range(2):
    part = {n: w for i, (n, w) in enumerate(weights.items()) if i % 2 == shard}
    file = f'model-0000{shard + 1}-of-00002.safetensors'
    safetensors.numpy.save_file(part, directory / file)
    weight_map.update(dict.fromkeys(part, file))
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  sharded = load.pretrained(directory)
  jax.tree.map(np.testing.assert_array_equal, sharded.base, whole.base)

  (directory / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(Error, match='model-00002-of-00002'):
    load.pretrained(directory)
  index.write_text('{}')
  with pytest.raises(Error, match='weight_map'):
    load.pretrained(directory)


@pytest.mark.parametrize('dtype', load.DTYPES)
def test_saved_and_loaded_weights_are_the_same_bits(tmp_path, dtype):
  loaded = load.random(num_layers=3, vocab_size=37, eos_ids=[2, 5], dtype=dtype)
  load.save(tmp_path / 'model', loaded.config, loaded.base)
  again = load.pretrained(tmp_path / 'model', dtype=dtype)
  assert again.config == loaded.config
  assert again.directory == tmp_path / 'model'
  jax.tree.map(np.testing.assert_array_equal, again.base, loaded.base)
  assert jax.tree.leaves(again.base)[0].dtype == dtype
  assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == [
    'config.json',
    'model.safetensors',
  ]


def test_a_failed_save_leaves_nothing_half_written(tmp_path, monkeypatch, tiny):
  def full(weights, file, metadata):
    pathlib.Path(file).write_bytes(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(safetensors.numpy, 'save_file', full)
  with pytest.raises(Error, match='No space left'):
    load.save(tmp_path, tiny.config, tiny.base)
  assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys
import jax
from transformers import AutoConfig
from fedjax_llm.models.files import load

def memory(kind):
  with open('/proc/self/status') as lines:
    return next(int(l.split()[1]) for l in lines if l.startswith(kind)) * 1024

jax.block_until_ready(jax.numpy.zeros(1))
before = memory('VmRSS')
base = load.pretrained(sys.argv[1]).base
size = sum(x.nbytes for x in jax.tree.leaves(base))
print((memory('VmHWM') - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_loading_grows_memory_by_little_more_than_the_weights(tmp_path):
  loaded = load.random(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_layers=6
  )
  load.save(tmp_path, loaded.config, loaded.base)
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
  )
  assert float(done.stdout.split()[-1]) < 1.3


# -------------------------------------------------------------- generation --


def reference(loaded, params, prompt, num):
  """Greedy, one text at a time, everything computed again for each token."""
  text = list(prompt)
  for _ in range(num):
    batch = texts(np.array(text + [0] * (24 - len(text)))[None], [len(text)])
    logits = run(loaded, batch, params)[0, len(text) - 1]
    text.append(int(np.argmax(logits)))
  return text[len(prompt) :]


PROMPTS = [[5, 17, 3], [9], list(range(20, 32))]


def test_cached_generation_equals_full_recomputation(windowed):
  params = factors(windowed)
  wanted = [reference(windowed, params, p, 12) for p in PROMPTS]

  def say(model, **settings):
    return generate(
      model, windowed.base, params, PROMPTS, max_new_tokens=12, **settings
    )

  assert say(windowed) == wanted
  assert say(windowed.model) == wanted
  stop = wanted[0][4]
  cut = [w[: w.index(stop)] if stop in w else w for w in wanted]
  assert cut != wanted
  assert say(windowed, eos_id=[stop, 96]) == cut
  assert say(windowed, eos_id=stop) == cut


def test_batches_do_not_change_what_is_drawn(windowed):
  def say(batch_size):
    return generate(
      windowed,
      windowed.base,
      None,
      PROMPTS,
      max_new_tokens=8,
      temperature=1.0,
      key=jax.random.key(3),
      batch_size=batch_size,
    )

  together = say(32)
  assert say(1) == together
  assert len({tuple(reply) for reply in together}) == 3


def test_sampled_tokens_follow_the_distribution(tiny):
  """400 draws of one token against softmax(logits / temperature)."""
  prompt, temperature = [4, 8, 15], 0.7
  draws = generate(
    tiny,
    tiny.base,
    None,
    [prompt] * 400,
    max_new_tokens=1,
    temperature=temperature,
    key=jax.random.key(0),
    batch_size=400,
  )
  counts = np.bincount([d[0] for d in draws], minlength=61)
  logits = run(tiny, texts([prompt]))[0, -1]
  wanted = 400 * np.asarray(jax.nn.softmax(logits / temperature))
  # Pearson: 60 degrees of freedom, mean 60, deviation 11.
  assert np.sum((counts - wanted) ** 2 / wanted) < 60 + 5 * 11
  assert np.ptp(wanted) > 10


@pytest.mark.parametrize(
  'prompts, settings, words',
  [
    ([[]], {}, 'Prompt 0 is empty'),
    ([[1], [61]], {}, 'vocabulary of 61'),
    ([[1]], {'max_new_tokens': 0}, 'max_new_tokens=0'),
    ([[1]], {'max_new_tokens': 4000}, '2048 positions'),
    ([[1]], {'temperature': 1.0}, 'needs a key'),
    ([[1]], {'temperature': -1.0}, 'negative'),
  ],
)
def test_bad_requests_are_refused(tiny, prompts, settings, words):
  settings = {'max_new_tokens': 2, **settings}
  with pytest.raises(Error, match=words):
    generate(tiny, tiny.base, None, prompts, **settings)


# ------------------------------------------------------------------- dtypes --


def test_half_precision_keeps_logits_in_float32_and_near(tiny):
  model = transformer.build(tiny.config, compute_dtype=jnp.bfloat16)
  half = tiny._replace(model=model)
  batch = texts(np.arange(1, 13).reshape(2, 6))
  params = factors(tiny)
  assert half.model.hidden(half.base, params, batch).dtype == jnp.bfloat16
  logits, wanted = run(half, batch, params), run(tiny, batch, params)
  assert logits.dtype == jnp.float32
  assert 1e-5 < np.abs(logits - wanted).max() < 0.2


def test_counted_parameters_are_those_of_the_tree(tiny):
  leaves = jax.tree.leaves(tiny.base)
  assert config_lib.num_params(tiny.config) == sum(x.size for x in leaves)
  with pytest.raises(Error, match='remat'):
    transformer.build(tiny.config, remat='some')
  with pytest.raises(Error, match='dtype'):
    models.random(dtype='int8')
