"""The launcher of TPU pods: its commands, also under a fake gcloud."""

import os
import pathlib
import shlex
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
POD = ('--name=pod', '--zone=us-west4-a')
NEW = (*POD, '--type=v5litepod-256')
RUN = ('--', '--config', 'configs/tiny.py:smoke', '--workdir=/mnt/run')
TPUS = ['gcloud', 'compute', 'tpus']


def launch(*words, **variables):
  return subprocess.run(
    [ROOT / 'scripts' / 'launch_tpu', *words],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, **variables},
  )


def printed(*words, **variables):
  """The commands of a dry run, as lists of words."""
  done = launch(*words, '--dry-run', *RUN, **variables)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert all(line.startswith('+ ') for line in lines)
  return [shlex.split(line[2:], comments=True) for line in lines]


def test_it_prints_what_it_would_run():
  fields = ["--config.adapter.targets=('q','v')"]
  program = ['--config', 'configs/tiny.py', '--workdir=gs://b/runs/x', *fields]
  words = [*NEW, '--project=p', '--create', '--dry-run', '--', *program]
  done = launch(*words)
  assert done.returncode == 0, done.stderr
  lines = [shlex.split(x.removeprefix('+ ')) for x in done.stdout.splitlines()]
  vm, where = [*TPUS, 'tpu-vm'], ['--zone=us-west4-a', '--project=p']
  assert lines[0] == [
    *(*vm, 'create', 'pod', *where),
    '--accelerator-type=v5litepod-256',
    '--version=v2-alpha-tpuv5-lite',
  ]
  copied = [x for x in lines if 'scp' in x]
  assert copied[0][-4:] == ['pod:', *where, '--worker=all']
  install, mount, run = [x for x in lines if 'ssh' in x]
  for line in (install, mount, run):
    assert line[:-1] == [*vm, 'ssh', 'pod', *where, '--worker=all']
  assert '.[tpu]' in install[-1]
  assert 'gcsfuse' in mount[-1] and '"$HOME"/buckets/b' in mount[-1]
  assert 'setsid nohup' in run[-1]


def test_a_pod_that_exists_is_looked_at_first():
  first, *rest = printed(*POD)
  assert first[:5] == [*TPUS, 'tpu-vm', 'ssh']
  assert 'a run goes on here: --stop ends it' in first[-1]
  flat = ' '.join(word for line in rest for word in line)
  assert ' create ' not in flat and 'gcsfuse' not in flat
  assert '--workdir /mnt/run --config configs/tiny.py:smoke' in flat


def test_a_queued_resource_is_waited_for():
  ask, state, *_ = printed(*NEW, '--queue', '--spot')
  queue, where = [*TPUS, 'queued-resources'], '--zone=us-west4-a'
  assert ask == [
    *(*queue, 'create', 'pod', where, '--node-id=pod'),
    '--accelerator-type=v5litepod-256',
    *('--runtime-version=v2-alpha-tpuv5-lite', '--spot'),
  ]
  assert state == [
    *(*queue, 'describe', 'pod', where, '--format=value(state.state)'),
  ]


@pytest.mark.parametrize(
  'words, message',
  [
    ((), 'there must be --config and --workdir'),
    (('--', '--config=tiny'), 'there must be --config and --workdir'),
    (
      ('--', '--config=tiny', '--workdir=w', '--config.hosts.process_id=1'),
      'leave out --config.hosts',
    ),
    (('--spot', *RUN), '--spot goes with --create or --queue'),
    (('--create', *RUN), '--create and --queue need --type'),
    (('--create', '--queue', *RUN), 'not allowed with argument --create'),
    (
      ('--', '--config=configs/tyni.py:smoke', '--workdir=w'),
      '--config configs/tyni.py:smoke: this checkout, which is copied to the '
      'workers, has no such file',
    ),
    (('--', '--config', '/etc/hosts', '--workdir=w'), 'has no such file'),
    (('--env', 'HF_TOKEN=abc', *RUN), 'without its value'),
    (
      ('--env', 'NOT_SET_HERE', *RUN),
      'NOT_SET_HERE: there is no such',
    ),
    (('--logs', *RUN), 'take only --name and --zone'),
    (('--logs', '--stop'), 'not allowed with argument --logs'),
  ],
)
def test_what_cannot_begin_is_refused_in_the_dry_run_too(words, message):
  done = launch(*POD, '--dry-run', *words)
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert not done.stdout


# ------------------------------------------------------- under a fake gcloud --

GCLOUD = """#!/bin/bash
# Runs what it is told on the "workers" 0 and 1: folders.
echo "$*" >> {home}/calls
for word; do case $word in
  --command=*) command=${{word#--command=}};;
  --worker=*) worker=${{word#--worker=}};;
esac; done
[ "$worker" = all ] && workers="0 1" || workers=$worker
case "$*" in
  *describe*) n=$(cat {home}/asked 2>/dev/null | wc -l); echo x >> {home}/asked
    [ $n -ge 0 ] && echo ACTIVE; exit;;
  *create*) exit;;
esac
for w in $workers; do
  home={home}/$w; mkdir -p $home
  case "$*" in
    *" scp "*) to=${{6#*:}}; [ -z "$to" ] || cp -p "$5" $home/$to;;
    *"uv venv"*) mkdir -p $home/fedjax_llm/.venv/bin
      cp {home}/python $home/fedjax_llm/.venv/bin/python;;
    *) (cd $home; HOME=$home bash -c "$command") || exit 1;;
  esac
done
"""
# In the place of the program: it prints its words, and works until SIGTERM.
PROGRAM = """#!/bin/bash
echo "words: $*"; echo "token: $HF_TOKEN"
trap 'echo stopped; exit 0' TERM
while true; do sleep 0.05; done
"""


def _alive(number):
  return pathlib.Path(f'/proc/{number.strip()}/cmdline').exists()


def _wait(true):
  for _ in range(600):
    if true():
      return
    time.sleep(0.05)
  raise AssertionError('it never came')


def test_a_run_is_detached_and_read_and_stopped_later(tmp_path):
  for name, text in (('gcloud', GCLOUD), ('python', PROGRAM), ('tar', '')):
    file = tmp_path / name
    file.write_text(text.format(home=tmp_path) if name == 'gcloud' else text)
    file.chmod(0o755)
  (tmp_path / 'tar').write_text('#!/bin/bash\n')
  here = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HF_TOKEN': "s'cret 1"}
  folders = [tmp_path / str(w) / 'fedjax_llm' for w in (0, 1)]
  log = lambda folder: (folder / 'run.log').read_text()
  try:
    done = launch(*NEW, '--queue', '--env=HF_TOKEN', *RUN, **here)
    assert done.returncode == 0, done.stderr
    assert 'The run goes on by itself.' in done.stdout
    for folder in folders:
      _wait(lambda f=folder: (f / 'run.log').exists() and 'token' in log(f))
      words, token = log(folder).splitlines()
      assert words == (
        'words: -m fedjax_llm.train --workdir /mnt/run --config '
        'configs/tiny.py:smoke --config.hosts.coordinator=auto'
      )
      assert token == "token: s'cret 1"
      assert not (folder / 'private').exists()
    assert 'cret' not in done.stdout + (tmp_path / 'calls').read_text()
    # Another run is refused, the logs are read, and the run is ended.
    done = launch(*POD, *RUN, **here)
    assert done.returncode == 1 and 'a run goes on here' in done.stderr
    done = launch(*POD, '--logs', **here)
    assert done.stdout.count(': runs\nwords:') == 2
    assert launch(*POD, '--stop', **here).returncode == 0
    for folder in folders:
      _wait(lambda f=folder: 'stopped' in log(f))
      _wait(lambda f=folder: not _alive((f / 'run.pid').read_text()))
    done = launch(*POD, '--logs', **here)
    assert done.stdout.count(': has ended\nwords:') == 2
  finally:
    for folder in folders:
      file = folder / 'run.pid'
      if file.exists():
        subprocess.run(['kill', '-KILL', file.read_text()], capture_output=True)
