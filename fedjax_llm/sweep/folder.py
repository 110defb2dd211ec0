"""The folder of a sweep: what is where, whose it is, and what is done.

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
  """How a run ended: its last round, and why that is not the last of all."""

  round: int
  error: str | None = None


class Folder(NamedTuple):
  path: pathlib.Path
  lock: Any  # held as long as this is


def open(path: str | os.PathLike, whose: Mapping[str, Any]) -> Folder:
  """Takes the folder of a sweep (`whose`: its `identity`), made if it is new.

  Raises:
    Error: it is a file, it holds other things than a sweep, the sweep of
      another command (what differs is named), or another process is at work.
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
      differ = config.same(before, whose)
    except (ValueError, AttributeError) as error:
      raise Error(f'{file} is damaged ({error}).') from error
    for name, word_of in (whose.get('sources') or {}).items():
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
    workdir.replace(file, _json(whose))
  (folder / 'runs').mkdir(exist_ok=True)
  return Folder(folder, held)


def place(folder: Folder, run: Run) -> pathlib.Path:
  return folder.path / 'runs' / run.name


def outcome(folder: Folder, run: Run) -> Outcome | None:
  """How a run ended; None: it has not."""
  file = place(folder, run) / _OUTCOME
  if not file.exists():
    return None
  try:
    found = Outcome(**json.loads(file.read_text()))
    if type(found.round) is not int or not isinstance(found.error, str | None):
      raise ValueError('fields of other kinds')
    return found
  except (ValueError, TypeError, RecursionError) as error:
    raise Error(f'{file} is damaged ({error}).') from error


def records(folder: Folder, run: Run) -> list[dict[str, Any]]:
  return metrics.read(str(place(folder, run) / 'metrics.jsonl'))


def write(
  folder: Folder,
  run: Run,
  told: Sequence[tuple[int, Mapping[str, Any]]],
  ended: Outcome,
  sizes: Mapping[str, Any],
) -> None:
  """Writes the folder of a run that has ended: all of it or nothing."""
  final = place(folder, run)
  fresh = final.with_name(f'.{final.name}.new')
  _saving(lambda: shutil.rmtree(fresh, ignore_errors=True))
  _saving(lambda: fresh.mkdir())
  workdir.replace(fresh / 'config.json', _json(run.resolved))
  workdir.replace(fresh / 'clients.json', _json(sizes))
  lines = [metrics.line(number, record) for number, record in told]
  workdir.replace(fresh / 'metrics.jsonl', ''.join(lines))
  workdir.replace(fresh / _OUTCOME, _json(ended._asdict()))
  # Of a run that was interrupted while it had this folder to itself.
  _saving(lambda: shutil.rmtree(final, ignore_errors=True))
  _saving(lambda: fresh.rename(final))


def close(folder: Folder, run: Run, ended: Outcome) -> None:
  """Says of a run that wrote its folder itself how it ended."""
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
  """What two commands share that may share a folder, as JSON.

  Of one's own functions it holds a digest of their code and of all that they
  call (`digest.of`): a rule that was changed is another rule.
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
  told = {'config': resolved, 'grid': words, 'seeds': list(seeds)}
  if sources:
    told['sources'] = sources
  return json.loads(json.dumps(told))


def _is_path(name: Any) -> bool:
  return isinstance(name, str) and bool(re.fullmatch(r'[\w.]+:\w+', name))
