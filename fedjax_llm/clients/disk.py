"""Writes the files of a store in full or not at all; checks its folder."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from fedjax_llm.types import Error


class Place(NamedTuple):
  """A folder's path, and its identity when it was opened."""

  path: pathlib.Path
  mark: tuple[int, int]  # device and inode


def place(folder: pathlib.Path) -> Place:
  """Returns the folder with its present identity."""
  stat = folder.stat()
  return Place(folder, (stat.st_dev, stat.st_ino))


def check_place(opened: Place, journals: Iterable[Any] = ()) -> None:
  """Raises `Error` if the folder or a file that is needed is gone.

  Rows written into a folder that replaced it would be lost.
  """
  folder = opened.path
  try:
    same = place(folder).mark == opened.mark
    wanted = [folder / 'base.json', *(j.path for j in journals)]
    missing = [path for path in wanted if not path.is_file()]
  except OSError:
    same, missing = False, []
  if not same:
    raise Error(
      f'{folder} was removed or replaced while this run was at work: the state '
      'of the clients is lost with it, so the run ends.'
    )
  if missing:
    raise Error(
      f'{missing[0]} was removed while this run was at work: the state of the '
      'clients is lost with it, so the run ends.'
    )


def replace(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
  """Replaces a file's content on the disk, all of it or nothing.

  Symbolic links at the file's or its draft's name are not followed.
  """
  part = path.with_name(path.name + '.part')
  try:
    part.unlink(missing_ok=True)
    with part.open('xb') as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except OSError:
    part.unlink(missing_ok=True)
    raise
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns an `OSError` into an `Error` that names the file."""
  try:
    yield
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise Error(f'{path} cannot be written: the disk is full.') from e
    raise Error(f'{path} cannot be written: {e.strerror or e}.') from e
