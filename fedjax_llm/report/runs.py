"""Reads runs from their folders, finished or not."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.run import metrics
from fedjax_llm.run.records import check_samples, check_sizes
from fedjax_llm.types import Error

Paths = str | os.PathLike | Sequence[str | os.PathLike]

# The files that a report reads of a run; `--watch` checks only these.
FILES = (
  *('config.json', 'metrics.jsonl', 'clients.json', 'samples.json'),
  *('report.txt', 'outcome.json', 'privacy.json'),
)


class Run(NamedTuple):
  """One run.

  `records` has one object a round, from round 0 on; `sizes` (the texts of each
  client), `samples` (replies) and `privacy` (the guarantee) are None where the
  folder has none.
  """

  label: str  # different from the labels of the other runs
  path: pathlib.Path
  config: Mapping[str, Any]
  records: Sequence[Mapping[str, Any]]
  sizes: Mapping[str, Any] | None
  samples: Mapping[str, Any] | None
  finished: bool
  privacy: Mapping[str, Any] | None = None

  @property
  def round(self) -> int | None:
    """Returns the last round; None: there is no record."""
    return self.records[-1]['round'] if self.records else None

  @property
  def labelled(self) -> bool:
    """Returns True for a classification task."""
    return any('evals/heldout/accuracies' in record for record in self.records)

  @property
  def unit(self) -> str:
    """Returns the name of what the loss counts, in the singular."""
    written = (self.sizes or {}).get('unit')  # absent before version 0.3
    return written or ('label' if self.labelled else 'token')


def find(paths: Paths) -> list[pathlib.Path]:
  """Returns the folders of runs; the folder of a sweep becomes all its runs.

  Raises:
    Error: a folder does not exist, or is neither a run nor a sweep.
  """
  folders = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  if not folders:
    raise Error('a report needs the folder of a run, or of several.')
  result: list[pathlib.Path] = []
  for folder in map(pathlib.Path, folders):
    if not folder.exists():
      raise Error(f'{folder}: there is no such folder.')
    if not folder.is_dir():
      raise Error(f'{folder} is a file, not the folder of a run.')
    inside = sorted(path.parent for path in folder.glob('runs/*/config.json'))
    if (folder / 'config.json').is_file():
      result.append(folder)
    elif inside:
      result += inside
    else:
      raise Error(
        f'{folder} holds no run: there is no config.json in it, nor a sweep '
        'in runs/.'
      )
  return list({path.resolve(): path for path in result}.values())


def read(paths: Paths) -> list[Run]:
  """Returns the runs in these folders, each with its own label.

  Raises:
    Error: as `find` does, or a file is damaged. A torn last line of
      `metrics.jsonl`, as of a killed run, is no error.
  """
  folders = find(paths)
  return [
    _read(folder, label)
    for folder, label in zip(folders, labels(folders), strict=True)
  ]


def labels(folders: Sequence[pathlib.Path]) -> list[str]:
  """Returns the shortest ends of the paths that differ.

  >>> labels([pathlib.Path('/a/x'), pathlib.Path('/b/x')])
  ['a/x', 'b/x']
  """
  parts = [folder.absolute().parts for folder in folders]
  for length in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-length:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  return list(map(str, folders))


def said(text: str, members: Sequence[Run], of: Sequence[Run]) -> str:
  """Returns a sentence with the labels of the runs for which it is true."""
  names = [run.label for run in members]
  if len(names) == len(of):
    return f'{text}.'
  if len(names) > 4:
    names = [*names[:3], f'{len(names) - 3} more']
  return f'{text} ({", ".join(names)}).'


def _read(folder: pathlib.Path, label: str) -> Run:
  config = _json(folder / 'config.json')
  sizes = _json(folder / 'clients.json')
  samples = _json(folder / 'samples.json')
  check_sizes(sizes or {}, str(folder / 'clients.json'))
  check_samples(samples or {}, str(folder / 'samples.json'))
  records = metrics.read(str(folder / 'metrics.jsonl'))
  return Run(
    label=label,
    path=folder,
    config=config or {},
    records=records,
    sizes=sizes,
    samples=samples,
    finished=_finished(folder, config or {}, records),
    privacy=_json(folder / 'privacy.json'),
  )


def _json(file: pathlib.Path) -> Any:
  if not file.is_file():
    return None
  try:
    content = json.loads(file.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise Error(f'{file} is damaged ({error}).') from error
  if not isinstance(content, dict):
    raise Error(f'{file} is damaged (it holds no object).')
  return content


def _finished(
  folder: pathlib.Path, config: Mapping[str, Any], records: Sequence[Any]
) -> bool:
  if (folder / 'outcome.json').is_file():  # a run of a sweep; written last
    return True
  last, report = config.get('num_rounds'), folder / 'report.txt'
  if not records or not report.is_file():
    return False
  number = records[-1]['round']
  title = report.read_bytes()[:80].decode(errors='replace')
  over = number == last or _ended_early(folder)
  return over and title.startswith(f'After round {number}\n')


def _ended_early(folder: pathlib.Path) -> bool:
  file = folder / 'finished.json'
  return bool((_json(file) or {}).get('patience'))
