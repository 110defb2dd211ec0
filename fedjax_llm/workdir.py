"""The folder of a run: what is where, whose it is, and how a run may end.

config.json            the resolved config, every default filled in
metrics.jsonl          one JSON object a round
metrics.csv            its numbers as a table
tensorboard/           the same as event files
trackers.json          the ids of this run at services that track it
clients.json           how many texts each client has
checkpoints/, states/  the server's state, and the private one of clients
adapter/               the final adapter, a PEFT directory
base/                  the frozen weights, where nobody else has them
samples.json           replies before and after
report.txt             what was printed at the end
"""

import contextlib
import json
import os
import pathlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm import config, hosts
from fedjax_llm.types import Error

# What may change between a run and its resumption, without changing a number
# that was already written.
_FREE = (
  *('num_rounds', 'checkpoint_every', 'keep_checkpoints'),
  *('checkpoint_writers', 'compilation_cache', 'chosen', 'hosts', 'tracking'),
  *('mesh_model', 'execution', 'cpu_devices'),  # rounding, from here on
)


class Stopped(BaseException):
  """SIGTERM came where nothing is worth waiting for."""


class Workdir(NamedTuple):
  """Where things are; and functions, before whose first nothing is written.

  `take()` makes the folder and keeps other processes out of it,
  `save_config()` writes the resolved config, `keep(name, value)` a small JSON
  file, `finish(round, text)` the report, and `finished(round)` is the report of
  a run that is done with that round.
  `chosen` is what the run chose by itself where its config says 'auto': that of
  an earlier start, and written with the config.
  """

  path: pathlib.Path
  checkpoints: pathlib.Path
  states: pathlib.Path
  adapter: pathlib.Path
  base: pathlib.Path
  take: Callable[[], None]
  save_config: Callable[[], None]
  keep: Callable[[str, Any], None]
  finish: Callable[[int, str], None]
  finished: Callable[[int], str | None]
  chosen: dict[str, Any]


def open(
  path: str, resolved: Mapping[str, Any], *, mine: bool = True
) -> Workdir:
  """Looks at the folder.

  With `mine=False`, in a process that leaves the folder to another one, it is
  never looked at and nothing is written.

  Raises:
    Error: it is an address or no folder, it holds other things than a run, or
      the run in it had another config (the fields that differ are named). From
      `take`: another process is at work in it.
  """
  folder = pathlib.Path(path)
  file, report = folder / 'config.json', folder / 'report.txt'
  chosen: dict[str, Any] = {}
  if '://' in path:
    raise Error(
      f'--workdir {path} is an address, but a run is kept in a folder: mount '
      'the bucket or take a shared file system, and name the path.'
    )
  if not mine:
    nothing = lambda *_: None
    return Workdir(
      path=folder,
      checkpoints=folder / 'checkpoints',
      states=folder / 'states',
      adapter=folder / 'adapter',
      base=folder / 'base',
      take=nothing,
      save_config=nothing,
      keep=nothing,
      finish=nothing,
      finished=nothing,
      chosen=chosen,
    )
  if folder.exists() and not folder.is_dir():
    raise Error(f'--workdir {path} is a file, not a folder.')
  if file.exists():
    try:
      before = json.loads(file.read_text())
      differ = config.same(before, resolved, ignore=_FREE)
      chosen |= before.get('chosen') or {}
    except (ValueError, AttributeError) as error:
      raise Error(f'{file} is damaged ({error}).') from error
    if differ:
      told = '; '.join(
        f'{field} was {_at(before, field)}, is {_at(resolved, field)}'
        for field in differ[:8]
      )
      more = f'; and {len(differ) - 8} more' if len(differ) > 8 else ''
      raise Error(
        f'--workdir {path} holds a run of another config: {told}{more}. Take '
        'another workdir, or the config of that run.'
      )
  elif folder.exists():
    # A run that was killed at once leaves no more than its lock.
    others = {p.name for p in folder.iterdir()} - {'.lock', 'config.json.new'}
    if others:
      raise Error(
        f'--workdir {path} holds other things than a run, {min(others)!r} for '
        'one: take a new or an empty folder.'
      )
  locks = []

  def take() -> None:
    folder.mkdir(parents=True, exist_ok=True)
    locks.append(lock(folder))

  def save_config() -> None:
    told = {**resolved, 'chosen': chosen} if chosen else resolved
    replace(file, json.dumps(told, indent=2, sort_keys=True) + '\n')

  def keep(name: str, value: Any) -> None:
    replace(folder / name, json.dumps(value) + '\n')

  def finish(round: int, text: str) -> None:
    replace(report, f'{_title(round)}\n\n{text}\n')

  def finished(round: int) -> str | None:
    needed = (folder / 'adapter').is_dir() and report.is_file()
    if not file.exists() or not needed:
      return None
    title, _, text = report.read_text().partition('\n\n')
    return text.rstrip('\n') if title == _title(round) else None

  return Workdir(
    path=folder,
    checkpoints=folder / 'checkpoints',
    states=folder / 'states',
    adapter=folder / 'adapter',
    base=folder / 'base',
    take=take,
    save_config=save_config,
    keep=keep,
    finish=finish,
    finished=finished,
    chosen=chosen,
  )


def _title(round: int) -> str:
  return f'After round {round}'


def _at(tree: Any, field: str) -> str:
  for name in field.split('.'):
    if not isinstance(tree, Mapping) or name not in tree:
      return 'absent'
    tree = tree[name]
  return repr(tree)


def replace(file: pathlib.Path, content: str | bytes) -> None:
  """All of it or nothing."""
  fresh = file.with_name(f'{file.name}.new')
  try:
    with fresh.open('wb') as out:
      out.write(content if isinstance(content, bytes) else content.encode())
      out.flush()
      os.fsync(out.fileno())
    os.replace(fresh, file)
  except OSError as error:
    fresh.unlink(missing_ok=True)
    raise Error(f'{file} cannot be written: {error.strerror}.') from error


def lock(folder: pathlib.Path) -> Any:
  """Held until the process ends, however it ends."""
  held = (folder / '.lock').open('a')
  try:
    import fcntl

    fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except ImportError:
    pass  # a system without such locks
  except (BlockingIOError, PermissionError) as error:
    held.close()
    raise Error(f'--workdir {folder}: another run is at work in it.') from error
  except OSError:
    pass  # a file system without them
  return held


# ------------------------------------------------------------------ ending --


def status(program: Callable[[], None]) -> int:
  """Runs a program; its exit status. A mistake of the user is one sentence."""
  goes_on = 'the same command goes on from the last checkpoint'
  try:
    with stoppable():
      program()
      hosts.leave()
    return 0
  except Error as error:
    told = str(error)
  except OSError as error:
    told = f'{error.filename or "the system"}: {error.strerror or error}.'
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      told = 'out of memory: set block_size, or lower cohort.batch_size.'
    elif hosts.several():
      told = hosts.explained(error)
    else:
      raise
  except Stopped:
    return hosts.end(f'stopped; {goes_on}', 0)
  except KeyboardInterrupt:
    return hosts.end(f'\nstopped; {goes_on}', 130)
  except Exception as error:
    if not hosts.several():
      raise
    traceback.print_exc()
    told = f'{type(error).__name__}: {error}'
  return hosts.end(f'error: {told}', 1)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """SIGTERM raises `Stopped` inside, until `stop_after_round` is called."""

  def stop(*_):
    raise Stopped

  if threading.current_thread() is not threading.main_thread():
    yield  # signals are the main thread's
    return
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def stop_after_round() -> Callable[[], bool]:
  """From now on SIGTERM is only noted; says whether it came."""
  asked = threading.Event()
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
  return asked.is_set
