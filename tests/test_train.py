"""The program: what a run leaves, how it resumes, and what it refuses."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, checkpoint, data, models, train, workdir
from fedjax_llm.adapters import peft
from fedjax_llm.types import Batch

ROOT = pathlib.Path(__file__).parents[1]
WORDS = 'the quick brown fox jumps over a lazy dog and then some'.split()
TIMES = ('time/',)


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  """Compiled programs that all runs of this file share, processes included."""
  settings = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  from jax.experimental.compilation_cache import compilation_cache

  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {**os.environ, **{k.upper(): str(v) for k, v in settings.items()}}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """60 short texts of 6 clients, in every form and with a label."""
  path = tmp_path_factory.mktemp('data') / 'texts.jsonl'
  lines = []
  for i in range(60):
    said = ' '.join(WORDS[(i * j) % 12] for j in range(1, 5))
    turns = [
      {'role': 'user', 'content': WORDS[i % 12]},
      {'role': 'assistant', 'content': said},
    ]
    lines.append(
      {
        'client': f'c{i % 6}',
        'label': 'xyz'[i % 3],
        'text': said,
        'question': WORDS[i % 12],
        'messages': turns,
      }
    )
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def command(texts, folder, *more):
  given = {
    'data.name': 'jsonl',
    'data.path': texts,
    'data.client_key': 'client',
    'data.text_key': 'text',
    'population.max_clients': 'none',
    'model.hidden_size': 32,
    'model.num_heads': 2,
    'adapter.targets': "('q_proj','v_proj')",
    'evals.samples': 0,
  }
  fields = [f'--config.{k}={v}' for k, v in given.items()]
  config = f'{ROOT}/configs/tiny.py:smoke'
  return ['--config', config, '--workdir', str(folder), *fields, *more]


def run(arguments):
  """Status, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = train.main(arguments)
  return status, out.getvalue(), err.getvalue()


def done(arguments):
  status, out, err = run(arguments)
  assert status == 0, err
  return out


def records(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def outcome(folder):
  """What must be the same however often a run was interrupted."""
  told = [
    {k: v for k, v in record.items() if not k.startswith('time/')}
    for record in records(folder)
  ]
  weights = (folder / 'adapter' / 'adapter_model.safetensors').read_bytes()
  return [json.dumps(record) for record in told], weights


def everything(folder):
  return {
    path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.rglob('*')
    if path.is_file()
  }


# ------------------------------------------------------------------ record --


METHODS = {
  'fed_avg': ['--config.algorithm.name=fed_avg'],
  'scaffold': ['--config.algorithm.name=scaffold', '--config.local.name=sgd'],
  'local_only': ['--config.algorithm.name=local_only'],
}


@pytest.fixture(scope='module')
def whole(texts, tmp_path_factory):
  """Runs of 6 rounds that nothing interrupted, and what they printed."""
  runs = {}
  for name, method in METHODS.items():
    folder = tmp_path_factory.mktemp('whole') / name
    more = [*method, '--config.num_rounds=6']
    if name == 'fed_avg':
      more.append('--config.evals.samples=2')
    runs[name] = folder, done(command(texts, folder, *more))
  return runs



def test_a_run_leaves_its_record(whole):
  folder, printed = whole['fed_avg']
  config = json.loads((folder / 'config.json').read_text())
  assert config['local']['b2'] == 0.999  # a default of optax
  assert config['adapter']['rank'] == 4
  told = records(folder)
  assert [record['round'] for record in told] == list(range(7))
  assert [r for r in range(7) if 'evals/heldout/loss' in told[r]] == [0, 4, 6]
  for record in told[1:]:
    assert record['local/loss'] > 0 and record['local/update_norm'] > 0
    assert record['uploads/bytes'] == record['downloads/bytes'] > 0
    assert record['clients/reporting'] == 4
    assert record['time/tokens_per_second'] > 0
    assert {'time/data', 'time/round', 'time/evals'} <= set(record)
  assert told[6]['evals/heldout/loss'] < told[0]['evals/heldout/loss']
  assert (folder / 'adapter' / 'adapter_config.json').exists()
  assert list((folder / 'tensorboard').glob('events.out.tfevents.*'))
  rounds = [p.name for p in sorted((folder / 'checkpoints').iterdir())]
  assert rounds == ['round_00000005', 'round_00000006']


def test_the_last_words_are_losses_bytes_and_replies(whole):
  folder, printed = whole['fed_avg']
  told = records(folder)
  first, last = (told[i]['evals/heldout/loss'] for i in (0, 6))
  (line,) = [x for x in printed.splitlines() if x.startswith('held-out loss')]
  assert line.split()[-3:] == [f'{x:.4f}' for x in (first, last, last - first)]
  sent = sum(record.get('uploads/bytes', 0) for record in told)
  assert f'{sent / 1000:.3g} kB up' in printed
  for who in ('prompt', 'client', 'before', 'after'):
    assert printed.count(f'\n  {who} ') == 2
  # The random model talks in bytes, of which none may move the cursor.
  assert all(c.isprintable() for c in printed if c != '\n')


def test_the_exported_adapter_gives_the_served_logits(whole):
  folder, _ = whole['fed_avg']
  loaded = models.pretrained(folder / 'base')
  config = json.loads((folder / 'adapter' / 'adapter_config.json').read_text())
  assert config['base_model_name_or_path'] == str(folder / 'base')
  saved = peft.load(
    folder / 'adapter',
    path_of=lambda name: models.families.path_of(name, loaded.config),
  )
  served = last_state(folder)['params']
  ids = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
  ones = np.ones_like(ids)
  batch = Batch(ids, ones > 0, ones, np.arange(12)[None] * ones)
  hear = lambda params: loaded.model.logits(
    loaded.base, params, loaded.model.hidden(loaded.base, params, batch)
  )
  np.testing.assert_allclose(hear(saved), hear(served), rtol=0, atol=1e-6)
  assert not np.allclose(hear(saved), hear({}), atol=1e-3)
