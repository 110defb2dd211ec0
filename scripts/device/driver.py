"""Runs the stages in processes of their own and keeps one JSON of results."""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import summary
from stages import STAGES, Stage

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = '@point '  # begins a line of a stage that holds a result
DRY = 5  # a CPU compiles slowly: limits are longer by this factor
LEAST = 15  # seconds without which no stage is started


def main(doc: str, argv: Sequence[str] | None = None) -> int:
  args = _arguments(doc, argv)
  if args.list:
    for stage in STAGES:
      print(f'{stage.name:14} {stage.limit:4} s  {stage.about}')
    return 0
  if args.stage:  # the process of one stage
    return one(args.stage, args.dry, frozenset(json.loads(args.have)))
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / ('dry.json' if args.dry else 'results.json')
  results = opened(file, args.dry)
  if not args.show:
    places = wheels(args.wheels) if args.wheels else []
    stages = [s for s in STAGES if not args.only or s.name in args.only]
    run(stages, results, file, dry=args.dry, budget=args.budget, paths=places)
  print(summary.text(results), flush=True)
  failed = [s for s in results['stages'].values() if s['status'] == 'failed']
  return 1 if failed else 0


def run(
  stages: Sequence[Stage],
  results: dict[str, Any],
  file: pathlib.Path,
  *,
  dry: bool = False,
  budget: float | None = None,
  paths: Sequence[str] = (),
  say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> None:
  """Runs the stages that are not done, and writes `file` after every point.

  Args:
    stages: in order.
    results: as `opened` returns them; changed in place.
    file: of the results.
    dry: whether to use tiny shapes.
    budget: minutes for all stages; None: no bound.
    paths: folders for PYTHONPATH, before the repository.
    say: prints a line.
  """
  began = time.monotonic()
  for stage in stages:
    fresh = {'status': 'not started', 'points': {}}
    record = results['stages'].setdefault(stage.name, fresh)
    if record['status'] == 'done':
      say(f'{stage.name}: done before')
      continue
    left = float('inf')
    if budget is not None:
      left = 60 * budget - (time.monotonic() - began)
    if left < LEAST:
      say(f'{stage.name}: not started, the budget is spent')
      write(file, results)
      continue
    limit = min(stage.limit * (DRY if dry else 1), left)
    say(f'{stage.name}: {stage.about} (at most {limit:.0f} s)')
    record.pop('error', None)
    record |= {'status': 'running', 'limit': limit}
    write(file, results)

    def keep(name: str, result: dict[str, Any], record=record) -> None:
      record['points'][name] = result
      write(file, results)
      say(f'  {name}: {summary.short(result)}')

    started = time.monotonic()
    env = environment(file.parent, paths)
    status, tail = child(stage, record['points'], limit, keep, dry, env, say)
    record |= {'status': status, 'seconds': time.monotonic() - started}
    if status == 'failed':
      record['error'] = tail[-1500:]
      say(f'  failed: {tail[-600:]}')
    say(f'{stage.name}: {status} after {record["seconds"]:.0f} s')
    write(file, results)


def child(
  stage: Stage,
  points: dict[str, Any],
  limit: float,
  keep: Callable[[str, dict[str, Any]], None],
  dry: bool,
  env: dict[str, str],
  say: Callable[[str], None],
) -> tuple[str, str]:
  """Runs one stage; returns 'done', 'stopped' or 'failed' and its last lines.

  A stage is stopped at its limit, with all processes that it started.
  """
  have = [name for name, result in points.items() if 'error' not in result]
  words = [sys.executable, HERE.parent / 'device_checks', '--stage', stage.name]
  words += ['--have', json.dumps(have), *(['--dry'] if dry else [])]
  process = subprocess.Popen(
    [str(word) for word in words],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors='replace',
    env=env,
    start_new_session=True,
  )
  late = threading.Event()

  def end() -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)

  timer = threading.Timer(limit, end)
  timer.start()
  tail = ''
  try:
    for line in process.stdout or ():
      if line.startswith(MARK):
        name, result = json.loads(line.removeprefix(MARK))
        keep(name, result)
      elif line.startswith('# '):  # progress of a stage
        say(f'  {line[2:].rstrip()}')
      else:
        tail = (tail + line)[-4000:]
    code = process.wait()
  finally:
    timer.cancel()
    if process.poll() is None:
      end()
  if late.is_set():
    return 'stopped', tail
  return ('failed' if code else 'done'), tail


def environment(out: pathlib.Path, paths: Sequence[str]) -> dict[str, str]:
  """Returns the environment of a stage, with `paths` before the repository."""
  there = os.environ.get('PYTHONPATH')
  path = [*paths, str(ROOT), *([there] if there else [])]
  return {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(path),
    'PYTHONUNBUFFERED': '1',
    'DEVICE_CHECKS_OUT': str(out.resolve()),
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_VERBOSITY': 'error',
    'TOKENIZERS_PARALLELISM': 'false',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.85',
  }


def one(name: str, dry: bool, have: frozenset[str]) -> int:
  """Runs a stage in this process and prints its points as lines of JSON."""
  sys.path.append(str(HERE.parent / 'benchmarks'))
  stage = next(stage for stage in STAGES if stage.name == name)
  errors = 0
  for point, result in stage.run(dry, have):
    print(MARK + json.dumps([point, result]), flush=True)
    errors += 'error' in result
  if errors:
    print(f'{errors} points of {name} have an error.')
  return 1 if errors else 0


def opened(file: pathlib.Path, dry: bool) -> dict[str, Any]:
  """Returns the results of an earlier call, or new ones."""
  if file.exists():
    return json.loads(file.read_text())
  day = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  return {'dry': dry, 'date': day, 'stages': {}}


def write(file: pathlib.Path, results: dict[str, Any]) -> None:
  """Writes the results so that a file is always whole."""
  summary.add_shares(results)
  new = file.with_suffix('.new')
  new.write_text(json.dumps(results, indent=1) + '\n')
  new.replace(file)


def wheels(folder: pathlib.Path) -> list[str]:
  """Installs the wheels of a folder into a new one, and returns its path."""
  files = sorted(map(str, folder.glob('*.whl')))
  if not files:
    raise SystemExit(f'--wheels {folder}: there is no .whl file in it.')
  site = tempfile.mkdtemp(prefix='fedjax_llm_site_')
  words = ['--no-index', '--no-deps', '--no-compile', '--target', site]
  command = [sys.executable, '-m', 'pip', 'install', '-q', *words, *files]
  subprocess.run(command, check=True)
  return [site]


def _arguments(doc: str, argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='device_checks',
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = [stage.name for stage in STAGES]
  parser.add_argument('--out', type=pathlib.Path, default='runs/device')
  parser.add_argument('--budget', type=float, metavar='MINUTES')
  parser.add_argument('--only', nargs='+', choices=names, metavar='STAGE')
  parser.add_argument('--wheels', type=pathlib.Path)
  parser.add_argument('--dry', action='store_true')
  parser.add_argument('--show', action='store_true', help='only the summary')
  parser.add_argument('--list', action='store_true', help='only the stages')
  parser.add_argument('--stage', choices=names, help=argparse.SUPPRESS)
  parser.add_argument('--have', default='[]', help=argparse.SUPPRESS)
  return parser.parse_args(argv)
