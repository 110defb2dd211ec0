"""Writes into folders safely: locks, atomic files, no symbolic links."""

import os
import pathlib
from typing import Any

from fedjax_llm.types import Error

# Folders that a run writes into, and those in which services put links.
_OURS = (
  *('checkpoints', 'states', 'adapter', 'base', 'tensorboard', 'runs'),
  'profile',
)
_THEIRS = ('wandb', 'mlruns')


def check_links(folder: pathlib.Path) -> None:
  """Raises `Error` if a path that a run writes is a symbolic link.

  The folder itself may be one.
  """
  for path in folder.iterdir():
    _refuse_link(path)
    if path.name in _OURS:
      for top, folders, files in os.walk(path):
        folders[:] = [x for x in folders if x not in _THEIRS]
        for name in (*folders, *files):
          _refuse_link(pathlib.Path(top, name))


def _refuse_link(path: pathlib.Path) -> None:
  if path.is_symlink():
    raise Error(
      f'{path} is a symbolic link, and a run writes through none: remove it, '
      'or take another workdir.'
    )


def replace(file: pathlib.Path, content: str | bytes) -> None:
  """Writes a file atomically; no symbolic link is followed."""
  fresh = file.with_name(f'{file.name}.new')
  try:
    fresh.unlink(missing_ok=True)
    with fresh.open('xb') as out:
      out.write(content if isinstance(content, bytes) else content.encode())
      out.flush()
      os.fsync(out.fileno())
    os.replace(fresh, file)
  except OSError as error:
    fresh.unlink(missing_ok=True)
    raise Error(f'{file} cannot be written: {error.strerror}.') from error


def lock(folder: pathlib.Path, *, read_only: bool = False) -> Any:
  """Locks a folder until this process ends; returns the open lock file.

  With `read_only` nothing is written and other processes may read as well; the
  result is None where no run has locked the folder before.

  Raises:
    Error: a run is at work in the folder.
  """
  path = folder / '.lock'
  flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
  try:
    number = os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)
  except OSError as error:
    if read_only:
      return None
    raise Error(f'{path} cannot be written: {error.strerror}.') from error
  held = os.fdopen(number, 'r' if read_only else 'r+')
  try:
    import fcntl

    kind = fcntl.LOCK_SH if read_only else fcntl.LOCK_EX
    fcntl.lockf(held, kind | fcntl.LOCK_NB)
  except ImportError:
    pass  # a system without such locks
  except (BlockingIOError, PermissionError) as error:
    held.close()
    raise Error(f'--workdir {folder}: another run is at work in it.') from error
  except OSError:
    pass  # a file system without them
  return held
