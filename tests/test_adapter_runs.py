"""Runs whose adapter is no LoRA: train, plan, export, and their refusals."""

import contextlib
import io
import json

import numpy as np
import pytest
import safetensors.numpy
from runs import texts

from fedjax_llm import export, models, plan, train
from fedjax_llm.adapters import peft
from fedjax_llm.run import rebuild

SMALL = {
  'model.hidden_size': 16,
  'model.intermediate_size': 16,
  'model.num_layers': 1,
  'model.num_heads': 2,
  'num_rounds': 1,
  'clients.cohort_size': 2,
  'population.new_clients': 0,
  'evals.samples': 0,
  'data.name': 'jsonl',
  'data.client_key': 'client',
  'data.text_key': 'text',
}


def run(program, *words):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = program.main([str(word) for word in words])
  return status, out.getvalue(), err.getvalue()


def config(tmp_path, adapter, **fields):
  fields = {f'adapter.{k}': v for k, v in {'name': adapter, **fields}.items()}
  path = texts(tmp_path / 'texts.jsonl')
  fields = {**SMALL, 'data.path': path, **fields}
  words = [f'--config.{name}={value}' for name, value in fields.items()]
  return ['--config', 'configs/tiny.py:smoke', *words]


def test_a_soft_prompt_from_a_text_is_trained_and_exported(tmp_path):
  folder, out = tmp_path / 'run', tmp_path / 'out'
  words = config(tmp_path, 'soft_prompt', length=3, init='text', text='fox')
  status, text, error = run(train, *words, '--workdir', folder)
  assert status == 0, error
  size = 3 * 16 * 4  # the rows, in float32
  assert f'{2 * size} B up' in text or f'{2 * size:,} B up' in text, text
  fields = json.loads((folder / 'adapter' / peft.CONFIG).read_text())
  assert fields['peft_type'] == 'PROMPT_TUNING'
  made = rebuild.open(str(folder))
  rows = made.params['inputs'].rows
  start = made.loaded.base['embed_tokens']['embedding'][np.asarray([*b'fox'])]
  assert 0 < np.abs(rows - start).max() < 0.2
  file = folder / 'adapter' / peft.WEIGHTS
  saved = safetensors.numpy.load_file(file)['prompt_embeddings']
  np.testing.assert_array_equal(saved, rows)

  to = lambda kind: ['--workdir', folder, '--to', kind, '--out', out / kind]
  status, text, error = run(export, *to('peft'))
  assert (status, error) == (0, '') and 'of the kind PROMPT_TUNING' in text
  again = safetensors.numpy.load_file(out / 'peft' / peft.WEIGHTS)
  np.testing.assert_array_equal(again['prompt_embeddings'], rows)
  base = models.pretrained(out / 'peft' / 'base')
  assert base.config.hidden_size == 16
  status, _, error = run(export, *to('merged'))
  assert status == 1 and 'so it cannot be written into a weight' in error
  status, _, error = run(export, *to('peft')[:-1], out / 'other', '--rank', 2)
  assert status == 1 and '--rank is of low-rank adapters' in error


@pytest.mark.parametrize(
  'adapter, fields, reason',
  [
    ('soft_prompt', {'length': 99999}, 'A prompt of 99999 rows in front of'),
    ('prefix', {'length': 99999}, 'lower adapter.length or population.max_'),
    ('ia3', {'targets': 'query'}, "adapter.targets: 'query' matches no weight"),
    ('ia3', {'feedforward': 'fc'}, "adapter.feedforward: 'fc' matches no wei"),
    ('bitfit', {}, 'the model has no biases, so adapter.name=bitfit'),
    ('ia3', {'targets': 'k_proj'}, 'adapter.targets does not'),
  ],
)
def test_an_adapter_that_cannot_hold_is_refused(
  tmp_path, adapter, fields, reason
):
  words = config(tmp_path, adapter, **fields)
  status, _, error = run(train, *words, '--workdir', tmp_path / 'run')
  assert status == 1 and reason in error and error.count('\n') == 1


@pytest.mark.parametrize(
  'adapter, numbers',
  [
    ('prefix', 2 * 16 * 16),
    ('ia3', 16 + 16 + 16),
    ('prompt_pool', 10 * 5 * 16 + 10 * 16 + 5),  # the last are of a shape
  ],
)
def test_the_planner_counts_what_is_sent(tmp_path, adapter, numbers):
  words = config(tmp_path, adapter)
  status, text, error = run(plan, *words)
  assert status == 0, error
  assert str(numbers) in text
