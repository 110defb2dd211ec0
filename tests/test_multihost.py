"""Several processes: one run, whoever computes it, and whatever befalls one."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedjax_llm import train
from fedjax_llm.devices import hosts, sharding
from fedjax_llm.run import workdir
from fedjax_llm.types import Draw, Error

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 150  # seconds after which processes are killed
WORDS = 'the quick brown fox jumps over a lazy dog and then some'.split()  # noqa: SIM905


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """48 short texts of 6 clients, some of which have more than others."""
  path = tmp_path_factory.mktemp('data') / 'texts.jsonl'
  lines = [
    {
      'client': f'c{min(i % 8, 5)}',
      'text': ' '.join(WORDS[(i * j) % 12] for j in range(1, 5)),
    }
    for i in range(48)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


@pytest.fixture(scope='module')
def programs(tmp_path_factory):
  """The environment of processes: compiled programs, and no settings."""
  return {
    **{k: v for k, v in os.environ.items() if k != 'AT'},
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('programs')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
  }


def command(texts, folder, algorithm, *more):
  """Three of six clients a round: on two rows of devices one is padding."""
  fields = {
    'num_rounds': 5,
    'checkpoint_every': 2,
    'compilation_cache': 'none',
    'data.name': 'jsonl',
    'data.path': texts,
    'data.client_key': 'client',
    'data.text_key': 'text',
    'population.max_clients': 'none',
    'population.new_clients': 0,
    'clients.cohort_size': 3,
    'model.name': 'multihost:shallow',
    'adapter.targets': 'q_proj',
    'algorithm.name': algorithm,
    'local.name': 'sgd',
    'evals.samples': 0,
    'evals.every': 2,
  }
  config = f'{ROOT}/configs/tiny.py:smoke'
  given = [f'--config.{k}={v}' for k, v in fields.items()]
  return ['--config', config, '--workdir', str(folder), *given, *more]


def alone(arguments):
  """In this process: what it printed."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = train.main(arguments)
  assert status == 0, err.getvalue()
  return out.getvalue()


def together(arguments, environment, *, devices=1, each=((), ())):
  """In two processes: of each its status, output and errors."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = environment.get('XLA_FLAGS', '')
  count = f'--xla_force_host_platform_device_count={devices}'
  joined = {
    'coordinator': f'127.0.0.1:{port}',
    'num_processes': 2,
    'heartbeat': 10,
    'patience': 60,
  }
  running = [
    subprocess.Popen(
      [
        *(sys.executable, ROOT / 'tests' / 'multihost.py', *arguments),
        *(f'--config.hosts.{k}={v}' for k, v in joined.items()),
        *(f'--config.hosts.process_id={i}', *each[i]),
      ],
      env={**environment, 'XLA_FLAGS': f'{flags} {count}'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  deadline = time.monotonic() + LIMIT
  try:
    said = [x.communicate(timeout=deadline - time.monotonic()) for x in running]
  finally:
    for process in running:
      process.kill()
  return [(x.returncode, *told) for x, told in zip(running, said)]


# What Gloo says of its connections, from several threads into each other.
_GLOO = re.compile(
  r'(\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected|'
  r'peer ranks is|:|\d+|\s)*'
)


def quiet(text):
  """Lines that the program, not its libraries, wrote."""
  lines = [x for x in text.splitlines() if not _GLOO.fullmatch(x)]
  return [x for x in lines if not x.startswith(('[Gloo]', 'W', 'E', 'I'))]


def done(told):
  """What process 0 printed; the other one said nothing."""
  (status, out, err), (other, silence, its) = told
  assert (status, other) == (0, 0), err + its
  assert quiet(silence) == quiet(its) == []
  return out


def records(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(x).items() if not k.startswith('time/')}
    for x in lines
  ]


def adapter(folder):
  return load_file(folder / 'adapter' / 'adapter_model.safetensors')


# Told only where all uploads of a round lie on one device.
ONE_DEVICE = {
  *('aggregators/error', 'aggregators/error_by_layer', 'aggregators/drift'),
  *('aggregators/effective_rank', 'aggregators/drift_by_layer'),
}


def agree(folder, other):
  """The same run but for rounding."""

  def flat(value, name):
    if isinstance(value, dict):
      return {k: x for n, v in value.items() for k, x in flat(v, n).items()}
    return {name: value}

  for mine, its in zip(records(folder), records(other), strict=True):
    assert mine.keys() ^ its.keys() <= ONE_DEVICE
    for name in mine.keys() & its.keys() - {'clients/useful_tokens'}:
      got, want = flat(mine[name], name), flat(its[name], name)
      assert got.keys() == want.keys()
      for part in got:
        np.testing.assert_allclose(got[part], want[part], 1e-5, 1e-6)
  got, want = adapter(folder), adapter(other)
  assert got.keys() == want.keys()
  for name in got:
    np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6)


@pytest.fixture(scope='module')
def one(texts, tmp_path_factory):
  """Uninterrupted runs in one process."""
  sys.path.insert(0, str(ROOT / 'tests'))
  runs = {}
  for name in ('scaffold', 'local_only'):
    runs[name] = tmp_path_factory.mktemp('one') / name
    alone(command(texts, runs[name], name))
  yield runs
  sys.path.remove(str(ROOT / 'tests'))


@pytest.fixture(scope='module')
def two(texts, programs, tmp_path_factory):
  """An uninterrupted run in two processes, and what it printed."""
  folder = tmp_path_factory.mktemp('two') / 'run'
  return folder, done(together(command(texts, folder, 'scaffold'), programs))


@pytest.fixture(scope='module')
def cut(texts, programs, tmp_path_factory):
  """Two processes, of which the second was killed in round 4.

  Both wrote the checkpoints.
  """
  folder = tmp_path_factory.mktemp('cut') / 'run'
  both = '--config.checkpoint_writers=all'
  arguments = command(texts, folder, 'scaffold', both)
  return folder, together(arguments, programs | {'AT': '1:4:SIGKILL'})


def test_two_processes_compute_what_one_does(one, two):
  folder, printed = two
  agree(folder, one['scaffold'])
  assert 'held-out loss' in printed
  assert (folder / 'states').is_dir()  # the clients' control variates


def test_a_killed_process_ends_the_other_with_a_sentence(cut):
  folder, ((status, _, err), (killed, _, _)) = cut
  assert killed == -signal.SIGKILL
  assert status not in (0, None)
  if status == 1:  # or the runtime was faster, and aborted
    (told,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert 'another process was lost; the same command on all' in told
  assert [record['round'] for record in records(folder)] == [0, 1, 2, 3]
  assert not (folder / 'adapter').exists()


def test_two_processes_resume_bit_for_bit(texts, programs, two, cut, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(cut[0], folder)
  arguments = command(texts, folder, 'scaffold')
  assert 'resuming after round 2' in done(together(arguments, programs))
  assert records(folder) == records(two[0])
  for name, value in adapter(two[0]).items():
    np.testing.assert_array_equal(adapter(folder)[name], value)


def test_one_process_resumes_what_two_began(texts, one, cut, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(cut[0], folder)
  assert (folder / 'checkpoints' / 'round_00000002' / 'state_1').is_dir()
  printed = alone(command(texts, folder, 'scaffold'))
  assert 'resuming after round 2' in printed
  agree(folder, one['scaffold'])


def test_sigterm_stops_all_after_the_same_round(texts, programs, one, tmp_path):
  """Two devices a process share the base; clients keep models of their own."""
  folder = tmp_path / 'run'
  arguments = command(texts, folder, 'local_only')
  told = together(
    [*arguments, '--config.mesh_model=2', '--config.block_size=1'],
    programs | {'AT': '1:3:SIGTERM'},
    devices=2,
  )
  first, (status, out, errors) = told
  asked = 'stopping after this round; a second signal stops at once\n'
  told = [first, (status, out, errors.replace(asked, ''))]
  assert 'stopped after round 3; the same command' in done(told)
  assert records(folder)[-1]['round'] == 3
  config = json.loads((folder / 'config.json').read_text())
  config |= {'mesh_model': 1, 'block_size': None}  # of a forgetful friend
  (folder / 'config.json').write_text(json.dumps(config))
  assert 'resuming after round 3' in alone(arguments)
  agree(folder, one['local_only'])


def test_two_processes_share_a_base_that_neither_has_whole(
  texts, programs, one, tmp_path
):
  """One device each; what clients keep, tests and the end are of both."""
  folder, held = tmp_path / 'run', tmp_path / 'held'
  arguments = command(texts, folder, 'local_only', '--config.mesh_model=2')
  out = done(together(arguments, programs | {'WEIGHTS': str(held)}))
  assert "own model, client's own text" in out
  agree(folder, one['local_only'])
  for process in range(2):
    shapes = (tmp_path / f'held.{process}').read_text().splitlines()
    # `o_proj` and `down_proj` are split by rows, the others by columns.
    assert set(shapes[:5]) == {'(1, 16, 32); (1, 32, 16)'}
  got, want = (load_file(x / 'base' / 'model.safetensors') for x in
               (folder, one['local_only']))  # fmt: skip
  assert got.keys() == want.keys()
  for name in got:
    np.testing.assert_array_equal(got[name], want[name])


def test_an_error_of_one_process_is_said_once_and_ends_all(
  texts, programs, tmp_path
):
  folder = tmp_path / 'run'
  arguments = command(texts, folder, 'fed_avg')
  each = ((), ('--config.local.learning_rate=0.5',))
  (status, out, err), (other, silence, its) = together(
    arguments, programs, each=each
  )
  assert (status, other) == (1, 1)
  assert quiet(silence) == quiet(its) == []
  assert 'train on' not in out
  assert quiet(err) == [
    'error: process 1: the config must be the same as on process 0, but it is '
    'not.'
  ]


# ------------------------------------------------------- without any process --


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'num_processes': 2}, 'hosts.coordinator is missing'),
    ({'coordinator': 'here'}, "is 'here': it is address:port, or auto"),
    ({'coordinator': 'a:1', 'num_processes': 0}, 'num_processes is 0'),
    ({'coordinator': 'a:1', 'num_processes': 2}, 'process_id is None'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      'must be one of 0 to 1',
    ),
    ({'coordinator': 'auto', 'process_id': 0}, 'leave them out'),
    ({'coordinator': 'auto', 'heartbeat': 0}, 'heartbeat is 0'),
  ],
)
def test_what_cannot_be_joined_is_a_sentence(fields, words):
  with pytest.raises(Error, match=words):
    hosts.join(**fields)
  assert not hosts.several()


def test_a_workdir_in_a_bucket_is_refused():
  with pytest.raises(Error, match=r'gs://b/run is an address.*mount'):
    workdir.open('gs://b/run', {})


def test_clients_are_dealt_to_rows_by_size():
  mesh = sharding.mesh(1, np.array(sharding.mesh().devices.ravel()[:1]))
  ids = np.array([0, 2, 4, 5, -1], np.int32)
  draw = Draw(ids, np.array([1, 1, 0, 1, 0], bool))
  sizes = [3, 9, 5, 9, 4, 8]
  got = sharding.dealt(draw, sizes, mesh)
  assert got.ids.tolist() == [5, 2, 4, 0, -1]
  assert got.reports.tolist() == [True, True, False, True, False]


def owned(owners, process, monkeypatch) -> Any:
  """A mesh of devices of these processes, as one of them sees it."""
  monkeypatch.setattr(
    sharding.jax, 'process_count', lambda: 1 + int(np.max(owners))
  )
  monkeypatch.setattr(sharding.jax, 'process_index', lambda: process)
  devices = [[SimpleNamespace(process_index=i) for i in row] for row in owners]
  shape = {'clients': len(owners), 'model': len(owners[0])}
  return SimpleNamespace(devices=np.array(devices), shape=shape)


@pytest.mark.parametrize(
  ('owners', 'parts'),
  [
    ([[0], [0], [1], [1]], [[7, 1, 3, 9], [5, -1, -1, -1]]),
    # Processes that share a row have the same clients.
    ([[0, 1], [2, 3]], [[7, 1, 3], [7, 1, 3], [9, 5, -1], [9, 5, -1]]),
  ],
)
def test_each_process_has_its_part_of_a_padded_draw(owners, parts, monkeypatch):
  draw = Draw(np.array([7, 1, 3, 9, 5], np.int32), np.ones(5, bool))
  for process, part in enumerate(parts):
    mesh = owned(owners, process, monkeypatch)
    whole, mine = sharding.own_rows(draw, mesh)
    assert whole.ids.tolist() == [7, 1, 3, 9, 5, -1, -1, -1][: len(whole.ids)]
    assert whole.reports.tolist() == [True] * 5 + [False] * (len(whole.ids) - 5)
    assert whole.ids[mine].tolist() == part


@pytest.mark.parametrize(
  'owners', [[[0, 0], [0, 1]], [[0], [0], [1]], [[0, 0, 0], [0, 1, 1]]]
)
def test_a_copy_of_the_base_ends_with_a_process(owners, monkeypatch):
  with pytest.raises(Error, match='must divide the devices of each process'):
    sharding.nearby(owned(owners, 0, monkeypatch))


# ----------------------------------------------------------------- launchers --


@pytest.mark.parametrize('tasks', [1, 4])
def test_launch_slurm_gives_each_process_its_place(tasks, tmp_path):
  """With a Slurm of two nodes that only says what it was asked."""
  programs = {
    'srun': 'shift; for i in 0 1; do SLURM_PROCID=$i "$@"; done',
    'scontrol': 'echo n1; echo n2',
    '.venv/bin/python': 'printf "%s\\n" "$@" end',
  }
  for name, text in programs.items():
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/bash\n{text}\n')
    file.chmod(0o755)
  given = ['--config', 'a b.py', "--config.adapter.targets=('q','v')"]
  told = subprocess.run(
    ['bash', ROOT / 'scripts' / 'launch_slurm', *given],
    env={
      'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}',
      'SLURM_SUBMIT_DIR': str(tmp_path),
      'SLURM_NTASKS_PER_NODE': str(tasks),
      'SLURM_JOB_ID': '77',
      'SLURM_JOB_NODELIST': 'n[1-2]',
      'SLURM_NNODES': '2',
    },
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert told.returncode == 0, told.stderr
  runs = told.stdout.split('end\n')[:2]
  for i, run in enumerate(runs):
    joined = ['--config.hosts.coordinator=auto']
    if tasks == 1:
      joined = [
        '--config.hosts.coordinator=n1:20077',
        '--config.hosts.num_processes=2',
        f'--config.hosts.process_id={i}',
      ]
    assert run.splitlines() == ['-m', 'fedjax_llm.train', *joined, *given]


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
@pytest.mark.parametrize(
  ('given', 'kept'),
  [
    ({'FEDJAX_LLM_ALLOCATOR': 'system'}, None),
    ({'JAX_PLATFORMS': 'cuda'}, None),
    ({'MALLOC_TRIM_THRESHOLD_': '7', 'JAX_PLATFORMS': 'cpu'}, '7'),
  ],
)
def test_the_allocator_is_left_as_it_is_where_that_is_asked(given, kept):
  program = '. scripts/allocator; echo "${MALLOC_TRIM_THRESHOLD_:-}"'
  told = subprocess.run(
    ['bash', '-euc', program],
    cwd=ROOT,
    env={'PATH': os.environ['PATH'], **given},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (told.returncode, told.stdout.strip()) == (0, kept or ''), told.stderr
