"""Small runs for tests: few clients, a network of one weight, no processes."""

import contextlib
import io
import json
import pathlib

from fedjax_llm import models
from fedjax_llm.types import Model

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ('the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog')


def texts(path, clients=('ann', 'bob', 'cyd', 'dan', 'eve', 'fay')):
  """Writes eight short texts of each client; the path."""
  lines = [
    {
      'client': client,
      'text': ' '.join(WORDS[(i * j + k) % 9] for j in range(1, 5)),
    }
    for k, client in enumerate(clients)
    for i in range(8)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def shallow(vocab_size, eos_ids):
  """A network of the query weights of one layer: compiled in no time."""
  loaded = models.random(
    vocab_size=vocab_size,
    eos_ids=eos_ids,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
  )

  def hidden(base, params, batch):
    query = lambda tree: tree['layers']['self_attn']['q_proj']
    x, node = base['embed_tokens']['embedding'][batch.tokens], query(params)
    change = node.scale[0] * ((x @ node.a[0]) @ node.b[0])
    return x + x @ query(base)['kernel'][0] + change

  def logits(base, params, hidden):
    return hidden @ base['lm_head']['kernel']

  return loaded._replace(model=Model(hidden, logits))


def arguments(data, folder, *more, **fields):
  """The command line of a run; `a__b=1` is the field a.b."""
  given = {
    'data.name': 'jsonl',
    'data.path': data,
    'data.client_key': 'client',
    'data.text_key': 'text',
    'population.max_clients': 'none',
    'population.new_clients': 0,
    'model.name': f'{__name__}:shallow',
    'adapter.targets': 'q_proj',
    'cohort.num_steps': 1,
    'clients.cohort_size': 2,
    'local.name': 'sgd',
    'evals.samples': 0,
    **{name.replace('__', '.'): value for name, value in fields.items()},
  }
  words = [f'--config.{k}={v}' for k, v in given.items()]
  config = f'{ROOT}/configs/tiny.py:smoke'
  return ['--config', config, '--workdir', str(folder), *words, *more]


def run(program, words):
  """Status, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = program.main([str(word) for word in words])
  return status, out.getvalue(), err.getvalue()


def done(program, words):
  """What a program prints that ends well."""
  status, out, err = run(program, words)
  assert status == 0, err
  return out


def refused(program, words):
  """The one sentence that a program says instead."""
  status, _, err = run(program, words)
  assert status == 1, err
  last = err.splitlines()[-1]
  assert last.startswith('error: ') and 'not foreseen' not in last, err
  return last


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
  """All that is in a folder, and when it changed."""
  return {
    path.relative_to(folder): (
      path.read_bytes() if path.is_file() else None,
      path.stat().st_mtime_ns,
    )
    for path in [folder, *folder.rglob('*')]
  }
