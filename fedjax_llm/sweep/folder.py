"""The folder of a sweep: its files, its identity, and the runs that are done.

sweep.json         the config, the grid and the seeds
runs/NAME/         config.json, metrics.jsonl and clients.json, as of `train`
runs/NAME/outcome.json  written last: how the run ended
table.json, table.csv, figure.png
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run import builders, config, metrics, workdir
from fedjax_llm.run.sections import SPEC
from fedjax_llm.sweep import digest
from fedjax_llm.sweep.grid import Run, named, word
from fedjax_llm.types import Error

_NAME, _OUTCOME = 'sweep.json', 'outcome.json'


class Outcome(NamedTuple):
  """The end of a run: its last round, and the error that ended it early."""

  round: int
  error: str | None = None


class Folder(NamedTuple):
  path: pathlib.Path
  lock: Any  # held as long as this is


def open(path: str | os.PathLike, wanted: Mapping[str, Any]) -> Folder:
  """Opens and locks the folder of a sweep, made if it is new.

  Args:
    path: the folder.
    wanted: the `identity` of the sweep.

  Raises:
    Error: `path` is a file, or holds other things than a sweep, or the sweep of
      another command (the message names the fields that differ), or another
      process is at work in it.
  """
  folder = pathlib.Path(path)
  file = folder / _NAME
  if folder.exists() and not folder.is_dir():
    raise Error(f'--workdir {path} is a file, not a folder.')
  if folder.exists() and not file.exists():
    others = {p.name for p in folder.iterdir()} - {'.lock', f'{_NAME}.new'}
    if others:
      raise Error(
        f'--workdir {path} holds other things than a sweep, {min(others)!r} '
        'for one: take a new or an empty folder.'
      )
  folder.mkdir(parents=True, exist_ok=True)
  workdir.check_links(folder)
  held = workdir.lock(folder)
  if file.exists():
    try:
      before = json.loads(file.read_text())
      differ = config.same(before, wanted)
    except (ValueError, AttributeError) as error:
      raise Error(f'{file} is damaged ({error}).') from error
    for name, word_of in (wanted.get('sources') or {}).items():
      if word_of.startswith(digest.UNKNOWN):
        why = word_of.removeprefix(digest.UNKNOWN)
        raise Error(
          f'--workdir {path}: whether {name} computes what it did in the runs '
          f'that are done there cannot be known ({why}): take another workdir.'
        )
    if differ:
      raise Error(
        f'--workdir {path} holds a sweep of another command: '
        f'{", ".join(differ[:8])} {"differ" if differ[1:] else "differs"}. '
        'Take another workdir, or that command.'
      )
  else:
    workdir.replace(file, _json(wanted))
  (folder / 'runs').mkdir(exist_ok=True)
  return Folder(folder, held)


def place(folder: Folder, run: Run) -> pathlib.Path:
  return folder.path / 'runs' / run.name


def outcome(folder: Folder, run: Run) -> Outcome | None:
  """Returns the end of a run, or None if it has not ended."""
  file = place(folder, run) / _OUTCOME
  if not file.exists():
    return None
  try:
    ended = Outcome(**json.loads(file.read_text()))
    if type(ended.round) is not int or not isinstance(ended.error, str | None):
      raise ValueError('fields of other kinds')
    return ended
  except (ValueError, TypeError, RecursionError) as error:
    raise Error(f'{file} is damaged ({error}).') from error


def records(folder: Folder, run: Run) -> list[dict[str, Any]]:
  return metrics.read(str(place(folder, run) / 'metrics.jsonl'))


def write(
  folder: Folder,
  run: Run,
  rounds: Sequence[tuple[int, Mapping[str, Any]]],
  ended: Outcome,
  sizes: Mapping[str, Any],
) -> None:
  """Writes the folder of a run that has ended, atomically."""
  final = place(folder, run)
  fresh = final.with_name(f'.{final.name}.new')
  _saving(lambda: shutil.rmtree(fresh, ignore_errors=True))
  _saving(lambda: fresh.mkdir())
  workdir.replace(fresh / 'config.json', _json(run.resolved))
  workdir.replace(fresh / 'clients.json', _json(sizes))
  lines = [metrics.line(number, record) for number, record in rounds]
  workdir.replace(fresh / 'metrics.jsonl', ''.join(lines))
  workdir.replace(fresh / _OUTCOME, _json(ended._asdict()))
  # Remains of a run that was interrupted when trained alone.
  _saving(lambda: shutil.rmtree(final, ignore_errors=True))
  _saving(lambda: fresh.rename(final))


def close(folder: Folder, run: Run, ended: Outcome) -> None:
  """Writes the end of a run that was trained alone in its folder."""
  workdir.replace(place(folder, run) / _OUTCOME, _json(ended._asdict()))


def _json(x: Any) -> str:
  return json.dumps(x, indent=2, sort_keys=True) + '\n'


def _saving(step: Callable[[], Any]) -> None:
  try:
    step()
  except OSError as error:
    raise Error(
      f'{error.filename} cannot be written: {error.strerror}.'
    ) from error


# ---------------------------------------------------------------- identity --


def identity(
  conf: Mapping[str, Any],
  grid: Mapping[str, Sequence[Any]],
  seeds: Sequence[int],
) -> dict[str, Any]:
  """Returns the identity of a sweep as JSON, equal if two may share a folder.

  For a user's functions it holds a digest of their code and of all that they
  call (`digest.of`): a changed rule gives another identity.
  """
  resolved = config.resolved(conf, SPEC)
  resolved.pop('seed', None)
  resolved.pop('compilation_cache', None)
  words = {
    field: [word(named(field, value)) for value in values]
    for field, values in grid.items()
  }
  sources: dict[str, str] = {}

  def note(value: Any, field: str = '') -> None:
    if isinstance(value, Mapping):
      for key, inner in value.items():
        note(inner, key)
    elif field.endswith('name') and _is_path(value):
      note(builders.resolve_builder('', value, {}))
    elif isinstance(value, list | tuple):
      for inner in value:
        note(inner, field)
    elif callable(value):
      name, number = word(value), 1
      while sources.get(key := f'{name}_{number}' if number > 1 else name):
        number += 1
      sources[key] = digest.of(value)

  note(conf)
  for field, values in grid.items():
    for value in values:
      note(named(field, value), field)
  content = {'config': resolved, 'grid': words, 'seeds': list(seeds)}
  if sources:
    content['sources'] = sources
  return json.loads(json.dumps(content))


def _is_path(name: Any) -> bool:
  return isinstance(name, str) and bool(re.fullmatch(r'[\w.]+:\w+', name))
