"""SIGTERM and Ctrl-C, wherever they come: none is lost, none is a traceback."""

import contextlib
import gc
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import runs

from fedjax_llm import _early, report, train
from fedjax_llm.report import __main__ as watch
from fedjax_llm.run import (
  checkpoint,
  experiment,
  narration,
  signals,
  workdir,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FIELDS = {'algorithm__name': 'fed_avg', 'num_rounds': 4}


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')


@pytest.fixture(autouse=True)
def handlers():
  """What was heeded before is heeded again, and nothing is left to come."""
  before = [signal.getsignal(one) for one in SIGNALS]
  hook = sys.unraisablehook
  yield
  assert [signal.getsignal(one) for one in SIGNALS] == before
  assert sys.unraisablehook is hook
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def send(number):
  os.kill(os.getpid(), number)


def in_the_collector(number):
  """Python ignores what is raised in a callback of the collector."""

  def callback(phase, info):
    gc.callbacks.remove(callback)
    send(number)
    for _ in range(100):  # a handler runs between two instructions
      pass

  gc.callbacks.append(callback)
  gc.collect()


def in_a_destructor(number):
  class Thing:
    def __del__(self):
      send(number)
      for _ in range(100):
        pass

  Thing()


def swallowed(number):
  with contextlib.suppress(BaseException):
    send(number)
    time.sleep(5)


def taken_for_another(number):
  try:
    send(number)
    time.sleep(5)
  except BaseException as error:
    raise RuntimeError('INTERNAL: a callback failed') from error


def plain(number):
  send(number)


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize(
  'where',
  [plain, in_the_collector, in_a_destructor, swallowed, taken_for_another],
)
def test_a_signal_before_the_rounds_ends_the_program(
  texts, tmp_path, monkeypatch, number, where
):
  monkeypatch.setattr(signals, '_AGAIN', 0.05)

  def build(*args, **keywords):
    where(number)
    time.sleep(30)
    raise AssertionError('the signal was lost')

  monkeypatch.setattr(experiment, 'build', build)
  folder = tmp_path / 'run'
  status, out, err = runs.run(train, runs.arguments(texts, folder, **FIELDS))
  assert (status, err) == (0, '')
  assert 'stopped; the same command goes on' in out
  assert not folder.exists()


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_in_a_round_ends_the_run_after_it(
  texts, tmp_path, monkeypatch, number
):
  folder, left_out = tmp_path / 'run', narration.left_out

  def at(told, info, draw, names, round):
    if round == 2:
      send(number)
    return left_out(told, info, draw, names, round)

  monkeypatch.setattr(narration, 'left_out', at)
  words = runs.arguments(texts, folder, **FIELDS, checkpoint_every=100)
  status, out, err = runs.run(train, words)
  assert status == 0, err
  assert 'stopped after round 2; the same command goes on' in out
  assert 'Traceback' not in err
  monkeypatch.undo()
  assert 'resuming after round 2' in runs.done(train, words)


def test_a_signal_that_was_lost_ends_a_run_before_its_first_round(
  texts, tmp_path, monkeypatch
):
  """What swallows it is over before it is raised again."""
  opened = checkpoint.open

  def swallowing(*args, **keywords):
    in_the_collector(signal.SIGINT)
    return opened(*args, **keywords)

  monkeypatch.setattr(signals, '_raise_again', lambda seconds: None)
  monkeypatch.setattr(checkpoint, 'open', swallowing)
  status, out, _ = runs.run(
    train, runs.arguments(texts, tmp_path / 'run', **FIELDS)
  )
  assert status == 0 and 'stopped; the same command goes on' in out


def test_an_error_in_a_last_round_is_an_error(texts, tmp_path, monkeypatch):
  """A signal that waits for a round does not hide what fails in it."""

  def at(told, info, draw, names, round):
    send(signal.SIGTERM)
    raise narration.Diverged('nothing is left.')

  monkeypatch.setattr(narration, 'left_out', at)
  words = runs.arguments(texts, tmp_path / 'run', **FIELDS)
  assert runs.refused(train, words) == 'error: nothing is left.'


def test_a_report_that_watches_ends_with_a_last_page(tmp_path, monkeypatch):
  """However long that page takes."""
  monkeypatch.setattr(signals, '_AGAIN', 0.01)
  folder, out, written = tmp_path / 'run', tmp_path / 'out.html', []
  folder.mkdir()
  (folder / 'config.json').write_text('{"num_rounds": 3}')
  (folder / 'metrics.jsonl').write_text('{"round": 0}\n')
  write = report.write

  def slow(*args, refresh, **keywords):
    if refresh is None:
      time.sleep(0.1)
    found = write(*args, refresh=refresh, **keywords)
    written.append(refresh)
    return found

  monkeypatch.setattr(report, 'write', slow)
  words = [str(folder), '--out', str(out), '--watch', '--every', '1']
  status = workdir.status(
    lambda: watch.run(words, wait=lambda seconds: send(signal.SIGINT))
  )
  assert status == 0 and written == [1, None]


TWICE = """
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location('signals', sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals._AGAIN = 1000
with signals.stoppable():
  if sys.argv[2] == 'round':
    signals.stop_after_round()
  try:
    print('ready', flush=True)
    time.sleep(60)
  except signals.Stopped:
    print('once', flush=True)
    time.sleep(60)
  print('once', flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('when', ['round', 'before'])
def test_a_second_signal_ends_at_once(number, when):
  file = pathlib.Path(signals.__file__)
  with subprocess.Popen(
    [sys.executable, '-c', TWICE, file, when],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout is not None
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(number)
    if when == 'before':
      assert child.stdout.readline() == 'once\n'
    else:
      assert child.stderr is not None
      assert 'second signal stops at once' in child.stderr.readline()
    child.send_signal(number)
    assert child.wait(30) in (-number, 128 + number)
    assert child.stderr is not None and child.stderr.read() == ''


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize(
  'words, ours',
  [
    (['python', '-m', 'fedjax_llm.train'], True),
    (['python', '-m', 'fedjax_llm'], True),
    (['python', '-m', 'pytest'], False),
    (['python', 'fedjax_llm.train'], False),
  ],
)
def test_a_signal_while_importing_is_a_sentence(
  monkeypatch, capsys, number, words, ours
):
  class Exit(BaseException):
    pass

  def leave(status):
    raise Exit(status)

  before = [signal.getsignal(one) for one in SIGNALS]
  monkeypatch.setattr(sys, 'orig_argv', words)
  monkeypatch.setattr(sys, 'argv', ['-m', *words[3:]])
  monkeypatch.setattr(os, '_exit', leave)
  try:
    spec = importlib.util.spec_from_file_location('early', _early.__file__)
    assert spec is not None and spec.loader is not None
    early = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(early)
    installed = [signal.getsignal(one) for one in SIGNALS]
    assert (installed != before) == ours
    if ours:
      with pytest.raises(Exit, match='0'):
        send(number)
        time.sleep(5)
      assert 'stopped; the same command goes on' in capsys.readouterr().out
      early.over(1)  # later its status is what the program said
      with pytest.raises(Exit, match='1'):
        send(number)
        time.sleep(5)
      assert capsys.readouterr().out == ''
  finally:
    for one, handler in zip(SIGNALS, before, strict=True):
      signal.signal(one, handler)
