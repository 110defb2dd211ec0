"""Stores of an earlier form, when their upgrade is interrupted."""

import shutil

import numpy as np
import pytest

from fedjax_llm.clients import store, upgraded
from fedjax_llm.types import ClientState, Error

OLD = ClientState(local=np.float32(0))
NEW = ClientState(local={'sum': np.float32(0), 'count': np.int32(0)})


def upgrade(states):
  count = np.ones(len(states.local), np.int32)
  return ClientState(local={'sum': states.local, 'count': count})


def open_at_2(folder, **options):
  return upgraded.open(folder, NEW, OLD, upgrade, at_round=2, **options)


def rows(kept):
  values = kept.gather([4, 7, 9]).local
  return values['sum'].tolist(), values['count'].tolist()


ROWS = ([2.5, -1.0, 0.0], [1, 1, 0])


@pytest.fixture
def folder(tmp_path):
  """A store of the earlier form at round 2, a part of it in its base."""
  kept = store.open(tmp_path / 'states', OLD, at_round=0)
  kept.scatter([4], [True], ClientState(local=np.full(1, 2.5, np.float32)))
  kept.commit(1)
  kept.prune(1)
  kept.scatter([7], [True], ClientState(local=np.full(1, -1.0, np.float32)))
  kept.commit(2)
  return tmp_path / 'states'


class Killed(BaseException):
  """The process ends here."""


def stopped(monkeypatch, owner, name, number, partly=lambda path: None):
  """Ends the process at the call of a function with this number."""
  real, calls = getattr(owner, name), []

  def call(first, *args, **kwargs):
    calls.append(first)
    if len(calls) == number:
      partly(first)
      raise Killed
    return real(first, *args, **kwargs)

  monkeypatch.setattr(owner, name, call)


def one_file_less(path):
  """Removes the first file of a folder, as `rmtree` begins."""
  for file in sorted(path.glob('*'))[:1]:
    file.unlink()


@pytest.mark.parametrize('name', ['rename', 'rmtree'])
@pytest.mark.parametrize('number', [1, 2, 3])
def test_an_upgrade_goes_on_wherever_it_was_interrupted(
  folder, monkeypatch, name, number
):
  with monkeypatch.context() as patch:
    if name == 'rename':
      stopped(patch, type(folder), 'rename', number)
    else:
      stopped(patch, shutil, 'rmtree', number, one_file_less)
    try:
      open_at_2(folder)
    except Killed:
      assert rows(open_at_2(folder, read_only=True)) == ROWS
  kept = open_at_2(folder)
  assert rows(kept) == ROWS and kept.seen().tolist() == [4, 7]
  kept.commit(3)
  assert rows(upgraded.open(folder, NEW, OLD, upgrade, at_round=3)) == ROWS
  assert [path.name for path in folder.parent.iterdir()] == ['states']


def test_a_store_that_is_read_only_stays_as_it_is(folder):
  content = lambda: {
    str(path): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.parent.rglob('*')
    if path.is_file()
  }
  before = content()
  kept = open_at_2(folder, read_only=True)
  assert rows(kept) == ROWS and kept.seen().tolist() == [4, 7]
  kept.scatter(
    [9], [True], upgrade(ClientState(local=np.full(1, 3.0, np.float32)))
  )
  assert rows(kept) == ([2.5, -1.0, 3.0], [1, 1, 1])
  with pytest.raises(Error, match='was opened to be read only'):
    kept.commit(3)
  assert content() == before
