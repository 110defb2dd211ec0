"""PEFT adapters of families whose modules hold several of our targets."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import adapters, models
from fedjax_llm.adapters import peft
from fedjax_llm.adapters.peft import fused
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Error

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FUSED = ('gpt2', 'phi3', 'gpt_neox')


def saving(config) -> dict[str, Any]:
  return dict(
    module_name=lambda path, layer: families.hf_module_name(
      path, layer, config, part=True
    ),
    fused=lambda path: families.fused_rows(config, path),
  )


def loading(config) -> dict[str, Any]:
  return dict(
    path_of=lambda name: families.our_paths(name, config),
    fused=lambda path: families.fused_rows(config, path),
  )


@pytest.mark.parametrize('name', [*FUSED, 'roberta_masked_lm'])
def test_the_adapter_of_peft_gives_the_logits_of_peft(name):
  loaded = models.pretrained(GOLDEN / 'models' / name)
  directory = GOLDEN / 'adapters' / name
  params = peft.load(directory, **loading(loaded.config))
  golden = np.load(directory / 'logits.npz')
  tokens = golden['tokens']
  ones = np.ones_like(tokens)
  places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

  @jax.jit
  def run(params):
    batch = Batch(tokens, ones > 0, ones, places)
    hidden = loaded.model.hidden(loaded.base, params, batch)
    return loaded.model.logits(loaded.base, params, hidden)

  scale = np.abs(golden['logits']).max()
  np.testing.assert_allclose(
    run(params), golden['logits'], rtol=0, atol=1e-5 * scale
  )
  merged = adapters.merge(loaded.base, params)
  change = jax.tree.map(
    lambda x, y: float(np.abs(x - y).max()), merged, loaded.base
  )
  attention = change['layers']['self_attn']
  assert attention['q_proj']['kernel'] > 0 < attention['v_proj']['kernel']


def random_factors(config, targets, seed=0, rank=2, scale=1.5):
  rng = np.random.default_rng(seed)
  shapes = config_lib.shapes(config)['layers']
  params = {}
  for group, target in targets:
    layers, d, f = shapes[group][target]['kernel']
    params.setdefault(group, {})[target] = LowRank(
      jnp.asarray(rng.normal(size=(layers, d, rank)), jnp.float32),
      jnp.asarray(rng.normal(size=(layers, rank, f)), jnp.float32),
      jnp.full([layers], scale),
    )
  return {'layers': params}


QKV = [('self_attn', f'{x}_proj') for x in 'qkv']


@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize(
  'targets', [QKV, [QKV[0], QKV[2]], [*QKV[1:], ('mlp', 'up_proj')]]
)
def test_adapters_of_parts_come_back_bit_by_bit(tmp_path, name, targets):
  config = families.read_config(GOLDEN / 'models' / name)
  params = random_factors(config, targets)
  peft.save(tmp_path / 'x', params, base_model='m', **saving(config))
  again = peft.load(tmp_path / 'x', **loading(config))
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  # One adapter a module of theirs, of the sum of the ranks.
  written = safetensors.numpy.load_file(tmp_path / 'x' / peft.WEIGHTS)
  parts = [t for t in targets if t in QKV]
  a = next(
    x for n, x in written.items() if n.endswith('A.weight') and 'mlp' not in n
  )
  assert a.shape[0] == 2 * len(parts)


def test_parts_of_unequal_scale_and_rank_compute_the_same(tmp_path):
  config = families.read_config(GOLDEN / 'models' / 'gpt2')
  params = random_factors(config, QKV[:2])
  other = random_factors(config, QKV[2:], seed=1, rank=3, scale=0.7)
  params['layers']['self_attn'].update(other['layers']['self_attn'])
  peft.save(tmp_path / 'x', params, base_model='m', **saving(config))
  again = peft.load(tmp_path / 'x', **loading(config))
  for _, target in QKV:
    one, two = (p['layers']['self_attn'][target] for p in (params, again))
    np.testing.assert_allclose(
      adapters.product(one), adapters.product(two), atol=1e-5
    )


def test_layers_of_unequal_rank_keep_all_of_their_fused_adapter():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layers = [fused.Factors(draw(4, r), draw(r, 6), 1.0) for r in (2, 4)]
  rows = [np.arange(3), np.arange(3, 6)]
  for part, features in zip(fused.split(layers, rows), rows):
    for one, whole in zip(part, layers):
      np.testing.assert_array_equal(one.a, whole.a)
      np.testing.assert_array_equal(one.b, whole.b[:, features])


def test_an_adapter_that_has_not_learnt_yet_fits_its_template(tmp_path):
  loaded = models.pretrained(GOLDEN / 'models' / 'phi3')
  adapter = adapters.lora(rank=2, targets=['q_proj', 'v_proj', 'o_proj'])
  params = adapter.init(jax.random.key(0), loaded.base)
  peft.save(tmp_path / 'x', params, base_model='m', **saving(loaded.config))
  again = peft.load(tmp_path / 'x', template=params, **loading(loaded.config))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  # Without one it may be PEFT's own: nothing of it is thrown away.
  alone = peft.load(tmp_path / 'x', **loading(loaded.config))
  assert alone['layers']['self_attn']['k_proj'].a.shape[-1] == 4


def test_parts_are_refused_where_nobody_says_how_they_lie(tmp_path):
  config = families.read_config(GOLDEN / 'models' / 'gpt2')
  params = random_factors(config, QKV)
  plain = lambda p, i: families.hf_module_name(p, i, config)
  with pytest.raises(Error, match='only a part of the module'):
    peft.save(tmp_path / 'x', params, module_name=plain, base_model='m')
  names = saving(config)
  with pytest.raises(Error, match='not the only target'):
    peft.save(
      tmp_path / 'x', params, module_name=names['module_name'], base_model='m'
    )
  peft.save(tmp_path / 'x', params, base_model='m', **names)
  with pytest.raises(Error, match='not one module of ours'):
    peft.load(
      tmp_path / 'x', path_of=lambda name: families.our_path(name, config)
    )
  with pytest.raises(Error, match='does not say where'):
    peft.load(tmp_path / 'x', path_of=loading(config)['path_of'])
