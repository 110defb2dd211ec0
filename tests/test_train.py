"""The program: what a run leaves, how it resumes, and what it refuses."""

import collections
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

from fedjax_llm import data, models, report, train
from fedjax_llm.adapters import peft
from fedjax_llm.run import checkpoint, experiment, tasks
from fedjax_llm.types import Batch, Model

ROOT = pathlib.Path(__file__).parents[1]
WORDS = 'the quick brown fox jumps over a lazy dog and then some'.split()  # noqa: SIM905


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


def shallow(vocab_size, eos_ids):
  """Only the query weights of one layer: compiled in no time."""
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


def quick(texts, folder, *more):
  """The command with the shallow model."""
  given = [x for x in command(texts, folder) if '.model.' not in x]
  model = f'--config.model.name={__name__}:shallow'
  return [*given, '--config.adapter.targets=q_proj', model, *more]


# ------------------------------------------------------------------ record --


def method(name, texts, folder, rounds=6):
  """One of three methods: without client state, with it, with nothing else."""
  fields = [f'--config.num_rounds={rounds}', f'--config.algorithm.name={name}']
  if name == 'fed_avg':
    return command(texts, folder, *fields)  # a transformer, once
  local = ['--config.local.name=sgd'] if name == 'scaffold' else []
  return quick(texts, folder, *fields, *local)


METHODS = ('fed_avg', 'scaffold', 'local_only')


@pytest.fixture(scope='module')
def whole(texts, tmp_path_factory):
  """Runs of 6 rounds that nothing interrupted, and what they printed."""
  runs = {}
  for name in METHODS:
    folder = tmp_path_factory.mktemp('whole') / name
    runs[name] = folder, done(method(name, texts, folder))
  return runs


@pytest.fixture(scope='module')
def shown(texts, tmp_path_factory):
  """A run that shows replies; what it printed, and what was last saved."""
  folder, saved = tmp_path_factory.mktemp('shown') / 'run', {}
  opened = checkpoint.open

  def watched(*args, **keywords):
    saver = opened(*args, **keywords)

    def save(number, state, meta, keep):
      saved.update(jax.device_get(state.params))
      saver.save(number, state, meta, keep)

    return saver._replace(save=save)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, 'open', watched)
    arguments = command(texts, folder, '--config.evals.samples=2')
    return folder, done(arguments), saved, arguments


def test_a_run_leaves_its_record(whole):
  folder, _ = whole['fed_avg']
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
  table = (folder / 'metrics.csv').read_text().splitlines()
  assert table[0].startswith('round,') and len(table) == 8
  held = json.loads((folder / 'clients.json').read_text())
  assert set(held['clients']) == set(told[0]['evals/heldout/clients'])
  assert set(held['new']) == set(told[0]['evals/new/clients'])
  assert all(own['examples'] >= 1 for own in held['clients'].values())
  rounds = [p.name for p in sorted((folder / 'checkpoints').iterdir())]
  assert rounds == ['round_00000005', 'round_00000006']


def test_the_last_words_are_losses_bytes_and_replies(shown):
  folder, printed, _, _ = shown
  told = records(folder)
  first, last = (told[i]['evals/heldout/loss'] for i in (0, 2))
  (line,) = [x for x in printed.splitlines() if x.startswith('held-out loss')]
  assert line.split()[-3:] == [f'{x:.4f}' for x in (first, last, last - first)]
  sent = sum(record.get('uploads/bytes', 0) for record in told)
  assert f'{sent / 1000:.3g} kB up' in printed
  for who in ('prompt', 'client', 'before', 'after'):
    assert printed.count(f'\n  {who:7} ') + printed.startswith('  ') == 2
  kept = json.loads((folder / 'samples.json').read_text())
  assert kept['round'] == 2 and len(kept['samples']) == 2
  for sample in kept['samples']:
    assert sample['client'] in told[0]['evals/heldout/clients']
    first = sample['reply'].strip().split('\n')[0]
    assert f'  client  {first}' in printed
  # The random model talks in bytes, of which none may move the cursor.
  assert all(c.isprintable() for c in printed if c != '\n')


def test_the_report_of_a_run_shows_its_losses_and_replies(shown):
  pytest.importorskip('matplotlib')
  folder, _, _, _ = shown
  page = report.page(folder)
  assert 'finished, 2 rounds' in page
  for loss in (records(folder)[i]['evals/heldout/loss'] for i in (0, 2)):
    assert f'<td class="number">{loss:.4f}</td>' in page
  for name in ('loss-rounds', 'clients-loss', 'error-layers', 'stations'):
    assert f'<figure id="{name}">' in page
  kept = json.loads((folder / 'samples.json').read_text())
  assert f'<h3>{kept["samples"][0]["client"]}</h3>' in page


def test_the_exported_adapter_gives_the_served_logits(shown):
  folder, _, served, _ = shown
  loaded = models.pretrained(folder / 'base')
  config = json.loads((folder / 'adapter' / 'adapter_config.json').read_text())
  assert config['base_model_name_or_path'] == str(folder / 'base')
  saved = peft.load(
    folder / 'adapter',
    path_of=lambda name: models.families.our_path(name, loaded.config),
  )
  ids = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
  ones = np.ones_like(ids)
  batch = Batch(ids, ones > 0, ones, np.arange(12)[None] * ones)
  hear = lambda params: loaded.model.logits(
    loaded.base, params, loaded.model.hidden(loaded.base, params, batch)
  )
  np.testing.assert_allclose(hear(saved), hear(served), rtol=0, atol=1e-6)
  assert not np.allclose(hear(saved), hear({}), atol=1e-3)


def test_a_finished_run_is_left_as_it_is(shown, monkeypatch):
  folder, printed, _, arguments = shown
  before = everything(folder)
  monkeypatch.setattr(data.population, 'build', None)  # is not even asked
  again = done(arguments)
  assert 'this run is finished' in again
  assert printed.rstrip().endswith(again.rsplit('\n', 2)[0][-200:])
  assert everything(folder) == before


def test_personal_models_are_compared_with_what_was_served_before(whole):
  folder, printed = whole['local_only']
  told = records(folder)
  (own,) = [
    x for x in printed.splitlines() if x.startswith('own model, client')
  ]
  first = told[0]['evals/heldout/client_mean']
  last = told[-1]['evals/personal/own/client_mean']
  assert own.split()[-3:] == [f'{x:.4f}' for x in (first, last, last - first)]
  (other,) = [x for x in printed.splitlines() if x.startswith('own model, ev')]
  first = told[0]['evals/common/loss']
  last = told[-1]['evals/personal/common/client_mean']
  assert other.split()[-3:] == [f'{x:.4f}' for x in (first, last, last - first)]
  assert told[1]['uploads/bytes'] == 0


def test_without_held_out_text_the_run_says_so(texts, tmp_path):
  folder = tmp_path / 'run'
  nobody = ['--config.population.heldout_fraction=0']
  nobody += ['--config.population.new_clients=0', '--config.evals.samples=2']
  nobody += ['--config.clients.dropout=0.6']
  printed = done(quick(texts, folder, *nobody))
  losses = [record['local/loss'] for record in records(folder)[1:]]
  assert f'{losses[0]:.4f} first, {losses[-1]:.4f} last' in printed
  assert 'held-out loss' not in printed
  told = records(folder)[1]
  assert told['clients/dropped_out'] == 4 - told['clients/reporting'] > 0


def test_a_round_without_anybody_says_so(texts, tmp_path):
  nobody = ['--config.clients.availability=0.01']
  status, _, err = run(quick(texts, tmp_path / 'run', *nobody))
  assert status == 0
  assert 'round 1: no client reported, so nothing changed' in err
  told = records(tmp_path / 'run')[1]
  assert told['clients/unavailable'] == 4
  assert told['local/loss'] is None
  assert told['server/step_norm'] == 0
  held = json.loads((tmp_path / 'run' / 'clients.json').read_text())
  assert held['unit'] == 'token'


# ------------------------------------------------------------------ resume --


def test_more_rounds_go_on_where_the_run_ended(texts, tmp_path, whole):
  folder = tmp_path / 'run'
  done(method('scaffold', texts, folder, rounds=4))
  printed = done(method('scaffold', texts, folder))
  assert 'resuming after round 4' in printed
  assert outcome(folder) == outcome(whole['scaffold'][0])
  status, _, err = run(method('scaffold', texts, folder, rounds=5))
  assert (status, err.count('\n')) == (1, 1)
  assert 'is at round 6' in err
  assert outcome(folder) == outcome(whole['scaffold'][0])


@pytest.fixture(scope='module')
def killed(texts, whole, programs, tmp_path_factory):
  """Runs in processes that were killed, two of them twice, at random."""
  rng = random.Random(0)
  folders = {m: tmp_path_factory.mktemp('killed') / m for m in METHODS}
  for least, methods in ((1, METHODS), (3, METHODS[1:])):
    running = {
      m: start(method(m, texts, folders[m]), programs) for m in methods
    }
    while running:
      for name in list(running):
        told = folders[name] / 'metrics.jsonl'
        if told.exists() and told.read_bytes().count(b'\n') > least:
          time.sleep(rng.random() * 0.1)  # a checkpoint takes about so long
          running[name].kill()
          assert running.pop(name).wait() == -signal.SIGKILL
      time.sleep(0.002)
  return folders


def start(arguments, environment):
  return subprocess.Popen(
    [sys.executable, '-m', 'fedjax_llm.train', *arguments],
    cwd=ROOT,
    env=environment | {'PYTHONPATH': str(ROOT / 'tests')},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize('name', METHODS)
def test_killed_and_resumed_equals_uninterrupted(texts, whole, killed, name):
  folder = killed[name]
  assert not (folder / 'adapter').exists()
  assert 'resuming after round' in done(method(name, texts, folder))
  assert outcome(folder) == outcome(whole[name][0])
  assert (folder / 'states').exists() == (name != 'fed_avg')


class Killed(BaseException):
  pass


def test_a_run_that_dies_while_it_writes_resumes(
  texts, whole, tmp_path, monkeypatch
):
  """One folder, killed again and again, each time later in its writing."""
  folder = tmp_path / 'run'
  sync, left = os.fsync, [0]

  def dies(file):
    left[0] -= 1
    if left[0] < 0:
      raise Killed
    sync(file)

  for left[0] in (5, 40, 55):
    with monkeypatch.context() as patch:
      patch.setattr(os, 'fsync', dies)
      with pytest.raises(Killed):
        run(method('local_only', texts, folder))
  done(method('local_only', texts, folder))
  assert outcome(folder) == outcome(whole['local_only'][0])


def test_sigterm_finishes_the_round_and_saves(texts, whole, programs, tmp_path):
  folder = tmp_path / 'run'
  arguments = method('scaffold', texts, folder)
  process = start([*arguments, '--config.checkpoint_every=100'], programs)
  told = folder / 'metrics.jsonl'
  while not told.exists() or told.read_bytes().count(b'\n') < 3:
    time.sleep(0.002)
  process.terminate()
  out, err = process.communicate()
  assert process.returncode == 0, err
  number = records(folder)[-1]['round']
  assert f'stopped after round {number}; the same command goes on' in out
  assert 2 <= number < 6
  assert f'resuming after round {number}' in done(arguments)
  assert outcome(folder) == outcome(whole['scaffold'][0])


def test_sigterm_before_the_rounds_ends_at_once(texts, tmp_path, monkeypatch):
  def build(*args, **keywords):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(experiment, 'build', build)
  status, out, _ = run(quick(texts, tmp_path / 'run'))
  assert status == 0
  assert 'stopped' in out
  assert not (tmp_path / 'run').exists()
  assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_a_sentence(texts, tmp_path, monkeypatch):
  def build(*args, **keywords):
    raise KeyboardInterrupt

  monkeypatch.setattr(experiment, 'build', build)
  status, _, err = run(quick(texts, tmp_path / 'run'))
  assert status == 130
  assert err.strip().startswith('stopped;')


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
  texts, whole, tmp_path
):
  folder = tmp_path / 'run'
  done(method('local_only', texts, folder, rounds=4))
  newest = folder / 'checkpoints' / 'round_00000004'
  files = [path for path in newest.rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  printed = done(method('local_only', texts, folder))
  assert f'{newest} is damaged' in printed
  assert 'resuming after round 3' in printed
  assert outcome(folder) == outcome(whole['local_only'][0])


def test_a_workdir_of_another_config_is_refused(texts, whole):
  folder, _ = whole['fed_avg']
  before = everything(folder)
  others = ['--config.local.learning_rate=0.5', '--config.seed=3']
  status, _, err = run(command(texts, folder, *others))
  assert (status, err.count('\n')) == (1, 1)
  assert 'local.learning_rate was 0.01, is 0.5; seed was 0, is 3' in err
  assert everything(folder) == before


def test_a_run_does_not_go_on_with_other_texts(texts, tmp_path):
  path, folder = tmp_path / 'texts.jsonl', tmp_path / 'run'
  path.write_text(texts.read_text())
  done(quick(path, folder, '--config.num_rounds=1'))
  path.write_text(texts.read_text().replace('lazy', 'tired'))
  before = everything(folder)
  status, _, err = run(quick(path, folder, '--config.num_rounds=2'))
  assert (status, err.count('\n')) == (1, 1)
  assert 'holds a run on other texts or clients' in err
  assert everything(folder) == before


def test_a_workdir_at_work_is_refused(texts, whole, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  program = (
    'import fcntl, sys; f = open(sys.argv[1], "w"); '
    'fcntl.lockf(f, fcntl.LOCK_EX); print("held", flush=True); input()'
  )
  holds = [sys.executable, '-c', program, str(folder / '.lock')]
  with subprocess.Popen(
    holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as other:
    assert other.stdout is not None and other.stdout.readline() == 'held\n'
    status, _, err = run(quick(texts, folder))
    other.communicate('\n')
  assert (status, err.count('\n')) == (1, 1)
  assert 'another run is at work in it' in err
  assert not (folder / 'config.json').exists()


# --------------------------------------------------------------- bad input --


def refused(arguments, *words):
  """One sentence that says so, and nothing written."""
  folder = pathlib.Path(arguments[arguments.index('--workdir') + 1])
  status, _, err = run(arguments)
  assert status == 1, err
  assert err.startswith('error: ') and err.count('\n') == 1
  for word in words:
    assert word in err
  assert not folder.exists()


@pytest.mark.parametrize(
  ('field', 'words'),
  {
    # misspelt or impossible, told before anything is loaded
    'num_round=3': ["no 'num_round'", "nearest is 'num_rounds'"],
    'clent.cohort_size=3': ["there is 'clients.cohort_size'"],
    'clients.cohort_sise=3': ["nearest is 'cohort_size'"],
    'local.learning_rat=3': ["nearest is 'learning_rate'"],
    'local.weight_decai=3': ["nearest is 'weight_decay'"],
    'local.name=adamx': ["no 'adamx'", 'adamw, ', 'sgd'],
    'local.schedule.name=cosine': ["nearest is 'cosine_decay_schedule'"],
    'aggregator.name=kron': ["no 'kron'", "nearest is 'krum'", 'median'],
    'aggregator.name=from_rule': ["no 'from_rule'", 'trimmed_mean'],
    'upload.name=from_optax': ["no 'from_optax'", 'identity'],
    'algorithm.name=fedavg': ["nearest is 'fed_avg'", 'scaffold'],
    'algorithm.aggregator=mean': ['is filled in by the program'],
    'algorithm.clip_norm=1': [
      'this field has moved to local.clip_norm: set --config.local.clip_norm'
    ],
    'model.vocab_size=16': ['is filled in by the program'],
    'num_rounds=many': ['must be int', "'many'"],
    'num_rounds=0': ['num_rounds is 0', 'at least 1'],
    'num_rounds=-3': ['num_rounds is -3'],
    'checkpoint_every=0': ['checkpoint_every is 0'],
    'evals.every=0': ['evals.every is 0'],
    'block_size=0': ['block_size is 0'],
    'local=none': ['local is missing', 'adamw'],
    # numbers that make no sense, told by who is to use them
    'data.path=/no/where.jsonl': ['/no/where.jsonl', 'no such file'],
    'population.template=chatml': ["no 'chatml'", 'alpaca, vicuna, plain'],
    'population.new_clients=6': ['new_clients is 6', 'there are 6 clients'],
    'clients.cohort_size=7': ['cohort_size is 7', 'only 4 clients'],
    'clients.dropout=1': ['dropout is 1'],
    'cohort.weight_by=size': ['size', 'examples, tokens, uniform'],
    'model.max_positions=8': ['only 8 positions'],
    'model.num_layers=0': ['num_layers=0'],
    'model.compute_dtype=float9': ['float9', 'bfloat16'],
    'adapter.targets=query': ["'query' matches no weight", 'q_proj'],
    'adapter.rank=33': ['rank is 33', 'q_proj (32 x 32)'],
    'aggregator.name=no_module:rule': ['cannot import no_module'],
  }.items(),
)
def test_a_wrong_field_is_one_sentence(texts, tmp_path, field, words):
  refused(command(texts, tmp_path / 'run', f'--config.{field}'), *words)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (['algorithm.name=fed_adam', 'server.name=sgd'], ['fed_adam', 'server']),
    (['algorithm.name=scaffold'], ['scaffold needs local.name=sgd', 'adamw']),
    (['partition.name=iid'], ['partition.num_clients is missing']),
    (
      ['partition.name=one_label'],
      ['texts.jsonl:1', 'one_label needs the label', 'label_key'],
    ),
    (
      # Only tracing tells: K is known to the round alone.
      ['aggregator.name=krum', 'aggregator.num_byzantine=1'],
      ['krum needs more than', 'K=4'],
    ),
    (
      [
        'local.schedule.name=linear_schedule',
        'local.schedule.init_value=1e-3',
        'local.schedule.end_valu=0',
      ],
      ["nearest is 'end_value'"],
    ),
  ],
)
def test_parts_that_do_not_fit_are_one_sentence(texts, tmp_path, fields, words):
  more = [f'--config.{field}' for field in fields]
  refused(quick(texts, tmp_path / 'run', *more), *words)


@pytest.mark.parametrize(
  ('lines', 'words'),
  [
    (['[1, 2]'], [':2:', 'no JSON object']),
    (['{"client": "a"'], [':2:', 'no JSON object']),
    (['{"client": "a"}'], [':2:', "no 'text'"]),
    (['{"client": "a", "text": 3}'], [':2:', "'text' is 3"]),
    ([], ['file is empty']),
    (['{"client": "a", "text": "  "}'], ['no client is left', '1 empty']),
  ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, lines, words):
  path = tmp_path / 'bad.jsonl'
  good = '{"client": "b", "text": "fine"}'
  first = [] if words[0][0] not in ':' else [good]
  path.write_text('\n'.join([*first, *lines]))
  refused(quick(path, tmp_path / 'run'), *words)


def test_a_client_without_usable_text_is_left_out_and_counted(texts, tmp_path):
  path = tmp_path / 'more.jsonl'
  blank = {'client': 'blank', 'text': '  ', 'label': 'x'}
  path.write_text(texts.read_text() + json.dumps(blank) + '\n')
  refused(quick(path, tmp_path / 'run', '--config.clients.cohort_size=5'))
  _, out, _ = run(quick(path, tmp_path / 'run', '--config.adapter.rank=0'))
  assert 'left out: 1 clients without enough usable examples (blank)' in out
  assert out.startswith('data.name=jsonl: set aside dataset')
  assert '4 clients train on' in out


def test_a_model_that_cannot_be_had_is_one_sentence(texts, tmp_path):
  config = {'model_type': 't5', 'architectures': ['T5Model']}
  for name, words in {
    'nothing': ['neither a directory'],
    'empty': ['no config.json'],
    't5': ['T5Model', 'not supported', 'LlamaForCausalLM'],
  }.items():
    folder = tmp_path / name
    if name != 'nothing':
      folder.mkdir()
    if name == 't5':
      (folder / 'config.json').write_text(json.dumps(config))
    model = ['--config.model.name=pretrained', f'--config.model.path={folder}']
    plain = [x for x in command(texts, tmp_path / 'run') if 'hidden' not in x]
    refused([x for x in plain if 'num_heads' not in x] + model, *words)


def test_a_model_without_weights_is_one_sentence(texts, shown, tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  config = (shown[0] / 'base' / 'config.json').read_text()
  (folder / 'config.json').write_text(config)
  model = ['--config.model.name=pretrained', f'--config.model.path={folder}']
  arguments = command(texts, tmp_path / 'run', *model)
  arguments = [x for x in arguments if '.hidden' not in x and '.num_h' not in x]
  refused(arguments, 'has no weights', 'model.safetensors')


def test_a_workdir_that_is_something_else_is_refused(texts, tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  status, _, err = run(quick(texts, file))
  assert (status, err.count('\n')) == (1, 1) and 'is a file' in err
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'letters.txt').write_text('mine')
  status, _, err = run(quick(texts, folder))
  assert (status, err.count('\n')) == (1, 1) and 'letters.txt' in err
  assert [p.name for p in folder.iterdir()] == ['letters.txt']


# ------------------------------------------------------- while the run runs --


def poison(monkeypatch):
  """Texts that begin with Z have a loss that is not a number."""
  built = tasks.local.causal_lm

  def causal_lm(*args, **keywords):
    loss = built(*args, **keywords)

    def spoilt(base, params, batch, key):
      bad = (batch.tokens[..., 1] == ord('Z')).any()
      sums = loss(base, params, batch, key)
      return sums._replace(total=jnp.where(bad, jnp.nan, sums.total))

    return loss if keywords.get('per_row') else spoilt

  monkeypatch.setattr(tasks.local, 'causal_lm', causal_lm)


def test_updates_that_are_not_finite_are_left_out_and_named(
  tmp_path, monkeypatch
):
  path = tmp_path / 'texts.jsonl'
  lines = [
    {'client': f'c{i % 4}', 'text': ('Z' if i % 4 == 2 else 'a') + WORDS[i]}
    for i in range(12)
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  few = ['--config.population.new_clients=0', '--config.num_rounds=1']
  poison(monkeypatch)
  status, _, err = run(quick(path, tmp_path / 'run', *few))
  assert status == 0
  assert 'round 1: left out 1 of 4 clients' in err and 'c2' in err
  told = records(tmp_path / 'run')[1]
  assert told['clients/not_finite'] == 1
  assert told['clients/not_finite_names'] == ['c2']
  assert told['clients/reporting'] == 3
  assert told['local/loss'] > 0

  path.write_text(path.read_text().replace('"a', '"Z'))
  status, _, err = run(quick(path, tmp_path / 'all', *few))
  assert status == 1
  assert err.count('\n') == 1 and 'the updates of all 4 clients' in err
  assert 'c0, c1, c2, c3' in err and 'lower local.learning_rate' in err
  assert [r['round'] for r in records(tmp_path / 'all')] == [0]


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
  texts, whole, tmp_path, monkeypatch
):
  folder = tmp_path / 'run'
  arguments = method('scaffold', texts, folder)
  usage, saved = collections.namedtuple('usage', 'total used free'), []

  def free(path):
    saved.append(path)
    return usage(0, 0, 0 if len(saved) == 3 else 1 << 40)

  with monkeypatch.context() as patch:
    patch.setattr('shutil.disk_usage', free)
    status, _, err = run(arguments)
  assert status == 1
  assert err.splitlines()[-1].startswith('error: ')
  assert 'round_00000002 cannot be saved: the disk is full' in err
  assert 'Traceback' not in err
  assert 'resuming after round 1' in done(arguments)
  assert outcome(folder) == outcome(whole['scaffold'][0])


def test_a_file_size_limit_is_a_sentence(texts, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
  try:
    status, _, err = run(quick(texts, tmp_path / 'run'))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert status == 1
  assert (err.count('\n') == 1 and 'be saved' in err) or 'be written' in err


# -------------------------------------------------------- own text and parts --


FORMS = {
  'prompts': ['data.prompt_key=question', 'data.response_key=text'],
  'messages': ['data.messages_key=messages'],
  'texts': ['data.text_key=text'],
}


@pytest.mark.parametrize(
  'fields',
  [
    [
      *FORMS['prompts'],
      'population.template=alpaca',
      'population.max_length=192',
      'partition.name=dirichlet',
      'partition.num_clients=6',
      'data.label_key=label',
      'clients.name=by_size',
      'cohort.packing=True',
      'algorithm.name=fed_prox',
      'aggregator.name=trimmed_mean',
      'aggregator.trim_fraction=0.25',
      'local.name=lion',
      'local.schedule.name=cosine_decay_schedule',
      'local.schedule.init_value=1e-3',
      'local.schedule.decay_steps=10',
      'adapter.name=rslora',
    ],
    [
      *FORMS['messages'],
      'population.template=vicuna',
      'population.max_length=256',
      'partition.name=quantity',
      'partition.num_clients=6',
      'clients.name=cyclic',
      'clients.availability=0.8',
      'algorithm.name=fed_adam',
      'local.clip_norm=1.0',
      'aggregator.name=krum',
      'aggregator.num_byzantine=0',
      'cohort.weight_by=tokens',
    ],
    [
      *FORMS['texts'],
      'partition.name=one_label',
      'data.label_key=label',
      'population.new_clients=0',
      'clients.name=full',
      'clients.cohort_size=none',
      'clients.dropout=0.2',
      'block_size=2',
      'algorithm.name=fed_yogi',
      'aggregator.name=median',
      'cohort.epochs=1',
      'cohort.weight_by=uniform',
      'evals.buckets=(8,16)',
    ],
    [
      *FORMS['prompts'],
      'partition.name=iid',
      'partition.num_clients=6',
      'population.long_replies=cut',
      'algorithm.name=centralised',
      'server.name=fed_adagrad',
      'upload.name=identity',
      'local.name=sgd',
      'local.momentum=0.9',
    ],
  ],
  ids=['fed_prox', 'fed_adam', 'fed_yogi', 'centralised'],
)
def test_text_never_seen_before_and_any_parts_make_a_run(
  texts, tmp_path, fields
):
  zipped = tmp_path / 'b.jsonl.gz'
  lines = texts.read_text().splitlines(keepends=True)
  (tmp_path / 'a.jsonl').write_text(''.join(lines[:30]))
  with gzip.open(zipped, 'wt') as file:
    file.writelines(lines[30:])
  base = quick(f"('{tmp_path}/a.jsonl','{zipped}')", tmp_path / 'run')
  base = [x for x in base if 'text_key' not in x]
  more = [f'--config.{field}' for field in [*fields, 'num_rounds=1']]
  done([*base, *more])
  told = records(tmp_path / 'run')
  assert np.isfinite(told[1]['local/loss'])
  assert np.isfinite(told[1]['evals/heldout/loss'])
  assert told[1]['server/step_norm'] > 0
  config = tmp_path / 'run' / 'adapter' / 'adapter_config.json'
  rslora = 'adapter.name=rslora' in fields
  assert json.loads(config.read_text())['use_rslora'] == rslora
