"""A workdir of somebody else runs no code, and leads nowhere out of itself."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import runs

from fedjax_llm import export, replay, train
from fedjax_llm.devices import hosts
from fedjax_llm.report import __main__ as report
from fedjax_llm.run import rebuild, workdir
from fedjax_llm.types import Error

CALLED = []


def spy(**keywords):
  CALLED.append(keywords)
  raise AssertionError('code of a workdir was run')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
  """A finished run whose clients keep something."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  fields = {'algorithm__name': 'local_only', 'num_rounds': 3}
  runs.done(train, runs.arguments(data, folder, **fields))
  return folder


@pytest.fixture
def folder(whole, tmp_path):
  return pathlib.Path(shutil.copytree(whole, tmp_path / 'run'))


def command(program, folder, tmp_path, *more):
  if program is replay:
    return ['--workdir', folder, '--round', 3, *more]
  return [
    *('--workdir', folder, '--to', 'peft', '--out', tmp_path / 'out'),
    *more,
  ]


# ------------------------------------------------------------------- names --


SECTIONS = (
  *('task', 'data', 'partition', 'clients', 'profiles', 'model', 'adapter'),
  *('algorithm', 'local', 'local.schedule', 'upload', 'aggregator', 'server'),
  'evals.personal',
)


@pytest.mark.parametrize('program', [export, replay])
@pytest.mark.parametrize('section', SECTIONS)
def test_a_function_that_a_workdir_names_is_not_run(
  whole, tmp_path, section, program
):
  folder = tmp_path / 'run'
  shutil.copytree(whole, folder)
  file = folder / 'config.json'
  conf = json.loads(file.read_text())
  conf['model'] = {'name': 'random', 'hidden_size': 32}
  outer, _, inner = section.partition('.')
  one = {'name': f'{__name__}:spy', 'x': 1}
  if inner:
    conf[outer] = {**conf[outer], inner: one}
  else:
    conf[outer] = one
  file.write_text(json.dumps(conf))
  words = command(program, folder, tmp_path)
  if section in ('data', 'partition', 'clients') and program is export:
    words += ['--client', 'ann']
  status, _, err = runs.run(program, words)
  assert CALLED == []
  # What export does not need it does not look up.
  if section not in ('clients', 'evals.personal') or program is replay:
    assert status == 1
    assert f'config.json names the function {__name__}:spy' in err
    assert rebuild.TRUST in err


def test_a_flag_lets_own_functions_be_run(folder, tmp_path):
  """Those of the run itself: its network is a function of these tests."""
  for program in (export, replay):
    words = command(program, folder, tmp_path)
    assert 'runs:shallow' in runs.refused(program, words)
    runs.done(program, [*words, rebuild.TRUST])
  with pytest.raises(Error, match='runs:shallow'):
    rebuild.open(str(folder))
  rebuild.open(str(folder), trusted=True)


# ------------------------------------------------------------------- links --


@pytest.mark.parametrize(
  'name',
  [
    *('config.json.new', 'config.json', 'metrics.jsonl', 'metrics.jsonl.new'),
    *('metrics.csv', 'metrics.csv.new', 'clients.json.new', '.lock'),
    *('samples.json', 'report.txt.new', 'finished.json', 'trackers.json'),
    *('checkpoints/part_round_00000004', 'states/base.rows'),
    *('states/journal_00000004.part', 'adapter/adapter_config.json'),
    *('states', 'checkpoints', 'adapter', 'tensorboard', '.adapter.partial'),
  ],
)
def test_no_link_in_a_workdir_is_followed_when_writing(
  data, folder, tmp_path, name
):
  link, victim = folder / name, tmp_path / 'victim'
  if link.is_dir() or (link.is_file() and name != '.lock'):
    link.rename(victim)
  else:
    link.unlink(missing_ok=True)
    victim.write_text('precious')
  link.symlink_to(victim)
  before = victim.read_bytes() if victim.is_file() else runs.everything(victim)
  fields = {'algorithm__name': 'local_only', 'num_rounds': 4}
  told = runs.refused(train, runs.arguments(data, folder, **fields))
  assert f'{link} ' in told and ('symbolic link' in told or 'Too many' in told)
  after = victim.read_bytes() if victim.is_file() else runs.everything(victim)
  assert after == before


def test_links_of_services_are_left_alone(tmp_path):
  for place in ('wandb', 'runs/a/wandb'):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / 'latest-run').symlink_to(tmp_path)
  workdir.check_links(tmp_path)
  (tmp_path / 'runs/b').symlink_to(tmp_path)
  with pytest.raises(Error, match=r'runs/b is a symbolic link'):
    workdir.check_links(tmp_path)


def test_the_workdir_itself_may_be_a_link(data, folder, tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(folder)
  fields = {'algorithm__name': 'local_only', 'num_rounds': 3}
  assert 'is finished' in runs.done(train, runs.arguments(data, link, **fields))


# --------------------------------------------------------------- read only --


def test_reading_a_workdir_changes_nothing_in_it(folder, tmp_path):
  (folder / 'checkpoints' / 'part_round_00000009').mkdir()
  (folder / 'states' / 'journal_00000009').write_text('of a round undone')
  for path in [folder, *folder.rglob('*')]:
    path.chmod(0o555 if path.is_dir() else 0o444)
  before = runs.everything(folder)
  out = tmp_path / 'out.html'
  runs.done(export, [*command(export, folder, tmp_path), rebuild.TRUST])
  runs.done(
    export,
    [
      *('--workdir', folder, '--to', 'merged', '--out', tmp_path / 'own'),
      *('--client', 'ann', rebuild.TRUST),
    ],
  )
  runs.done(replay, [*command(replay, folder, tmp_path), rebuild.TRUST])
  runs.done(report, [folder, '--out', out])
  assert runs.everything(folder) == before
  for path in [folder, *folder.rglob('*')]:
    path.chmod(0o755 if path.is_dir() else 0o644)


HOLDS = """
import fcntl, sys
held = open(sys.argv[1], 'r+')
fcntl.lockf(held, fcntl.LOCK_EX)
print('held', flush=True)
sys.stdin.read()
"""


def test_a_run_at_work_is_not_read(folder, tmp_path):
  """Locks are those of a process, so another one takes it."""
  with subprocess.Popen(
    [sys.executable, '-c', HOLDS, folder / '.lock'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as child:
    assert child.stdout is not None
    child.stdout.readline()
    words = [*command(export, folder, tmp_path), rebuild.TRUST]
    assert 'another run is at work' in runs.refused(export, words)


# --------------------------------------------------------------- own models --


def test_the_model_of_a_client_is_not_given_away_as_that_of_another(
  whole, tmp_path, tmp_path_factory
):
  """Ids are places in the names: a new client moves all that follow."""
  data = runs.texts(tmp_path / 'texts.jsonl', ('bob', 'cyd', 'dan', 'eve'))
  folder = tmp_path / 'run'
  fields = {'algorithm__name': 'local_only', 'num_rounds': 1}
  runs.done(train, runs.arguments(data, folder, **fields))
  words = lambda out: [
    *('--workdir', folder, '--to', 'peft', '--out', tmp_path / out),
    *('--client', 'cyd', rebuild.TRUST),
  ]
  runs.done(export, words('before'))
  with data.open('a') as file:
    file.write(json.dumps({'client': 'ann', 'text': 'I am new here'}) + '\n')
    file.write(json.dumps({'client': 'ann', 'text': 'the second of me'}) + '\n')
  told = runs.refused(export, words('after'))
  assert 'holds a run on other texts or clients' in told and 'cyd' in told
  assert not (tmp_path / 'after').exists()


# -------------------------------------------------------------- coordinator --


def test_the_coordinator_listens_on_the_address_that_was_named(monkeypatch):
  """JAX by itself would listen on every address of the machine."""
  begun = []

  def initialize(**keywords):
    begun.append(keywords)
    raise RuntimeError('enough')

  monkeypatch.setattr(hosts.jax.distributed, 'initialize', initialize)
  at = {'coordinator': '10.0.0.7:1234', 'num_processes': 2, 'process_id': 0}
  for bind, address in ((None, '10.0.0.7:1234'), ('10.1.1.1:9', '10.1.1.1:9')):
    with pytest.raises(Error, match='enough'):
      hosts.join(**at, bind=bind)
    assert begun.pop()['coordinator_bind_address'] == address
  for bind in ('10.1.1.1', ':80', '10.1.1.1:x', '10.1.1.1:0', 'a:70000'):
    with pytest.raises(Error, match=r'hosts.bind is .*: it is address:port'):
      hosts.join(**at, bind=bind)
  with pytest.raises(Error, match=r'hosts.bind is 1:2, but hosts.coordinator'):
    hosts.join(bind='1:2')
  with pytest.raises(Error, match=r'finds .* hosts.bind by itself'):
    hosts.join(coordinator='auto', bind='1:2')
