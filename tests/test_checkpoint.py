"""Checkpoints: bit for bit, and never half of one."""

import doctest
import itertools
import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.clients import store
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import checkpoint
from fedjax_llm.run.checkpoint import directory
from fedjax_llm.run.checkpoint import files as parts
from fedjax_llm.types import ClientState, Error, ServerState


def server(seed=0) -> ServerState:
  """A state with every kind of leaf that a server has."""
  rng = np.random.default_rng(seed)

  def noise(*shape):
    return jnp.array(rng.normal(size=shape), jnp.float32)

  params = {
    'q_proj': LowRank(a=noise(2, 4, 3), b=noise(2, 3, 5), scale=noise(2)),
    'odd/name': [noise(3).astype(jnp.bfloat16), noise(0, 3)],
  }
  return ServerState(
    round=jnp.int32(seed),
    params=params,
    optimizer=optax.adam(1e-3).init(params),
    aggregator=(None, {'key': jax.random.key(seed), 'lr': 0.1 + seed, 'n': 3}),
    key=jax.random.split(jax.random.key(seed), 2),
  )


def assert_identical(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
    assert type(a) is type(b)
    if isinstance(a, jax.Array):
      assert a.dtype == b.dtype and a.shape == b.shape
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    elif isinstance(a, np.ndarray):
      assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    else:
      assert a == b


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob('*') if p.is_file())


@pytest.fixture(scope='module')
def two_rounds(tmp_path_factory) -> pathlib.Path:
  """Checkpoints of rounds 4 and 6; tests work on copies."""
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  checkpointer = checkpoint.open(folder)
  checkpointer.save(4, server(4), {'at': 4})
  checkpointer.save(6, server(6), {'at': 6})
  return folder


@pytest.fixture
def folder(two_rounds, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(two_rounds, tmp_path / 'checkpoints'))


def restored(folder, template=None):
  found = checkpoint.open(folder).restore(template or server())
  assert found is not None
  return found


def alone(folder):
  checkpoint.open(folder).save(8, server(8), {'at': 8})


def together(folder, other=None):
  """Two processes: the second writes while the first waits for it."""
  state, turns = server(8), itertools.count()

  def meet():
    if next(turns) == 0:
      second.save(8, state)

  second = checkpoint.open(
    other or folder, mine=False, writers=checkpoint.Writers(1, 2)
  )
  first = checkpoint.Writers(0, 2, meet)
  checkpoint.open(folder, writers=first).save(8, state, {'at': 8})


def test_docstring_examples_run():
  result = doctest.testmod(directory)
  assert result.attempted and not result.failed


# ------------------------------------------------------------------ values --


def test_a_state_comes_back_bit_for_bit(folder):
  found = restored(folder)
  assert (found.round, found.meta, found.notices) == (6, {'at': 6}, [])
  assert_identical(found.state, server(6))


def test_shapes_alone_are_a_template(folder):
  state = server(6)
  shapes = jax.eval_shape(lambda: state._replace(aggregator=None))
  # Numbers of Python are not shapes; a state without them restores from shapes.
  checkpointer = checkpoint.open(folder)
  checkpointer.save(7, state._replace(aggregator=None))
  assert_identical(
    restored(folder, shapes).state, state._replace(aggregator=None)
  )


def test_numpy_stays_numpy_and_keeps_its_64_bits(tmp_path):
  state = {'x': np.array([0.1, np.nan, -0.0]), 'n': np.array(2**40)}
  checkpoint.open(tmp_path).save(1, state)
  assert_identical(restored(tmp_path, state).state, state)


def test_other_key_implementations_are_kept(tmp_path):
  state = {'key': jax.random.key(3, impl='rbg')}
  checkpoint.open(tmp_path).save(1, state)
  assert_identical(restored(tmp_path, state).state, state)
  with pytest.raises(Error, match=r'keys of key<rbg>.*key<fry>'):
    restored(tmp_path, {'key': jax.random.key(3)})


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
  checkpointer = checkpoint.open(tmp_path / 'none')
  assert checkpointer.restore(server()) is None
  assert checkpointer.rounds() == []
  assert not (tmp_path / 'none').exists()


def test_orbax_does_not_talk(folder, capfd):
  checkpoint.open(folder).save(8, server(8))
  restored(folder)
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
  'change, says',
  [
    (lambda s: s._replace(round=jnp.float32(0)), r'int32\[\].*float32\[\]'),
    (lambda s: s._replace(params={}), r'params/.*does not have'),
    (lambda s: s._replace(params={**s.params, 'new': jnp.ones(2)}),
     'has no params/new'),
    (lambda s: s._replace(params=jax.tree.map(lambda x: x[:1], s.params)),
     r'odd/name/0.*\[3\].*\[1\]'),
  ],
)  # fmt: skip
def test_a_state_of_another_run_is_refused(folder, change, says):
  with pytest.raises(Error, match=says):
    restored(folder, change(server()))


# ------------------------------------------------------------------ rounds --


def test_the_newest_are_kept_and_undone_rounds_go(folder):
  checkpointer = checkpoint.open(folder, max_to_keep=2)
  checkpointer.save(8, server(8))
  assert checkpointer.rounds() == [6, 8]
  checkpointer.save(7, server(7))  # 8 was undone: the run is at 7
  assert checkpointer.rounds() == [6, 7]
  checkpointer.save(7, server(5))  # a round may be saved again
  assert checkpointer.rounds() == [6, 7]
  assert_identical(restored(folder).state, server(5))
  assert [p.name for p in sorted(folder.iterdir())] == [
    'round_00000006',
    'round_00000007',
  ]
  with pytest.raises(Error, match='max_to_keep is 0'):
    checkpoint.open(folder, max_to_keep=0)


# ------------------------------------------------------------------ damage --


def test_any_damaged_file_is_named_and_the_round_before_is_used(
  two_rounds, folder
):
  names = [
    p.relative_to(two_rounds / 'round_00000006')
    for p in files(two_rounds / 'round_00000006')
  ]
  assert len(names) > 5
  for name in names:
    path = folder / 'round_00000006' / name
    good = path.read_bytes()
    altered = bytearray(good)
    altered[len(good) // 2] ^= 255
    for bad in (None, good[:-1], b'', bytes(altered)):
      if bad is None:
        path.unlink()
      else:
        path.write_bytes(bad)
      found = restored(folder)
      assert found.round == 4 and found.meta == {'at': 4}
      (notice,) = found.notices
      assert str(folder / 'round_00000006') in notice
      assert name.as_posix() in notice
      path.write_bytes(good)
  assert restored(folder).round == 6


def test_the_run_goes_on_after_damage(folder):
  (folder / 'round_00000006' / 'meta.json').write_text('{}')
  checkpointer = checkpoint.open(folder)
  found = checkpointer.restore(server())
  assert found is not None and found.round == 4
  assert checkpointer.rounds() == [4]
  checkpointer.save(6, server(6))
  assert checkpointer.rounds() == [4, 6]
  assert restored(folder).notices == []


def test_if_all_are_damaged_there_is_an_error_that_names_them(folder):
  for path in folder.iterdir():
    (path / 'manifest.json').unlink()
  with pytest.raises(Error, match=r'usable.*round_00000006.*round_00000004'):
    restored(folder)


# ------------------------------------------------------------------- kills --


class Killed(BaseException):
  """Nothing catches it: what is on the disk is what a kill leaves."""


@pytest.mark.parametrize('save', [alone, together])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
  two_rounds, tmp_path, monkeypatch, save
):
  moments, survived, ends = 0, False, []
  while not survived:
    folder = pathlib.Path(shutil.copytree(two_rounds, tmp_path / str(moments)))
    left = [moments]

    def wrap(original, left=left):
      def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
          raise Killed
        return original(*args, **kwargs)

      return call

    with monkeypatch.context() as patch:
      patch.setattr(parts, 'sync', wrap(parts.sync))
      patch.setattr(pathlib.Path, 'rename', wrap(pathlib.Path.rename))
      patch.setattr(shutil, 'rmtree', wrap(shutil.rmtree))
      try:
        save(folder)
        survived = True
      except Killed:
        pass
    found = restored(folder)
    assert found.notices == []
    assert_identical(found.state, server(found.round))
    assert not list(folder.glob('part_*'))
    ends.append(found.round)
    shutil.rmtree(folder)
    moments += 3 if moments < 10 else 1
  # How many moments there are varies: orbax renames from threads of its own,
  # and may or may not outlive being interrupted there.
  assert set(ends) <= {6, 8} and ends[-1] == 8


# ----------------------------------------------------------------- writers --


def test_what_two_wrote_anybody_reads(folder):
  together(folder)
  found = restored(folder)
  assert (found.round, found.meta, found.notices) == (8, {'at': 8}, [])
  assert_identical(found.state, server(8))
  path = folder / 'round_00000008'
  manifest = json.loads((path / 'manifest.json').read_text())
  shares = {'state': 0, 'state_1': 0}
  for leaf in manifest['leaves']:
    dtype, shape = leaf['file_kind']
    shares[leaf['folder']] += np.zeros(shape, jnp.dtype(dtype)).nbytes
  assert abs(shares['state'] - shares['state_1']) <= 4 * 2 * 4 * 3  # a leaf
  on_disk = {p.relative_to(path).as_posix() for p in files(path)}
  assert on_disk == {*manifest['files'], 'manifest.json'}
  part = next(p for p in files(path / 'state_1') if p.stat().st_size)
  part.write_bytes(part.read_bytes()[:-1])
  found = restored(folder)
  assert found.round == 6 and part.name in found.notices[0]
  alone(folder)
  assert restored(folder).round == 8 and not (path / 'state_1').exists()


def test_a_writer_who_sees_another_disk_is_told(folder, tmp_path):
  elsewhere = tmp_path / 'elsewhere'
  with pytest.raises(Error, match=r'process 1 does not see .*part_round_0000'):
    together(folder, elsewhere)
  # Something of that name may lie there by chance.
  (elsewhere / 'part_round_00000008').mkdir(parents=True)
  with pytest.raises(Error, match='process 1 has written to another disk'):
    together(folder, elsewhere)
  assert restored(folder).round == 6


# --------------------------------------------------------------- full disk --


@pytest.mark.parametrize(
  'where, error',
  [
    ('sync', OSError(28, 'No space left on device')),
    ('write', ValueError('RESOURCE_EXHAUSTED: No space left on device')),
  ],
)
def test_a_full_disk_is_a_sentence(folder, monkeypatch, where, error):
  def full(*_):
    raise error

  checkpointer = checkpoint.open(folder)
  with monkeypatch.context() as patch:
    patch.setattr(parts, where, full)
    with pytest.raises(Error, match=r'round_00000008 cannot .* disk is full'):
      checkpointer.save(8, server(8))
  assert len(list(folder.iterdir())) == 2
  assert restored(folder).round == 6


def test_a_write_that_the_system_refuses_is_a_sentence(folder):
  """A real refusal inside orbax: files may not grow beyond 4 KiB."""
  state = {'x': np.random.default_rng(0).normal(size=100_000)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    with pytest.raises(Error, match='round_00000008 cannot be saved'):
      checkpoint.open(folder).save(8, state)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert len(list(folder.iterdir())) == 2
  assert restored(folder).round == 6


# --------------------------------------------------------------- the store --


def test_the_store_follows_the_checkpoint_that_is_used(tmp_path):
  """The newest checkpoint is damaged: both go back to the one before it."""
  template = ClientState(private=np.zeros(2, np.float32))
  checkpointer = checkpoint.open(tmp_path / 'checkpoints')
  states = store.open(tmp_path / 'clients', template, at_round=0)
  for round in range(1, 6):
    new = ClientState(private=np.full((2, 2), round, np.float32))
    states.scatter(np.array([round, 9]), np.ones(2, bool), new)
    states.commit(round)
    checkpointer.save(round, {'round': round})
    states.prune(checkpointer.rounds()[0])
  (tmp_path / 'checkpoints' / 'round_00000005' / 'meta.json').unlink()
  checkpointer = checkpoint.open(tmp_path / 'checkpoints')
  found = checkpointer.restore({'round': 0})
  assert found is not None and found.state == {'round': 4}
  states = store.open(tmp_path / 'clients', template, at_round=found.round)
  assert states.gather(np.arange(10)).private[:, 0].tolist() == [
    0, 1, 2, 3, 4, 0, 0, 0, 0, 4,
  ]  # fmt: skip
  states.commit(5)
  assert os.listdir(tmp_path / 'clients')
