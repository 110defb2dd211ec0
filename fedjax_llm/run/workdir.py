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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_llm.run import config, versions
from fedjax_llm.run.changes import (
  FREE,
  NOTED,
  NOTES,
  SAME,
  get,
  is_one,
  shown,
  sizes,
)
from fedjax_llm.run.changes import changes_of as changes_of
from fedjax_llm.run.changes import settings_of as settings_of
from fedjax_llm.run.ending import UNFORESEEN as UNFORESEEN
from fedjax_llm.run.ending import status as status
from fedjax_llm.run.folders import check_links as check_links
from fedjax_llm.run.folders import lock as lock
from fedjax_llm.run.folders import replace as replace
from fedjax_llm.run.signals import Stopped as Stopped
from fedjax_llm.run.signals import stop_after_round as stop_after_round
from fedjax_llm.run.signals import stoppable as stoppable
from fedjax_llm.types import Error


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
  places = ('checkpoints', 'states', 'adapter', 'base')
  paths = {'path': folder, **{name: folder / name for name in places}}
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
      **paths,
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
      free = (*FREE, *sizes(resolved))
      # A field that an older version did not know has its default.
      differ = [
        field
        for field in config.same(before, resolved, ignore=NOTES)
        if (get(before, field), get(resolved, field)) not in SAME
      ]
      changed |= {
        field: {
          'was': get(before, field),
          'is': get(resolved, field),
        }
        for field in differ
        if is_one(field, NOTED) and is_one(field, free)
      }
      differ = [field for field in differ if not is_one(field, free)]
      chosen |= before.get('chosen') or {}
      if any(type(x) is not int or x < 1 for x in chosen.values() if x):
        raise ValueError(f"'chosen' is {chosen!r:.60}")
      changes += before.get('changes') or []
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
      raise Error(f'{file} is damaged ({error}).') from error
    if differ:
      differences = '; '.join(
        f'{field} was {shown(before, field)}, is {shown(resolved, field)}'
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
    **paths,
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
