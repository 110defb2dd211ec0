"""Loading: straight into the shards of a mesh, or one clear sentence."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import models
from fedjax_llm.models.files import load
from fedjax_llm.types import Error

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'models'
CACHE = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
SMOLLM2 = pathlib.Path(CACHE).expanduser() / 'SmolLM2-135M-Instruct'

# ------------------------------------------------------------------- shards --

# Run with eight devices: memory first, then every weight of some models.
SHARDED = """
import json, sys
import jax
import numpy as np
from transformers import AutoConfig
from fedjax_llm import models
from fedjax_llm.devices import sharding

def memory(kind):
  with open('/proc/self/status') as lines:
    return next(int(l.split()[1]) for l in lines if l.startswith(kind)) * 1024

big, *names = sys.argv[1:]
devices = jax.devices()
jax.block_until_ready([jax.device_put(np.zeros(1), d) for d in devices])
out = {'devices': len(devices)}
for rows, columns in ((1, 2), (4, 2)):
  mesh = sharding.mesh(columns, devices[: rows * columns])
  place = sharding.placement(mesh)
  if rows > 1 and sys.platform.startswith('linux'):
    before = memory('VmRSS')
    base = models.pretrained(big, place=place).base
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    out['growth'] = (memory('VmHWM') - before) / size
    split = base['layers']['mlp']['up_proj']['kernel']
    out['shard'] = split.addressable_shards[0].data.nbytes / split.nbytes
    del base, split
  for name in names:
    name, _, quantisation = name.partition(':')
    settings = {'quantisation': quantisation or None}
    settings['labels'] = ('a', 'b') if 'minilm' in name else None
    base = models.pretrained(name, **settings).base
    found = models.pretrained(name, place=place, **settings).base
    kernels = [0, 0]
    wanted = sharding.base_specs(base, mesh)
    for x, y, spec in zip(*map(jax.tree.leaves, (found, base, wanted))):
      assert x.shape == y.shape and x.dtype == y.dtype
      for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])
      np.testing.assert_array_equal(x, y)
      assert len(x.sharding.device_set) == mesh.size
      assert quantisation or x.sharding.spec == spec
      kernels[x.addressable_shards[0].data.nbytes < x.nbytes] += 1
    out[f'{name}:{quantisation} {rows}x{columns}'] = kernels
print(json.dumps(out))
"""
# Separate and tied, fused one after the other and by head, untransposed, and a
# classifier whose weights are drawn.
SHARDED_MODELS = ['llama', 'phi3', 'gpt_neox', 'gpt2', 'minilm']


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
  big = SMOLLM2
  if not (big / 'model.safetensors').is_file():
    big = tmp_path_factory.mktemp('big')
    loaded = load.random(
      vocab_size=4096, hidden_size=512, intermediate_size=1024, num_layers=6
    )
    load.save(big, loaded.config, loaded.base)
  names = [str(GOLDEN / name) for name in SHARDED_MODELS]
  if importlib.util.find_spec('qwix'):
    names.append(str(GOLDEN / 'llama') + ':int8')
  flags = os.environ.get('XLA_FLAGS', '')
  done = subprocess.run(
    [sys.executable, '-c', SHARDED, str(big), *names],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    },
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_shards_are_read_as_they_lie_bit_for_bit(sharded):
  """The comparisons are in the program; here: that something was split."""
  found = {k: v for k, v in sharded.items() if 'x' in k.split(' ')[-1]}
  assert len(found) >= 2 * len(SHARDED_MODELS)
  assert all(split >= 6 for _, split in found.values()), found


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_loading_into_a_mesh_makes_no_second_copy(sharded):
  assert sharded['devices'] == 8
  assert sharded['growth'] < 1.3
  assert sharded['shard'] == 0.5


# ----------------------------------------------------------------- mistakes --


def copy(tmp_path, name='llama'):
  return shutil.copytree(GOLDEN / name, tmp_path / name)


def edit(file, change):
  values = json.loads(file.read_text())
  change(values)
  file.write_text(json.dumps(values))


def edit_weights(directory, change):
  file = directory / 'model.safetensors'
  weights = safetensors.numpy.load_file(file)
  change(weights)
  safetensors.numpy.save_file(weights, file, metadata={'format': 'pt'})


def in_shards(directory):
  """The checkpoint as two files and an index."""
  file = directory / 'model.safetensors'
  weights = safetensors.numpy.load_file(file)
  file.unlink()
  names, where = sorted(weights), {}
  for number, part in enumerate((names[::2], names[1::2]), 1):
    shard = f'model-0000{number}-of-00002.safetensors'
    safetensors.numpy.save_file(
      {n: weights[n] for n in part}, directory / shard
    )
    where.update(dict.fromkeys(part, shard))
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': where}))
  return directory


def unknown_value(directory):
  change = lambda values: values.update(hidden_act='mish')
  edit(directory / 'config.json', change)


def cut_off(directory):
  file = directory / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(directory):
  file = directory / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:50])


def cut_shard(directory):
  file = in_shards(directory) / 'model-00002-of-00002.safetensors'
  file.write_bytes(file.read_bytes()[:-1])


def missing_shard(directory):
  (in_shards(directory) / 'model-00002-of-00002.safetensors').unlink()


def missing_tensor(directory):
  edit_weights(directory, lambda w: w.pop('model.norm.weight'))


def extra_tensor(directory):
  extra = {'model.layers.7.mlp.up_proj.weight': np.ones(3, np.float32)}
  edit_weights(directory, lambda w: w.update(extra))


def misshaped_tensor(directory):
  other = {'model.norm.weight': np.ones(33, np.float32)}
  edit_weights(directory, lambda w: w.update(other))


def tokenizer(directory, **added):
  vocab = {f't{i}': i for i in range(97)}
  extra = [
    {'id': i, 'content': name, 'special': name.startswith('<')}
    for name, i in added.items()
  ]
  content = {'model': {'type': 'BPE', 'vocab': vocab}, 'added_tokens': extra}
  (directory / 'tokenizer.json').write_text(json.dumps(content))


def large_tokenizer(directory):
  tokenizer(directory, word=150)


def damaged_tokenizer(directory):
  (directory / 'tokenizer.json').write_text('{"model": 3}')


MISTAKES = {
  unknown_value: r"config\.json: hidden_act='mish'",
  cut_off: r'model\.safetensors cannot be read \(damaged or cut off\?\)',
  cut_in_the_header: r'model\.safetensors cannot be read',
  cut_shard: r'model-00002-of-00002\.safetensors cannot be read',
  missing_shard: r'index\.json names model-00002-of-00002\.safetensors, which',
  missing_tensor: r'lacks the tensors model\.norm\.weight',
  extra_tensor: r'does not have: model\.layers\.7\.mlp\.up_proj\.weight',
  misshaped_tensor: r'model\.norm\.weight has shape \[33\].*asks for \[32\]',
  large_tokenizer: r'tokenizer\.json has tokens up to number 150.* 97 rows',
  damaged_tokenizer: r'tokenizer\.json cannot be read',
}


@pytest.mark.parametrize('spoil', MISTAKES, ids=lambda f: f.__name__)
def test_a_bad_directory_is_one_clear_sentence(tmp_path, spoil):
  directory = copy(tmp_path)
  spoil(directory)
  with pytest.raises(Error, match=MISTAKES[spoil]) as caught:
    models.pretrained(directory)
  told = str(caught.value)
  assert str(directory) in told and told.endswith('.') and '\n' not in told


def test_special_tokens_beyond_the_embedding_need_a_role_to_matter(tmp_path):
  """As that for pictures in Gemma 3, which no text holds."""
  directory = copy(tmp_path)
  tokenizer(directory, **{'<picture>': 97})
  models.pretrained(directory)
  for role in ('<picture>', {'content': '<picture>'}):
    settings = directory / 'tokenizer_config.json'
    settings.write_text(json.dumps({'pad_token': role}))
    with pytest.raises(Error, match='number 97'):
      models.pretrained(directory)


# --------------------------------------------------------------------- gguf --


@pytest.fixture
def convert_gguf(monkeypatch, capsys):
  """`scripts/convert_gguf`, in this process: its status and what it says."""
  loader = importlib.machinery.SourceFileLoader(
    'convert_gguf', str(ROOT / 'scripts' / 'convert_gguf')
  )
  spec = importlib.util.spec_from_loader('convert_gguf', loader)
  assert spec is not None
  program = importlib.util.module_from_spec(spec)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  loader.exec_module(program)

  def run(*words):
    monkeypatch.setattr(sys, 'argv', ['convert_gguf', *map(str, words)])
    try:
      status = program.main()
    except SystemExit as stop:
      status = stop.code
    out, err = capsys.readouterr()
    return status, out, err

  return run


def test_a_gguf_file_becomes_a_directory(tmp_path, convert_gguf):
  pytest.importorskip('gguf')
  from test_gguf import write_gguf

  write_gguf(tmp_path / 'in.gguf', GOLDEN / 'llama')
  out = tmp_path / 'models' / 'out'
  status, said, wrong = convert_gguf(tmp_path / 'in.gguf', out)
  assert (status, wrong) == (0, '') and str(out) in said
  found = models.pretrained(out)
  wanted = safetensors.numpy.load_file(GOLDEN / 'llama' / 'model.safetensors')
  np.testing.assert_array_equal(
    found.base['norm']['scale'], wanted['model.norm.weight'].astype(np.float32)
  )
  status, said, wrong = convert_gguf(tmp_path / 'in.gguf', out)
  assert status == 1 and 'is there already' in wrong
  half = tmp_path / 'half'
  half.mkdir()
  status, _, wrong = convert_gguf(
    tmp_path / 'in.gguf', half, '--dtype', 'bfloat16'
  )
  assert (status, wrong) == (0, '')
  rounded = models.pretrained(half, dtype='bfloat16').base
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)),
    rounded,
    found.base,
  )
  size = lambda d: (d / 'model.safetensors').stat().st_size
  assert size(half) < 0.6 * size(out)


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path, convert_gguf):
  pytest.importorskip('gguf')
  from test_gguf import write_gguf

  out, bad = tmp_path / 'out', tmp_path / 'bad.gguf'
  assert convert_gguf(tmp_path / 'none.gguf', out)[2].count('no such file') == 1
  bad.write_bytes(b'GGUF' + bytes(100))
  write_gguf(tmp_path / 'in.gguf', GOLDEN / 'llama')
  whole = (tmp_path / 'in.gguf').read_bytes()
  for content in (
    b'',
    b'nothing',
    b'GGUF' + bytes(100),
    whole[: len(whole) // 2],
  ):
    bad.write_bytes(content)
    status, said, wrong = convert_gguf(bad, out)
    assert (status, said) == (1, '')
    assert str(bad) in wrong and wrong.count('\n') == 1
    assert 'Traceback' not in wrong
  assert {p.name for p in tmp_path.iterdir()} == {'bad.gguf', 'in.gguf'}
  status, said, _ = convert_gguf('--help')
  assert status == 0 and 'Hugging Face directory' in said and '--dtype' in said
