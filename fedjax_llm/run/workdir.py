"""The folder of a run: its files, its lock, and how a run ends.

`open` returns a `Workdir` of paths and functions; `status` runs a program and
returns its exit status. The files:

config.json            the resolved config, every default filled in
metrics.jsonl          one JSON object a round
metrics.csv            its numbers as a table
tensorboard/           the same as event files
profile/               traces of the rounds that `profile` names
trackers.json          the ids of this run at services that track it
clients.json           the number of texts of each client
checkpoints/, states/  the server's state, and the private states of clients
adapter/               the final adapter, a PEFT directory
base/                  the frozen weights, where no model file holds them
samples.json           replies before and after training
report.txt             the text that was printed at the end
finished.json          the last round, and SHA-256 of the files of the end
"""

import hashlib
import json
import os
import pathlib
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fedjax_llm import _early
from fedjax_llm.devices import hosts
from fedjax_llm.run import config, signals, versions
from fedjax_llm.run.signals import Stopped as Stopped
from fedjax_llm.run.signals import stop_after_round as stop_after_round
from fedjax_llm.run.signals import stoppable as stoppable
from fedjax_llm.types import Error

# Fields that may change between a run and its resumption, without changing a
# number that was already written.
_FREE = (
  *('num_rounds', 'checkpoint_every', 'keep_checkpoints'),
  *('checkpoint_writers', 'compilation_cache', 'profile'),
  *('chosen', 'hosts', 'tracking'),
  *('mesh_model', 'execution', 'cpu_devices'),  # rounding, from here on
  *('evals', 'changes'),
)
# A change of these fields is printed, and noted in config.json.
_NOTED = ('num_rounds', 'evals', 'clients.cohort_size')
# The keys of config.json that are not fields of the config.
NOTES = ('chosen', 'changes')


# Folders that a run writes into, and those in which services put links.
_OURS = (
  *('checkpoints', 'states', 'adapter', 'base', 'tensorboard', 'runs'),
  'profile',
)
_THEIRS = ('wandb', 'mlruns')


class Workdir(NamedTuple):
  """The paths of a run's folder, and the functions that read and write it.

  `take()` makes the folder and keeps other processes out of it; `hold()` keeps
  runs out while the folder is read, and writes nothing. `save_config()` writes
  the resolved config, `keep(name, value)` a small JSON file, and
  `finish(round, text, patience=None)` the report; `patience` is that of a run
  that ended early. `finished(round, patience=None)` returns the report of a run
  that has done that round or was ended by the same patience, else None; where a
  file of the end is missing or damaged it returns None and `lost` names the
  file. `check()` raises `Error` if the folder was removed or replaced after
  `take()`.

  `chosen` holds the values that an earlier start chose for fields that are
  'auto'; they are written with the config. `changed` holds the fields that
  differ from an earlier start and are allowed to, each with the old and the new
  value; `save_config(done)` notes them for the rounds after `done`.
  """

  path: pathlib.Path
  checkpoints: pathlib.Path
  states: pathlib.Path
  adapter: pathlib.Path
  base: pathlib.Path
  take: Callable[[], None]
  save_config: Callable[..., None]
  keep: Callable[[str, Any], None]
  finish: Callable[..., None]
  finished: Callable[..., str | None]
  chosen: dict[str, Any]
  lost: list[str]
  hold: Callable[[], None]
  check: Callable[[], None]
  changed: dict[str, Any]


def open(
  path: str, resolved: Mapping[str, Any], *, mine: bool = True
) -> Workdir:
  """Returns the `Workdir` at `path`, after a check of the run in it.

  With `mine=False`, in a process that leaves the folder to another one, the
  folder is neither read nor written.

  Raises:
    Error: `path` is an address or a file, the folder holds other things than a
      run, or a run with another config (the message names the fields). From
      `take`: another process is at work in the folder.
  """
  folder = pathlib.Path(path)
  file, report = folder / 'config.json', folder / 'report.txt'
  chosen: dict[str, Any] = {}
  changed: dict[str, Any] = {}
  changes: list[Any] = []
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
      lost=[],
      hold=nothing,
      check=nothing,
      changed={},
    )
  if folder.exists() and not folder.is_dir():
    raise Error(f'--workdir {path} is a file, not a folder.')
  if file.exists():
    try:
      before = versions.translated(json.loads(file.read_text()))
      free = (*_FREE, *_sizes(resolved))
      # A field that an older version did not know has its default.
      differ = [
        field
        for field in config.same(before, resolved, ignore=NOTES)
        if (_get(before, field), _get(resolved, field)) not in _SAME
      ]
      changed |= {
        field: {'was': _get(before, field), 'is': _get(resolved, field)}
        for field in differ
        if _is_one(field, _NOTED) and _is_one(field, free)
      }
      differ = [field for field in differ if not _is_one(field, free)]
      chosen |= before.get('chosen') or {}
      if any(type(x) is not int or x < 1 for x in chosen.values() if x):
        raise ValueError(f"'chosen' is {chosen!r:.60}")
      changes += before.get('changes') or []
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
      raise Error(f'{file} is damaged ({error}).') from error
    if differ:
      differences = '; '.join(
        f'{field} was {_at(before, field)}, is {_at(resolved, field)}'
        for field in differ[:8]
      )
      more = f'; and {len(differ) - 8} more' if len(differ) > 8 else ''
      raise Error(
        f'--workdir {path} holds a run of another config: {differences}{more}. '
        'Take another workdir, or the config of that run.'
      )
  elif folder.exists():
    # A run that was killed at once leaves no more than its lock.
    others = {p.name for p in folder.iterdir()} - {'.lock', 'config.json.new'}
    if others:
      raise Error(
        f'--workdir {path} holds other things than a run, {min(others)!r} for '
        'one: take a new or an empty folder.'
      )
  locks: list[Any] = []
  lost: list[str] = []
  end = folder / 'finished.json'

  def take() -> None:
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    locks.append(lock(folder))

  def hold() -> None:
    locks.append(lock(folder, read_only=True))

  def check() -> None:
    for held in locks:
      try:
        now = os.stat(folder / '.lock')
        same = os.path.samestat(os.fstat(held.fileno()), now)
      except OSError:
        same = False
      if not same:
        raise Error(
          f'{folder} was removed or renamed while this run was at work: what '
          'it writes would be lost, so the run ends.'
        )

  def save_config(done: int = 0) -> None:
    content = {k: v for k, v in resolved.items() if k not in NOTES}
    if chosen:
      content['chosen'] = chosen
    notes = list(changes)
    if changed:
      notes.append({'after': done, 'fields': changed})
    if notes:
      content['changes'] = notes
    replace(file, json.dumps(content, indent=2, sort_keys=True) + '\n')

  def keep(name: str, value: Any) -> None:
    replace(folder / name, json.dumps(value) + '\n')

  def finish(round: int, text: str, patience: int | None = None) -> None:
    content = f'{_title(round)}\n\n{text}\n'.encode()
    made = [folder / 'samples.json', *folder.glob('adapter/*')]
    made += folder.glob('base/*')
    files = {
      path.relative_to(folder).as_posix(): _sha256(path)
      for path in sorted(made)
      if path.is_file()
    }
    files[report.name] = hashlib.sha256(content).hexdigest()
    record = {'round': round, 'patience': patience, 'files': files}
    replace(end, json.dumps(record, indent=1) + '\n')
    replace(report, content)  # the last: without it nothing is finished

  def finished(round: int, patience: int | None = None) -> str | None:
    del lost[:]
    if not file.exists() or not report.is_file():
      return None
    content = report.read_bytes().decode(errors='replace')
    title, _, text = content.partition('\n\n')
    files, number = _ended(end, round, patience)
    if title != _title(number):
      return None
    lost.extend(_lost(folder, files))
    return None if lost else text.rstrip('\n')

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
    lost=lost,
    hold=hold,
    check=check,
    changed=changed,
  )


def _title(round: int) -> str:
  return f'After round {round}'


_ABSENT = 'absent'
_SAME = [(_ABSENT, None), (_ABSENT, False), (_ABSENT, {}), (_ABSENT, [])]


def _at(tree: Any, field: str) -> str:
  value = _get(tree, field)
  return value if value is _ABSENT else repr(value)


def _get(tree: Any, field: str) -> Any:
  for name in field.split('.'):
    if not isinstance(tree, Mapping) or name not in tree:
      return _ABSENT
    tree = tree[name]
  return tree


def _is_one(field: str, fields: Sequence[str]) -> bool:
  return any(field == one or field.startswith(f'{one}.') for one in fields)


def _sizes(resolved: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the cohort size's field, where no other setting depends on it."""
  free = _get(resolved, 'clients.name') in ('uniform', 'by_size')
  # There the size sets the number of steps in a round.
  free &= _get(resolved, 'partition.name') != 'pooled'
  return ('clients.cohort_size',) if free else ()


def settings_of(
  raw: Mapping[str, Any], number: int | None = None
) -> dict[str, Any]:
  """Returns the config in a config.json as of round `number` (None: the last).

  >>> fields = {'clients.cohort_size': {'was': 4, 'is': 8}}
  >>> raw = {'clients': {'cohort_size': 8}}
  >>> raw['changes'] = [{'after': 3, 'fields': fields}]
  >>> settings_of(raw), settings_of(raw, 3)
  ({'clients': {'cohort_size': 8}}, {'clients': {'cohort_size': 4}})

  Raises:
    Error: its entry 'changes' is damaged.
  """
  settings = {k: v for k, v in raw.items() if k not in NOTES}
  if number is None:
    return settings
  for after, fields in reversed(changes_of(raw)):
    if after < number:
      continue
    for field, values in fields.items():
      *path, last = field.split('.')
      inner = settings
      for part in path:
        if not isinstance(inner.get(part), Mapping | None):
          raise Error(f"config.json is damaged: 'changes' names {field!r:.60}.")
        inner[part] = dict(inner.get(part) or {})
        inner = inner[part]
      if values['was'] == _ABSENT:
        inner.pop(last, None)
      else:
        inner[last] = values['was']
  return settings


def changes_of(
  raw: Mapping[str, Any],
) -> list[tuple[int, Mapping[str, Mapping[str, Any]]]]:
  """Returns pairs (round, fields changed after it) of a config.json."""
  try:
    return [
      (
        int(one['after']),
        {k: {'was': v['was'], 'is': v['is']} for k, v in one['fields'].items()},
      )
      for one in raw.get('changes') or []
    ]
  except (TypeError, KeyError, ValueError, AttributeError) as error:
    raise Error(
      f"config.json is damaged: 'changes' is {raw['changes']!r:.60}."
    ) from error


_ADAPTER = ('adapter/adapter_config.json', 'adapter/adapter_model.safetensors')


def _ended(
  end: pathlib.Path, round: int, patience: int | None
) -> tuple[dict[str, str | None], int]:
  """Returns the SHA-256 of each file of the end, and the last round."""
  if not end.is_file():
    return dict.fromkeys(_ADAPTER), round  # of a run that wrote no checksums
  try:
    record = json.loads(end.read_text())
    files, number = record['files'], record['round']
    if not all(isinstance(x, str) for x in files.values()):
      raise TypeError
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return {end.name: ''}, round
  early = patience is not None and record.get('patience') == patience
  return files, number if early and number < round else round


def _lost(folder: pathlib.Path, files: Mapping[str, str | None]) -> list[str]:
  """Returns the files of a finished run that are missing or were changed."""
  return [
    name
    for name, sha256 in files.items()
    if not (folder / name).is_file()
    or (sha256 is not None and _sha256(folder / name) != sha256)
  ]


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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


# ------------------------------------------------------------------ ending --


def status(program: Callable[[], None]) -> int:
  """Runs a program and returns its exit status.

  A mistake of the user (`Error`) is printed as one sentence. So is every other
  exception, with the path of a file that holds the traceback.
  """
  try:
    with stoppable():
      try:
        program()
        hosts.leave()
      except Exception as error:
        if signals.stopping():  # a library has turned `Stopped` into this error
          raise Stopped from error
        raise
    return _early.over(0)
  except Stopped:
    return hosts.end(f'stopped; {_early.GOES_ON}', _early.over(0))
  except KeyboardInterrupt:
    return hosts.end(f'\nstopped; {_early.GOES_ON}', _early.over(130))
  except Exception as error:
    return hosts.end(f'error: {_sentence(error)}', _early.over(1))


def _sentence(error: Exception) -> str:
  if isinstance(error, Error):
    return str(error)
  if isinstance(error, OSError):
    return f'{error.filename or "the system"}: {error.strerror or error}.'
  if isinstance(error, jax.errors.JaxRuntimeError):
    if 'RESOURCE_EXHAUSTED' in str(error):
      return 'out of memory: set block_size, or lower cohort.batch_size.'
    if hosts.several() and hosts.lost(error):
      return hosts.explained(error)
  words = ' '.join(str(error).split())
  short = words if len(words) <= 300 else f'{words[:300]} ...'
  return (
    f'{UNFORESEEN}, {type(error).__name__}: {short.rstrip(".")}. The traceback '
    f'is in {_log(error)}.'
  )


UNFORESEEN = 'this was not foreseen'  # begins messages that are not `Error`s


def _log(error: Exception) -> str:
  """Writes the traceback of an error into a new file; returns its path."""
  text = ''.join(traceback.format_exception(error))
  try:
    number, path = tempfile.mkstemp(prefix='fedjax_llm_', suffix='.log')
    with os.fdopen(number, 'w', encoding='utf-8', errors='replace') as file:
      file.write(text)
  except OSError as failed:
    return f'no file ({failed.strerror})'
  return path
