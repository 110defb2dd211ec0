"""The private state of clients: what is kept, and what survives a kill."""

import doctest
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedjax_llm.clients import disk, journal, store
from fedjax_llm.types import ClientState, Error

TEMPLATE = ClientState(private={'head': np.arange(3, dtype=np.float32)})


def states(*values):
  rows = np.array(values, np.float32)[:, None] + np.zeros(3, np.float32)
  return ClientState(private={'head': rows})


def put(opened, **rows):
  """put(store, c5=1.0): client 5 holds ones."""
  ids = np.array([int(name[1:]) for name in rows])
  opened.scatter(ids, np.ones(len(ids), bool), states(*rows.values()))


def held(opened, num_clients=12):
  """The whole content: the first number of each client."""
  return opened.gather(np.arange(num_clients)).private['head'][:, 1].tolist()


def expected(**rows):
  values = [1.0] * 12  # the template's second number
  for name, value in rows.items():
    values[int(name[1:])] = value
  return values


def test_docstring_examples_run():
  result = doctest.testmod(store)
  assert result.attempted and not result.failed


# -------------------------------------------------------------------- rows --


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
  template = ClientState(
    private={'a': np.zeros((2, 3), np.float32), 'absent': None},
    local=(np.int32(0), np.zeros(2, ml_dtypes.bfloat16), np.zeros(5, bool)),
    upload=(np.zeros((0, 4), np.float32), np.zeros(1, np.float64)),
  )
  rng = np.random.default_rng(0)

  def noise(x):
    x = np.asarray(x)
    raw = rng.integers(0, 2, (4, *x.shape, x.dtype.itemsize), np.uint8)
    return raw.view(x.dtype)[..., 0]

  new = jax.tree.map(noise, template)
  opened = store.open(tmp_path, template, at_round=0)
  opened.scatter(np.array([9, 2, 5, 7]), np.ones(4, bool), new)
  for round in (1, 2):
    back = opened.gather(np.array([2, 7, 9]))
    jax.tree.map(
      lambda b, n: np.testing.assert_array_equal(
        np.asarray(b).view(np.uint8), n[[1, 3, 0]].view(np.uint8)
      ),
      back,
      new,
    )
    dtypes = jax.tree.map(lambda x: np.asarray(x).dtype, template)
    assert jax.tree.map(lambda x: x.dtype, back) == dtypes
    opened.commit(round)
    opened = store.open(tmp_path, template, at_round=round)


def test_clients_never_seen_and_padding_have_the_template(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  put(opened, c3=7.0)
  back = opened.gather(np.array([-1, 3, 4])).private['head']
  assert back.tolist() == [[0, 1, 2], [7, 7, 7], [0, 1, 2]]
  assert opened.seen().tolist() == [3]


def test_rows_that_are_not_valid_are_not_kept(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  opened.scatter(
    jnp.array([0, 1, -1]),
    jnp.array([True, False, True]),
    jax.tree.map(jnp.asarray, states(5.0, 6.0, 7.0)),
  )
  assert held(opened) == expected(c0=5.0)
  assert opened.seen().tolist() == [0]


def test_state_of_another_shape_is_refused(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  wrong = ClientState(private={'head': np.zeros((1, 4), np.float32)})
  with pytest.raises(
    Error, match=r'private/head is float32\[4\].*float32\[3\]'
  ):
    opened.scatter(np.array([0]), np.array([True]), wrong)
  with pytest.raises(Error, match='is a key'):
    store.open(tmp_path, ClientState(local=jax.random.key(0)), at_round=0)


def test_without_state_nothing_is_written(tmp_path):
  opened = store.open(tmp_path / 'none', ClientState(), at_round=5)
  opened.scatter(np.array([0]), np.array([True]), ClientState())
  opened.commit(6)
  opened.prune(6)
  assert opened.gather(np.array([0, 1])) == ClientState()
  assert not opened.seen().size and not (tmp_path / 'none').exists()


def test_100_000_clients_cost_what_the_clients_seen_cost(tmp_path):
  template = ClientState(private=np.zeros(1024, np.float32))  # 4 KiB a client
  rng = np.random.default_rng(0)
  opened = store.open(tmp_path, template, at_round=0)
  last, before = {}, 0
  tracemalloc.start()
  for round in range(1, 21):
    ids = rng.choice(100_000, 50, replace=False)
    assert opened.gather(ids).private.shape == (50, 1024)
    new = rng.normal(size=(50, 1)) + np.zeros(1024)
    opened.scatter(ids, np.ones(50, bool), ClientState(new.astype(np.float32)))
    last.update(zip(ids.tolist(), new[:, 0].astype(np.float32)))
    if round % 2 == 0:
      opened.commit(round)
      opened.prune(round - 2)
    if round == 2:  # what the first rounds import stays
      before = tracemalloc.get_traced_memory()[0]
      tracemalloc.reset_peak()
  peak = tracemalloc.get_traced_memory()[1] - before
  tracemalloc.stop()
  seen = len(last) * 4096
  size = sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir())
  assert len(last) > 900 and seen <= size < 1.3 * seen
  assert peak < 3e6  # 100,000 clients would be 410 MB
  opened = store.open(tmp_path, template, at_round=20)
  assert opened.seen().tolist() == sorted(last)
  back = opened.gather(np.array(list(last))).private
  np.testing.assert_array_equal(
    back, np.array(list(last.values()))[:, None] + 0 * back
  )


# ------------------------------------------------------------------ rounds --


def test_reopening_sees_exactly_the_round_it_is_opened_at(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  put(opened, c1=1.5, c2=2.5)
  opened.commit(2)
  put(opened, c2=3.5, c3=4.5)
  opened.commit(4)
  put(opened, c1=9.0)  # never committed

  four, two = tmp_path.with_name('four'), tmp_path.with_name('two')
  shutil.copytree(tmp_path, four)
  shutil.copytree(tmp_path, two)
  opened = store.open(four, TEMPLATE, at_round=4)
  assert held(opened) == expected(c1=1.5, c2=3.5, c3=4.5)
  opened = store.open(two, TEMPLATE, at_round=2)
  assert held(opened) == expected(c1=1.5, c2=2.5)
  # Round 4 never happened here: it may be committed again, otherwise.
  put(opened, c4=8.0)
  opened.commit(4)
  opened = store.open(two, TEMPLATE, at_round=4)
  assert held(opened) == expected(c1=1.5, c2=2.5, c4=8.0)


def test_a_long_history_of_crashes_agrees_with_a_dictionary(tmp_path):
  """Commits, prunings, reopenings at either kept round, against snapshots."""
  rng = np.random.default_rng(1)
  opened, now, kept, round = (
    store.open(tmp_path, TEMPLATE, at_round=0),
    {},
    {},
    0,
  )
  kept[0] = {}
  for _ in range(150):
    action = rng.integers(4)
    if action <= 1:
      ids = rng.choice(12, 3, replace=False)
      values = rng.normal(size=3).astype(np.float32).tolist()
      new = {f'c{i}': v for i, v in zip(ids, values)}
      put(opened, **new)
      now = {**now, **new}
    elif action == 2:
      round += int(rng.integers(1, 3))
      opened.commit(round)
      kept[round] = now
      kept = dict(sorted(kept.items())[-2:])
      opened.prune(min(kept))
    else:
      round = int(rng.choice(list(kept)))
      kept = {r: rows for r, rows in kept.items() if r <= round}
      now = kept[round]
      opened = store.open(tmp_path, TEMPLATE, at_round=round)
    assert held(opened) == expected(**now)
    assert opened.seen().tolist() == sorted(int(name[1:]) for name in now)
  assert round > 20


def test_rounds_that_are_not_there_are_refused(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  for round in (1, 2, 3):
    put(opened, c1=float(round))
    opened.commit(round)
  opened.commit(3)  # nothing has changed: nothing to do
  put(opened, c1=4.0)
  with pytest.raises(Error, match='at round 3 and cannot commit round 3'):
    opened.commit(3)
  opened.prune(2)
  with pytest.raises(Error, match=r'given up rounds before 2.* at round 1'):
    store.open(tmp_path, TEMPLATE, at_round=1)
  with pytest.raises(Error, match='journal_00000007 is missing'):
    store.open(tmp_path, TEMPLATE, at_round=7)
  with pytest.raises(Error, match='holds no client state of round 3'):
    store.open(tmp_path / 'elsewhere', TEMPLATE, at_round=3)
  other = ClientState(private={'tail': np.zeros(3, np.float32)})
  with pytest.raises(
    Error, match=r"base.json is of client state.*'private/head'"
  ):
    store.open(tmp_path, other, at_round=3)
  # None of the refusals has changed anything.
  assert held(store.open(tmp_path, TEMPLATE, at_round=3)) == expected(c1=3.0)


def test_any_damage_of_a_journal_is_named(tmp_path):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  put(opened, c1=5.0)
  opened.commit(1)
  path = tmp_path / 'journal_00000001'
  good = path.read_bytes()
  for i in range(len(good)):
    bad = bytearray(good)
    bad[i] ^= 1
    for content in (good[:i], bytes(bad)):
      path.write_bytes(content)
      with pytest.raises(Error, match='journal_00000001 is damaged'):
        store.open(tmp_path, TEMPLATE, at_round=1)
  path.write_bytes(good)
  opened = store.open(tmp_path, TEMPLATE, at_round=1)
  opened.prune(1)
  for name in ('base.rows', 'base.ids', 'base.json'):
    copy = tmp_path.with_name(f'without_{name}')
    shutil.copytree(tmp_path, copy)
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    with pytest.raises(Error, match=f'{name} is damaged'):
      store.open(copy, TEMPLATE, at_round=1)


@pytest.fixture
def pruned(tmp_path):
  """A folder whose base holds clients 1 and 2 and a journal client 3."""
  folder = tmp_path / 'states'
  opened = store.open(folder, TEMPLATE, at_round=0)
  put(opened, c1=5.0, c2=6.0)
  opened.commit(1)
  put(opened, c3=7.0)
  opened.commit(2)
  opened.prune(1)
  return folder


def test_a_changed_row_is_named_when_its_client_is_read(pruned):
  path = pruned / 'base.rows'
  content = path.read_bytes()
  for i in range(len(content)):
    bad = bytearray(content)
    bad[i] ^= 1
    path.write_bytes(bad)
    opened = store.open(pruned, TEMPLATE, at_round=2)
    damaged, whole = (1, 2) if i < len(content) // 2 else (2, 1)
    words = f'base.rows is damaged: the checksum of client {damaged} does not'
    with pytest.raises(Error, match=words):
      opened.gather([0, damaged])
    opened.gather([whole, 3, 4])  # those of others are still read


@pytest.mark.parametrize('name', ['base.json', 'base.ids'])
def test_any_bit_of_what_describes_the_rows_is_checked(pruned, name):
  path = pruned / name
  content = path.read_bytes()
  for i in range(len(content)):
    bad = bytearray(content)
    bad[i] ^= 1 << (i % 7)
    path.write_bytes(bad)
    with pytest.raises(Error, match=f'{name} is damaged'):
      store.open(pruned, TEMPLATE, at_round=2)


def test_a_store_without_checksums_is_read_and_gets_them(pruned):
  path = pruned / 'base.json'
  content = json.loads(path.read_text())
  del content['sha256'], content['ids_sha256']
  path.write_text(json.dumps(content))
  (pruned / 'base.sums').unlink()
  opened = store.open(pruned, TEMPLATE, at_round=2)
  assert held(opened) == expected(c1=5.0, c2=6.0, c3=7.0)
  opened.prune(2)
  assert held(opened) == expected(c1=5.0, c2=6.0, c3=7.0)
  assert (pruned / 'base.sums').stat().st_size == 3 * 16
  (pruned / 'base.rows').write_bytes(bytes(3 * 12))
  opened = store.open(pruned, TEMPLATE, at_round=2)
  with pytest.raises(Error, match=r'base.rows is damaged'):
    opened.gather([1])


@pytest.mark.parametrize('gone', ['folder', 'replaced', 'base.json', 'journal'])
def test_a_folder_that_is_removed_is_not_begun_anew(pruned, gone):
  opened = store.open(pruned, TEMPLATE, at_round=2)
  put(opened, c4=8.0)
  if gone == 'base.json':
    (pruned / 'base.json').unlink()
    words = 'base.json was removed while this run was at work'
  elif gone == 'journal':
    (pruned / 'journal_00000002').unlink()
    words = 'journal_00000002 was removed while this run was at work'
  else:
    # Kept, so that its inode is not given to the folder in its place.
    pruned.rename(pruned.with_name('elsewhere'))
    if gone == 'replaced':
      pruned.mkdir()
    words = 'states was removed or replaced while this run was at work'
  before = sorted(pruned.glob('*'))
  for action in (lambda: opened.commit(3), lambda: opened.prune(2)):
    with pytest.raises(Error, match=words):
      action()
  assert sorted(pruned.glob('*')) == before


def test_a_row_file_that_is_removed_is_not_begun_anew(pruned):
  opened = store.open(pruned, TEMPLATE, at_round=2)
  for name in ('base.rows', 'base.ids', 'base.sums'):
    kept = (pruned / name).read_bytes()
    (pruned / name).unlink()
    with pytest.raises(Error, match=f'{name} is damaged: it has 0 bytes'):
      opened.prune(2)
    (pruned / name).write_bytes(kept)
  opened.prune(2)
  assert held(opened) == expected(c1=5.0, c2=6.0, c3=7.0)


def test_links_are_not_followed_when_writing(pruned, tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  opened = store.open(pruned, TEMPLATE, at_round=2)
  put(opened, c4=8.0)
  (pruned / 'journal_00000003.part').symlink_to(victim)
  (pruned / 'base.json.part').symlink_to(victim)
  opened.commit(3)
  opened.prune(2)
  rows = (pruned / 'base.rows').read_bytes()
  (pruned / 'base.rows').unlink()
  (pruned / 'base.rows').symlink_to(victim)
  victim.write_bytes(rows)
  with pytest.raises(Error, match=r'base.rows cannot be written'):
    opened.prune(3)
  assert victim.read_bytes() == rows


# ------------------------------------------------------------------- kills --


class Killed(BaseException):
  """Nothing catches it: what is on the disk is what a kill leaves."""


def killing(monkeypatch, after):
  """Kills the n-th call that changes the disk for good, before it happens."""
  left = [after]

  def wrap(original):
    def call(*args, **kwargs):
      left[0] -= 1
      if left[0] < 0:
        raise Killed
      return original(*args, **kwargs)

    return call

  monkeypatch.setattr(os, 'fsync', wrap(os.fsync))
  monkeypatch.setattr(os, 'replace', wrap(os.replace))
  monkeypatch.setattr(pathlib.Path, 'unlink', wrap(pathlib.Path.unlink))


def test_a_kill_at_any_moment_loses_nothing_that_counts(tmp_path):
  """Checkpoints of rounds 2 and 3 exist, then of 3 and 4."""
  two = {'c1': 2.0, 'c2': 2.0}
  three = {**two, 'c2': 3.0, 'c3': 3.0}
  four = {**three, 'c3': 4.0, 'c4': 4.0}
  moments, scribbled, survived = 0, 0, False
  while not survived:
    folder = tmp_path / str(moments)
    opened = store.open(folder, TEMPLATE, at_round=0)
    put(opened, **two)
    opened.commit(2)
    opened.prune(0)
    put(opened, **three)
    opened.commit(3)
    opened.prune(2)
    put(opened, **four)
    done = []
    with pytest.MonkeyPatch.context() as patch:
      killing(patch, moments)
      try:
        opened.commit(4)
        done.append('commit')
        opened.prune(3)
        survived = True
      except Killed:
        pass
    description = (folder / 'base.json').read_text()
    if '"round": 2' in description and '"folding": 3' in description:
      # Whatever the disk holds of a base that is being written.
      scribbled += 1
      for name in ('base.rows', 'base.ids'):
        size = 3 * (12 if name == 'base.rows' else 8)
        keep = 12 if name == 'base.rows' else 16  # client 1; clients 1 and 2
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep].ljust(size, b'\xaa'))
    if 'commit' in done:
      copy = folder.with_name(f'{moments}_at_4')
      shutil.copytree(folder, copy)
      opened = store.open(copy, TEMPLATE, at_round=4)
      assert held(opened) == expected(**four)
      opened.prune(4)
      assert held(opened) == expected(**four)
    opened = store.open(folder, TEMPLATE, at_round=3)
    assert held(opened) == expected(**three)
    # And the run goes on from there.
    put(opened, c0=8.0)
    opened.commit(4)
    opened.prune(3)
    opened = store.open(folder, TEMPLATE, at_round=4)
    assert held(opened) == expected(**three, c0=8.0)
    assert not list(folder.glob('*.part'))
    moments += 1
  assert moments > 12 and scribbled > 2


CHILD = """
import sys
import numpy as np
from fedjax_llm.clients import store
from fedjax_llm.types import ClientState
opened = store.open(
  sys.argv[1], ClientState(private=np.zeros(100_000, np.float32)), at_round=0
)
for round in range(1, 1000):
  ids = (np.arange(3) + round) % 7
  new = np.full((3, 100_000), round, np.float32)
  opened.scatter(ids, np.ones(3, bool), ClientState(private=new))
  opened.commit(round)
  print(round, flush=True)
  opened.prune(round - 1)
"""


def test_sigkill_leaves_the_last_two_rounds(tmp_path):
  root = pathlib.Path(store.__file__).parents[2]
  child = subprocess.Popen(
    [sys.executable, '-c', CHILD, str(tmp_path)],
    stdout=subprocess.PIPE,
    cwd=root,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert child.stdout is not None
  for _ in range(9):
    last = int(child.stdout.readline())
  child.send_signal(signal.SIGKILL)
  last = max([last, *map(int, child.stdout.read().split())])
  child.wait()
  child.stdout.close()
  template = ClientState(private=np.zeros(100_000, np.float32))
  for round in (last, last - 1):
    opened = store.open(tmp_path, template, at_round=round)
    rows = opened.gather(np.arange(7)).private
    wrote = [
      max(r for r in range(1, round + 1) if (i - r) % 7 < 3) for i in range(7)
    ]
    np.testing.assert_array_equal(rows, np.array(wrote)[:, None] + 0 * rows)


# --------------------------------------------------------------- full disk --


def test_a_full_disk_is_a_sentence_and_the_changes_stay(tmp_path, monkeypatch):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  put(opened, c1=5.0)
  opened.commit(1)
  put(opened, c1=6.0)

  def full(file):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(Error, match=r'journal_00000002 cannot .* disk is full'):
      opened.commit(2)
  assert held(opened) == expected(c1=6.0)
  assert not list(tmp_path.glob('*.part'))
  opened.commit(2)  # once there is room
  assert held(store.open(tmp_path, TEMPLATE, at_round=2)) == expected(c1=6.0)


def test_a_full_disk_while_folding_loses_nothing(tmp_path, monkeypatch):
  opened = store.open(tmp_path, TEMPLATE, at_round=0)
  put(opened, c1=5.0)
  opened.commit(1)
  put(opened, c1=6.0, c2=6.0)
  opened.commit(2)

  def full(path, parts):
    with disk.writing(path):
      raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(journal, '_update', full)
    with pytest.raises(Error, match=r'base.rows cannot .* disk is full'):
      opened.prune(1)
  assert held(opened) == expected(c1=6.0, c2=6.0)
  opened.prune(1)
  assert held(opened) == expected(c1=6.0, c2=6.0)
  assert held(store.open(tmp_path, TEMPLATE, at_round=1)) == expected(c1=5.0)
