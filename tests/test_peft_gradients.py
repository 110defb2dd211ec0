"""Losses and gradients of adapted models are those of PEFT.

The golden batches hold padded rows and packed ones, longer than every sliding
window; `golden/make_training.py` wrote what torch makes of them.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from references_peft import GOLDEN, as_peft, generator, loading

from fedjax_llm import local, models
from fedjax_llm.adapters import peft
from fedjax_llm.types import Batch

BATCHES = dict(np.load(GOLDEN / 'batches.npz'))
# Adapters that PEFT wrote and the models that they are of.
ADAPTERS = {
  'lora': 'llama',
  'gemma3': 'gemma3',
  'gpt2': 'gpt2',  # Conv1D, and one module for q, k and v
  'roberta_masked_lm': 'roberta_masked_lm',
}
KINDS = ('padded', 'packed')


def data_of(kind):
  """The batch, and the labels of a masked LM [B, T]."""
  get = lambda what: BATCHES[f'{kind}/{what}']
  batch = Batch(
    get('tokens'), get('next') >= 0, get('segments'), get('positions')
  )
  return batch, get('masked')


def mean_loss(loaded, params, base, batch, masked):
  """The token mean that the model's head is trained by."""
  if loaded.config.causal:
    loss = local.causal_lm(loaded.model)
    sums = loss(base, params, batch, jax.random.key(0))
    return sums.total / sums.count
  hidden = loaded.model.hidden(base, params, batch)
  logits = loaded.model.logits(base, params, hidden)
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, jnp.maximum(masked, 0)[..., None], -1)
  seen = masked >= 0
  return -jnp.sum(picked[..., 0] * seen) / jnp.sum(seen)


@functools.cache
def program(name):
  """The model, and jitted (params, base, batch, labels) -> (loss, gradient)."""
  loaded = models.pretrained(GOLDEN / 'models' / ADAPTERS[name])
  loss = functools.partial(mean_loss, loaded)
  return loaded, jax.jit(jax.value_and_grad(loss))


def check(name, directory, wanted, kind):
  """Our loss and gradients at an adapter against those of a gradients.npz."""
  loaded, value_and_grad = program(name)
  params = peft.load(directory, **loading(loaded.config))
  value, gradient = value_and_grad(params, loaded.base, *data_of(kind))
  found = as_peft(gradient, loaded.config)
  prefix = f'{kind}/'
  theirs = {
    key.removeprefix(prefix): value
    for key, value in wanted.items()
    if key.startswith(prefix)
  }
  np.testing.assert_allclose(value, theirs.pop('loss'), rtol=1e-5)
  assert found.keys() == theirs.keys()
  for key, value in theirs.items():
    size = np.abs(value).max()
    assert size > 1e-4, key
    np.testing.assert_allclose(
      found[key], value, rtol=0, atol=1e-4 * size, err_msg=key
    )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ADAPTERS)
def test_gradients_of_the_factors_are_those_of_peft(name, kind):
  directory = GOLDEN / 'adapters' / name
  check(name, directory, dict(np.load(directory / 'gradients.npz')), kind)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize('name', ADAPTERS)
def test_gradients_are_those_of_the_peft_that_is_installed(tmp_path, name):
  """The same at factors that no file holds."""
  pytest.importorskip('torch')
  pytest.importorskip('peft')
  theirs = generator('make_training')
  directory = shutil.copytree(GOLDEN / 'adapters' / name, tmp_path / name)
  tensors = safetensors.numpy.load_file(directory / peft.WEIGHTS)
  rng = np.random.default_rng(1)
  draw = lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32)
  tensors = {key: draw(x) for key, x in tensors.items()}
  safetensors.numpy.save_file(tensors, directory / peft.WEIGHTS)
  of = GOLDEN / 'models' / ADAPTERS[name]
  wanted = theirs.gradients(directory, of, BATCHES)
  for kind in KINDS:
    check(name, directory, wanted, kind)


def test_windows_are_shorter_than_the_texts_that_are_compared():
  longest = BATCHES['packed/positions'].max() + 1
  windows = program('gemma3')[0].config.windows
  assert 0 < max(windows) < longest and 0 in windows
