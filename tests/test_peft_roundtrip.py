"""Adapters of every family go out to PEFT and come back."""

import functools
import json

import jax
import numpy as np
import pytest
from references_peft import (
  GOLDEN,
  NAMES,
  federated_round,
  in_peft,
  loading,
  outputs,
  random_adapter,
  relative,
  saving,
  texts,
)

from fedjax_llm import adapters, models
from fedjax_llm.adapters import peft
from fedjax_llm.models import families

# Made by PEFT, then trained for a round and exported by us.
TRAINED = {'lora': 'llama', 'gpt2': 'gpt2'}


def assert_equal(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ------------------------------------------------------------------- files --


@pytest.mark.parametrize('use_rslora', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_adapters_of_all_matrices_come_back_bit_by_bit(
  tmp_path, name, use_rslora
):
  config = families.read_config(GOLDEN / 'models' / name)
  params = random_adapter(config)
  peft.save(
    tmp_path / 'x',
    params,
    base_model=name,
    use_rslora=use_rslora,
    **saving(config),
  )
  told = json.loads((tmp_path / 'x' / peft.CONFIG).read_text())
  assert told['rank_pattern'] and told['alpha_pattern']
  assert told['use_rslora'] == use_rslora
  again = peft.load(tmp_path / 'x', template=params, **loading(config))
  assert_equal(again, params)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize('name', NAMES)
def test_peft_computes_what_we_compute(tmp_path, name):
  pytest.importorskip('torch')
  pytest.importorskip('peft')
  directory = GOLDEN / 'models' / name
  loaded = models.pretrained(directory)
  golden = np.load(directory / 'logits.npz')
  batch = texts(golden['tokens'], golden['lengths'])
  params = random_adapter(loaded.config)
  run = jax.jit(functools.partial(outputs, loaded))
  found = run(loaded.base, params, batch)
  assert relative(run(loaded.base, {}, batch), found, batch) > 0.02
  for use_rslora in (False, True):
    out = tmp_path / str(use_rslora)
    peft.save(
      out,
      params,
      base_model=str(directory),
      use_rslora=use_rslora,
      **saving(loaded.config),
    )
    wanted = in_peft(directory, out, batch)
    assert relative(found, wanted, batch) < 1e-5


# ----------------------------------------------------------- a round between --


@functools.cache
def trained(name):
  """(model, PEFT's adapter, ours after a round, jitted outputs)."""
  loaded, start, end = federated_round(name, LIVE[name])
  return loaded, start, end, jax.jit(functools.partial(outputs, loaded))


LIVE = {**TRAINED, 'phi3': 'phi3', 'gpt_neox': 'gpt_neox'}
BATCH = texts(np.arange(3, 27).reshape(2, 12), np.array([12, 12]))


@pytest.mark.parametrize('name', TRAINED)
def test_an_adapter_of_peft_survives_a_federated_round(tmp_path, name):
  """The file is that of the golden export, on which PEFT computed."""
  loaded, start, end, run = trained(name)
  export = GOLDEN / 'trained' / name
  golden = np.load(export / 'logits.npz')
  np.testing.assert_array_equal(golden['tokens'], BATCH.tokens)

  peft.save(tmp_path / 'x', end, base_model='m', **saving(loaded.config))
  again = peft.load(tmp_path / 'x', template=end, **loading(loaded.config))
  assert_equal(again, end)
  known = peft.load(export, template=end, **loading(loaded.config))
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, again, known)

  found = run(loaded.base, known, BATCH)
  assert relative(found, golden['logits'], BATCH) < 1e-5
  np.testing.assert_allclose(found, golden['logits'], rtol=0, atol=1e-4)
  # The round said something.
  moved = relative(run(loaded.base, start, BATCH), golden['logits'], BATCH)
  assert moved > 1e-3
  merged = adapters.merge(loaded.base, known)
  assert relative(run(merged, {}, BATCH), golden['logits'], BATCH) < 1e-5


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', LIVE)
def test_peft_reads_what_a_federated_round_trained(tmp_path, name):
  pytest.importorskip('torch')
  pytest.importorskip('peft')
  loaded, _, end, run = trained(name)
  model = GOLDEN / 'models' / LIVE[name]
  peft.save(tmp_path / 'x', end, base_model=str(model), **saving(loaded.config))
  wanted = in_peft(model, tmp_path / 'x', BATCH)
  found = run(loaded.base, end, BATCH)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
