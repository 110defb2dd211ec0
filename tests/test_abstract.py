"""Meshes that are not there: the shard of every tensor, lowered rounds."""

import functools
import importlib.util
import math
import os
import pathlib
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from fedjax_llm import plan
from fedjax_llm.plan import abstract, work
from fedjax_llm.run import config
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error

CONFIG = str(pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py')
FIELDS = {
  'model.name': 'pretrained',
  'model.dtype': 'bfloat16',
  'model.compute_dtype': 'bfloat16',
  'model.remat': 'full',
  'model.attention': 'xla',
  'adapter.targets': 'q_proj',
  'population.max_length': 128,
  'cohort.num_steps': 1,
  'cohort.batch_size': 1,
  'clients.cohort_size': 4,
  'block_size': 1,
}
LARGE = {  # parameters, devices that share a copy, matrices that are split
  'Qwen/Qwen2.5-7B': (7.6e9, 4, 9),
  'meta-llama/Llama-3.1-70B': (70.6e9, 8, 9),
}


def conf(model, num_model):
  fields = {**FIELDS, 'model.path': model, 'mesh_model': num_model}
  words = [f'--config.{k}={v}' for k, v in fields.items()]
  return config.parse(['--config', CONFIG, '--workdir', 'x', *words], SPEC)


@pytest.fixture(scope='module', params=LARGE)
def large(request):
  """A round of a large model on two rows of devices, as shapes."""
  count, num_model, split = LARGE[request.param]
  mesh = abstract.mesh(2 * num_model, num_model)
  checked = conf(request.param, num_model).config
  planned = work.read(checked, devices=mesh.size, mesh=mesh)
  return planned, mesh, count, num_model, split


def test_every_large_tensor_is_split_over_the_model_axis(large):
  planned, mesh, count, num, split = large
  shards = abstract.table(planned.base, mesh)
  whole = [x for x in shards if x.part == x.shape]
  assert len(shards) - len(whole) == split
  # Norms and the biases of q, k and v stay whole: less than a thousandth.
  assert sum(math.prod(x.shape) for x in whole) < count / 1000
  assert abs(sum(math.prod(x.shape) for x in shards) / count - 1) < 0.01
  for shard in shards:
    cut = [i for i, name in enumerate(shard.spec) if name]
    want = [n // num if i in cut else n for i, n in enumerate(shard.shape)]
    assert list(shard.part) == want
    assert shard.num_bytes == 2 * math.prod(want)
  by = {x.path: x for x in shards}
  for name, axis in (('q_proj', 2), ('o_proj', 1)):
    path = f'layers/self_attn/{name}/kernel'
    assert by[path].spec == P(
      *('model' if i == axis else None for i in (0, 1, 2))
    )


def test_a_large_round_is_lowered_for_platforms_that_are_not_here(large):
  planned, mesh, _, num, split = large
  step = abstract.sharding.compiled(planned.algorithm.round, mesh)
  traced = step.trace(*abstract.inputs(planned, mesh))
  counts = []
  for platform in ('tpu', 'cuda'):
    lowered = traced.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert f'mhlo.num_partitions = {2 * num} ' in text
    head = re.search(r'func\.func public @main\((.*?)\) ->', text, re.DOTALL)
    assert head is not None
    # Split inputs are the matrices of the base, by 'model', and the cohort.
    assert len(re.findall(r'sdy\.sharding<[^>]*"model"', head[1])) == split
    assert len(re.findall(r'sdy\.sharding<[^>]*"clients"', head[1])) >= 5
    counts.append(abstract.collectives(lowered))
  # One for each summed leaf: two factors and numbers of the metrics.
  assert counts[0] == counts[1] and set(counts[0]) == {'all_reduce'}
  assert 3 <= counts[0]['all_reduce'] <= 30


def test_one_row_of_devices_sums_nothing_over_clients():
  mesh = abstract.mesh(4, 4)
  checked = conf('Qwen/Qwen2.5-7B', 4).config
  planned = work.read(checked, devices=4, mesh=mesh, num_layers=1)
  assert planned.cohort.ids.shape == (4,)
  assert abstract.collectives(abstract.lower(planned, mesh, 'tpu')) == {}


def test_the_table_is_printed_with_its_sum():
  shape = jax.ShapeDtypeStruct((2, 128, 64), 'bfloat16')
  base = {'layers': {'down_proj': {'kernel': shape}}}
  lines = abstract.lines(abstract.table(base, abstract.mesh(4, 2)))
  assert [' '.join(line.split()) for line in lines] == [
    'tensor shape split a device bytes',
    'layers/down_proj/kernel 2 x 128 x 64 axis 1 2 x 64 x 64 0.0 MB',
    'a device holds 0.00 GB of the base',
  ]


def test_the_program_lowers_on_request():
  checked = conf('Qwen/Qwen2.5-7B', 2).config
  read = functools.partial(work.read, devices=4, num_layers=1)
  words = ['--config', CONFIG, '--devices', '4', '--shards', '--lower', 'cuda']
  args = plan._arguments(words)
  args.conf = checked
  lines = plan._on_mesh(args, read(checked), read, 2)
  assert any(line.startswith('layers/mlp/down_proj/kernel') for line in lines)
  text = 'lowered for cuda on 4 devices; collectives over clients: '
  assert re.fullmatch(rf'{text}\d+ all_reduce', lines[-1])


def test_mistakes_are_sentences():
  with pytest.raises(Error, match='mesh_model is 3: it must divide the 8'):
    abstract.mesh(8, 3)
  with pytest.raises(Error, match='--lower abacus is not one of tpu, cuda'):
    abstract.lower(None, None, 'abacus')  # type: ignore
  if importlib.util.find_spec('libtpu') is None:
    with pytest.raises(Error, match='--topology v5e:2x4: JAX TPU'):
      abstract.topology('v5e:2x4', 1)


def test_collectives_of_a_compiled_program_are_counted_by_kind():
  class Program:
    def as_text(self):
      return """
        %a = f32[8] all-reduce(%x), replica_groups={{0,1}}
        %b = (f32[8], f32[8]) all-reduce-start(%y, %z)
        %c = f32[8] all-reduce-done(%b)
        %d = f32[16] all-gather(%x)
        %e = f32[8] add(%all-reduce, %x)"""

  counts = abstract.compiled_collectives(Program())
  assert counts == {'all-reduce': 2, 'all-gather': 1}


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None or os.environ.get('SLOW') != '1',
  reason='needs libtpu, and minutes: SLOW=1',
)
def test_a_round_is_compiled_for_tpus_that_are_not_here():
  mesh = abstract.topology('v5e:2x4', 4)
  checked = conf('Qwen/Qwen2.5-7B', 4).config
  planned = work.read(checked, devices=8, mesh=mesh, num_layers=1)
  compiled = abstract.lower(planned, mesh, 'tpu').compile()
  assert abstract.compiled_collectives(compiled)['all-reduce'] > 0
  assert jax.default_backend() == 'cpu'
