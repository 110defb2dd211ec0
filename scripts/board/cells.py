"""Runs one cell of `scripts/leaderboard`: a method on a task with a seed."""

import contextlib
import datetime
import gzip
import json
import os
import pathlib
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import suites

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import cell_files

FILE = '{task}-{method}-{seed}.json'


def path_of(folder: pathlib.Path, task: str, method: str, seed: int):
  """Returns the JSON file of a cell."""
  return folder / FILE.format(task=task, method=method, seed=seed)


def records(task: suites.Task, folder: pathlib.Path) -> pathlib.Path:
  """Writes the records that the runs of a task read, once; returns the file."""
  target = folder / f'{task.records}-{task.most}.jsonl'
  if target.exists():
    return target
  source = pathlib.Path(suites.CACHE).expanduser() / 'tasks'
  source = source / f'{task.records}.jsonl.gz'
  if not source.exists():
    raise SystemExit(f'{source} is missing: scripts/fetch_tasks fetches it.')
  lines = gzip.decompress(source.read_bytes()).decode().splitlines()
  if len(lines) > task.most:
    lines = random.Random(0).sample(lines, task.most)
  folder.mkdir(parents=True, exist_ok=True)
  part = target.with_suffix('.part')
  part.write_text('\n'.join(lines) + '\n')
  os.replace(part, target)
  return target


def fields(
  task: suites.Task, method: str, seed: int, rounds: int, data: pathlib.Path
) -> dict[str, Any]:
  """Returns the config fields of a run."""
  result = {
    **task.fields,
    **suites.changes(method, task),
    'seed': seed,
    'num_rounds': rounds,
    'checkpoint_every': rounds,
    'evals.every': rounds,
    'cohort.weight_by': 'uniform',  # some rules have no weights
    'block_size': 4,
  }
  sources = dict(result.pop('data', {}))
  if sources:
    result['data'] = {**sources, 'path': str(data)}
  else:
    result['data.path'] = str(data)
  return result


def words(settings: Mapping[str, Any], config: str, workdir: str) -> list[str]:
  """Returns the command line of a run; whole sections come first."""
  order = sorted(settings, key=lambda name: '.' in name)
  flags = [f'--config.{name}={settings[name]!r}' for name in order]
  path = str(suites.ROOT / 'configs' / config)
  return ['--config', path, '--workdir', workdir, *flags]


def scores(record: Mapping[str, Any], kind: str) -> dict[str, float]:
  """Returns the mean over clients and that of the worst tenth, of own texts.

  Each client has its own served model; one that no round has trained has the
  initial model. `loss` is the mean in nats, where the score is an accuracy.
  """

  def of(name: str) -> list[float]:
    each = dict(record[f'evals/heldout/{name}'])
    return list((each | record.get(f'evals/personal/own/{name}', {})).values())

  values = of('accuracies' if kind == 'accuracy' else 'clients')
  values = sorted(values, reverse=kind == 'loss')
  worst = values[: max(1, round(len(values) / 10))]
  losses = of('clients')
  return {
    'score': sum(values) / len(values),
    'worst': sum(worst) / len(worst),
    'loss': sum(losses) / len(losses),
  }


def run(
  name: str,
  task: suites.Task,
  method: str,
  seed: int,
  rounds: int,
  data: pathlib.Path,
) -> dict[str, Any]:
  """Trains one cell and returns its figures.

  Raises:
    RuntimeError: the run was refused or stopped; the message is the program's.
  """
  from fedjax_llm import train
  from fedjax_llm.run import provenance

  began = time.monotonic()
  with tempfile.TemporaryDirectory() as workdir:
    log = pathlib.Path(workdir) / 'log'
    settings = fields(task, method, seed, rounds, data)
    argv = words(settings, task.config, f'{workdir}/run')
    with open(log, 'w') as file, contextlib.redirect_stdout(file):
      with contextlib.redirect_stderr(file):
        status = train.main(argv)
    if status:
      last = [line for line in log.read_text().splitlines() if line.strip()]
      raise RuntimeError(last[-1] if last else f'status {status}')
    text = (pathlib.Path(workdir) / 'run' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  total = lambda field: sum(line.get(field, 0) for line in lines[1:])
  later = [line['time/round'] for line in lines[2:]] or [lines[1]['time/round']]
  return {
    'task': name,
    'method': method,
    'seed': seed,
    'rounds': rounds,
    'before': scores(lines[0], task.kind),
    **scores(lines[-1], task.kind),
    'up': total('uploads/bytes'),
    'down': total('downloads/bytes'),
    'steps': total('local/steps'),
    'seconds_round': sorted(later)[len(later) // 2],
    'memory': max(line.get('time/memory', 0) for line in lines),
    'seconds': round(time.monotonic() - began, 1),
    'cpu_seconds': round(time.process_time(), 1),
    'date': f'{datetime.date.today()}',
    'machine': f'{platform.machine()}, {os.cpu_count()} CPU cores',
    'provenance': provenance.of(settings),
  }


def forked(file: pathlib.Path, *cell: Any) -> None:
  """Runs a cell in a child of this process and writes its JSON file.

  A child has its own memory and cannot stop the other cells: a refused or
  broken run is written as `{'failed': reason}`. JAX has started nothing in the
  parent, which only imports; what it has imported is shared.
  """
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    if status:
      raise SystemExit(f'{file.name}: the run was killed; start again.')
    return
  try:
    figures = run(*cell)
  except (RuntimeError, KeyError, ValueError) as error:
    task, _, method, seed, rounds, _ = cell
    figures = dict(task=task, method=method, seed=seed, rounds=rounds)
    figures['failed'] = f'{error}'
  cell_files.save(file, figures, indent=1, sort_keys=True)
  os._exit(0)
