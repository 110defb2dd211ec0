"""A directory of checkpoints: `open` returns its functions.

`restore` reads the newest undamaged checkpoint.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from fedjax_llm.run.checkpoint import files
from fedjax_llm.run.checkpoint.leaves import Writers
from fedjax_llm.types import Error

_PART = 'part_'  # the prefix of incomplete checkpoints


class Restored(NamedTuple):
  """A checkpoint that was read."""

  round: int
  state: Any  # with the template's structure
  meta: dict[str, Any]
  notices: list[str]  # a sentence about each checkpoint that was skipped
  earlier: bool = False  # an earlier version wrote it in another structure


class Checkpointer(NamedTuple):
  """The functions of an open directory of checkpoints.

  `save(round, state, meta={}, keep=())` returns when the checkpoint is
  complete on disk. `state` is any pytree of arrays, numbers, typed PRNG keys
  and None; `meta` is JSON. It removes rounds older than the `max_to_keep`
  newest, except those in `keep`, and all later rounds, which a resumption has
  undone. It raises `Error` on a full disk, with the checkpoints before it
  intact, and where the folder was removed since it was opened.
  `restore(template, newest=None)` returns the newest undamaged checkpoint as
  `Restored`, bit for bit, or None if there is no checkpoint; a number `newest`
  is the last round to consider. `template` is a state, or its
  `jax.ShapeDtypeStruct`s. It raises `Error` if all checkpoints are damaged or
  hold another state.
  `fail(round, why)` marks a round as unusable (its client states are damaged):
  `restore` skips it.
  `rounds()` returns the rounds that are kept, ascending, without those that
  `restore` has skipped as damaged.
  """

  save: Callable[..., None]
  restore: Callable[..., Restored | None]
  rounds: Callable[[], list[int]]
  fail: Callable[[int, str], None] = lambda round, why: None


def open(
  directory: str | os.PathLike,
  *,
  max_to_keep: int = 2,
  mine: bool = True,
  writers: Writers | None = None,
  read_only: bool = False,
  conf: Mapping[str, Any] | None = None,
) -> Checkpointer:
  """Returns the `Checkpointer` of a directory; the first `save` creates it.

  The remains of an interrupted `save` are removed.

  Args:
    directory: a folder for these checkpoints only.
    max_to_keep: the number of rounds to keep; with 2 or more a damaged round
      can be skipped.
    mine: False in a process that leaves the checkpoints to another one:
      `restore` and `rounds` return nothing. The results of a round are whole on
      every device, so one process can write all of them.
    writers: the processes that write together, into a folder that all of them
      see; each of them calls `save`. None: only the process with `mine` writes.
    read_only: True: nothing is removed, and `save` raises an `Error`.
    conf: the config of the run; some states of earlier versions need it.

  Raises:
    Error: `max_to_keep` is below 1.

  >>> import jax, tempfile
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   checkpointer = open(directory)
  ...   ones = jax.numpy.ones(2)
  ...   state = {'params': ones, 'key': jax.random.key(0), 'none': None}
  ...   checkpointer.save(3, state, {'config': 'tiny'})
  ...   restored = checkpointer.restore(state)
  >>> restored.round, restored.state['params'].tolist(), restored.meta
  (3, [1.0, 1.0], {'config': 'tiny'})
  """
  if max_to_keep < 1:
    raise Error(f'max_to_keep is {max_to_keep}: one checkpoint must be kept.')
  folder, group = pathlib.Path(directory).absolute(), writers or Writers()

  damaged: dict[int, str] = {}  # round -> a sentence
  mark: list[tuple[int, int]] = []  # device and inode of the folder

  def place(round: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the path of a checkpoint, and the path it is written to."""
    path = folder / f'round_{round:08d}'
    return path, path.with_name(_PART + path.name)

  def help(round: int, state: Any, meta: Any = None, keep: Any = None) -> None:
    del meta, keep  # of the process that writes the manifest
    path, part = place(int(round))
    if group.count > 1:
      with _writing(path):
        files.write(part, int(round), state, {}, group)

  if not mine:
    return Checkpointer(help, lambda template, newest=None: None, lambda: [])
  for left in [] if read_only else folder.glob(f'{_PART}*'):
    shutil.rmtree(left)

  def present() -> list[int]:
    names = (re.fullmatch(r'round_(\d+)', p.name) for p in folder.glob('*'))
    rounds = {int(name[1]): name[0] for name in names if name}
    return sorted(r for r, name in rounds.items() if name == place(r)[0].name)

  def look() -> tuple[int, int] | None:
    try:
      stat = folder.stat()
    except OSError:
      return None
    return stat.st_dev, stat.st_ino

  if (now := look()) is not None:
    mark.append(now)

  def rounds() -> list[int]:
    return [r for r in present() if r not in damaged]

  def save(
    round: int,
    state: Any,
    meta: dict[str, Any] | None = None,
    keep: Collection[int] = (),
  ) -> None:
    if read_only:
      raise Error(f'{folder} was opened to be read only.')
    if mark and mark[0] != look():
      raise Error(
        f'{folder} was removed or replaced while this run was at work: its '
        'checkpoints are lost, so the run ends.'
      )
    round = int(round)
    path, part = place(round)
    shutil.rmtree(part, ignore_errors=True)
    try:
      with _writing(path):
        part.mkdir(parents=True)
        files.write(part, round, state, meta or {}, group)
        if path.exists():
          # An earlier save is damaged or undone: this one replaces it.
          path.rename(path.with_name(f'{_PART}old_{path.name}'))
        part.rename(path)
        files.sync(folder)
        mark[:] = [now] if (now := look()) else []
    except Exception:
      shutil.rmtree(part, ignore_errors=True)
      raise
    damaged.pop(round, None)
    kept = [r for r in rounds() if r <= round]
    kept = {*kept[-max_to_keep:], *(r for r in kept if r in keep)}
    for r in present():
      if r not in kept:
        # Renamed first: half a checkpoint must not look like a damaged one.
        old, _ = place(r)
        old.rename(old.with_name(f'{_PART}old_{old.name}'))
    for left in folder.glob(f'{_PART}*'):
      shutil.rmtree(left, ignore_errors=True)

  def restore(template: Any, newest: int | None = None) -> Restored | None:
    notices = []
    for round in reversed(present()):
      if newest is not None and round > newest:
        continue
      path, _ = place(round)
      if round not in damaged:
        try:
          manifest = files.verified(path)
          state, earlier = files.read(path, manifest, template, conf)
          meta = json.loads((path / 'meta.json').read_text())
          return Restored(round, state, meta, notices, earlier)
        except files.Damage as e:
          damaged[round] = f'the checkpoint {path} is damaged ({e}): left out.'
        except (OSError, ValueError) as e:
          if isinstance(e, Error):
            raise
          words = f'meta.json: {e}'
          damaged[round] = f'the checkpoint {path} is damaged ({words}).'
      notices.append(damaged[round])
    if notices:
      raise Error(f'no checkpoint in {folder} is usable: {" ".join(notices)}')
    return None

  def fail(round: int, why: str) -> None:
    path, _ = place(round)
    damaged[round] = f'the checkpoint {path} is left out: {why}'

  return Checkpointer(save, restore, rounds, fail)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Turns an error of the disk into an `Error`, as a context."""
  before = sys.excepthook

  def hook(kind, error, traceback):
    if 'Event loop is closed' not in str(error):
      before(kind, error, traceback)

  # After a failure orbax's threads go on, and print about a closed event loop.
  sys.excepthook = hook
  try:
    yield
    sys.excepthook = before
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise Error(f'{path} cannot be saved: the disk is full.') from e
    raise Error(f'{path} cannot be saved: {e.strerror or e}.') from e
  except ValueError as e:
    # Orbax reports errors of the disk as text.
    for words in ('No space left on device', 'Disk quota exceeded'):
      if words in str(e):
        raise Error(f'{path} cannot be saved: the disk is full.') from e
    if 'os_error_code' in str(e):
      raise Error(f'{path} cannot be saved: {e}') from e
    raise
