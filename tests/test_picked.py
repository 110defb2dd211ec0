"""Adapters of some layers, as with PEFT's layers_to_transform."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
import tiny

from fedjax_llm import adapters, export, generate, train
from fedjax_llm.adapters import picked
from fedjax_llm.models import tenants
from fedjax_llm.run import warm
from fedjax_llm.types import Error

NUM = 3
TARGETS = ('q_proj', 'up_proj')


@functools.cache
def _model():
  return tiny.loaded(NUM)


def _filled(params, seed=0):
  """The adapter with factors that are not zero."""
  rng = np.random.default_rng(seed)

  def node(x):
    normal = lambda y: jnp.asarray(0.3 * rng.normal(size=y.shape), jnp.float32)
    return x._replace(a=normal(x.a), b=normal(x.b))

  low = lambda x: hasattr(x, 'factors')
  each = lambda x: node(x) if low(x) else x
  return jax.tree.map(each, params, is_leaf=low)


def _adapter(**fields):
  return adapters.lora(rank=2, targets=TARGETS, **fields)


def _hidden(base, params):
  return _model().model.hidden(base, params, tiny.texts(2))


def test_the_other_layers_are_those_of_the_base():
  base = _model().base
  some = _filled(_adapter(layers=[0, 2]).init(jax.random.key(0), base))
  assert {x.shape[0] for x in jax.tree.leaves(some)} == {2}
  whole = picked.spread(some, base)
  node = whole['layers']['self_attn']['q_proj']
  assert node.a.shape[0] == NUM and not node.b[1].any()
  merged = adapters.merge(base, some)
  for path in (('self_attn', 'q_proj'), ('mlp', 'up_proj')):
    low = functools.reduce(lambda t, k: t[k], path, some['layers'])
    of = lambda tree, path=path: functools.reduce(
      lambda t, k: t[k], path, tree['layers']
    )['kernel']
    moved = np.asarray(of(merged) - of(base), np.float64)
    assert not moved[1].any()
    wanted = np.einsum('ldr,lrf->ldf', low.a, low.b) * 8  # alpha / rank
    np.testing.assert_allclose(moved[[0, 2]], wanted, rtol=1e-4, atol=1e-5)
  beside = _hidden(base, some)
  np.testing.assert_allclose(beside, _hidden(merged, {}), atol=2e-4)


def test_all_layers_start_and_draw_as_none():
  base, key = _model().base, jax.random.key(0)
  every = _adapter(layers=range(NUM)).init(key, base)
  tiny.close(picked.spread(every, base), _adapter().init(key, base), 0, 0)
  some = _adapter(layers='[12]').init(key, base)['layers']['mlp']['up_proj'].a
  whole = _adapter().init(key, base)['layers']['mlp']['up_proj'].a
  np.testing.assert_array_equal(some, whole[1:])


def test_residuals_fold_into_the_picked_layers():
  base = _model().base
  some = adapters.federa(rank=2, targets='q_proj', layers=[1])
  params = some.init(jax.random.key(0), base)
  folded, left = some.fold(base, params)
  assert left['layers']['self_attn']['q_proj'].residual is None
  assert picked.of(left).tolist() == [1]
  moved = folded['layers']['self_attn']['q_proj']['kernel']
  moved = moved - base['layers']['self_attn']['q_proj']['kernel']
  assert [bool(jnp.any(x)) for x in moved] == [False, True, False]
  np.testing.assert_allclose(
    _hidden(folded, left), _hidden(base, {}), atol=1e-4
  )


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'layers': [3]}, 'adapter.layers names the layer 3; the model has the '),
    ({'layers': [-1]}, 'adapter.layers names the layer -1; the model has the '),
    ({'layers': 'x'}, "adapter.layers: 'x' names none of the layers 0 to 2."),
    ({'layers': []}, r'adapter.layers: \[\] names none of the layers 0 to 2.'),
    ({'layers': '['}, r"adapter.layers: '\[' is no regular expression"),
  ],
)
def test_wrong_layers_are_refused(fields, message):
  with pytest.raises(Error, match=message):
    _adapter(**fields).init(jax.random.key(0), _model().base)


def test_targets_outside_the_layers_and_gates_are_refused():
  base = _model().base
  with pytest.raises(Error, match='the target lm_head lies in no layer'):
    head = adapters.lora(rank=2, targets=['q_proj', 'lm_head'], layers=[0])
    head.init(jax.random.key(0), base)
  with pytest.raises(Error, match='this method leaves layers out by itself'):
    adapters.gates.added(_adapter(layers=[0]).init(jax.random.key(0), base))


def test_adapters_of_some_layers_share_a_batch():
  base = _model().base
  some = _filled(_adapter(layers=[1]).init(jax.random.key(0), base))
  stack = tenants.stack(base, [some])
  alone = picked.spread(some, base)['layers']['mlp']['up_proj']
  np.testing.assert_array_equal(
    stack['layers']['mlp']['up_proj'].b[:, 0], alone.b
  )


def test_a_warm_start_takes_the_picked_layers():
  base = _model().base
  mine = _adapter(layers=[0, 1]).init(jax.random.key(0), base)
  other = _adapter(layers=[1]).init(jax.random.key(1), base)
  trained = picked.spread(_filled(other), base)
  warm._check_layers(trained, mine['layers']['picked'], 'x')
  start = warm.fitted(mine, picked.gather(trained, picked.of(mine)), 'x')
  tiny.close(_hidden(base, start), _hidden(base, trained), 1e-5)
  node = start['layers']['mlp']['up_proj']
  np.testing.assert_array_equal(
    node.a[0], mine['layers']['mlp']['up_proj'].a[0]
  )
  with pytest.raises(
    Error, match=r'x changes the layers \[1\], which adapter.'
  ):
    warm._check_layers(trained, np.array([0, 2]), 'x')


def test_a_run_writes_what_peft_reads(tmp_path):
  """Layers and dropout in the config, tensors of one layer; export, resume."""
  folder = tmp_path / 'run'
  fields = {
    'num_rounds': 1,
    'adapter.layers': '[1]',
    'adapter.lora_dropout': 0.5,
    'adapter.targets': 'q_proj',
    'cohort.num_steps': 1,
    'clients.cohort_size': 2,
    'evals.samples': 0,
    'population.max_clients': 3,
    'population.new_clients': 0,
    'evals.every': 9,
  }
  words = [f'--config.{k}={v}' for k, v in fields.items()]
  config = ['--config', f'{runs.ROOT}/configs/tiny.py:smoke']
  runs.done(train, [*config, '--workdir', folder, *words])
  for out in (folder / 'adapter', tmp_path / 'out'):
    if out.name == 'out':
      runs.done(export, ['--workdir', folder, '--to', 'peft', '--out', out])
    conf = json.loads((out / 'adapter_config.json').read_text())
    assert conf['layers_to_transform'] == [1]
    assert conf['lora_dropout'] == 0.5
    tensors = safetensors.numpy.load_file(out / 'adapter_model.safetensors')
    start = 'base_model.model.model.layers.1.self_attn.q_proj.lora_'
    assert sorted(tensors) == [f'{start}{x}.weight' for x in 'AB']
    assert np.any(tensors[f'{start}B.weight'])
  words = ['--workdir', folder, '--prompt', 'a', '--max-new-tokens', '2']
  runs.done(generate, words)
