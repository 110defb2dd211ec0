"""The program `report`: writes a report once, or until all runs have ended."""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from fedjax_llm import report
from fedjax_llm.report.runs import FILES, Run, find
from fedjax_llm.run import command, signals, workdir
from fedjax_llm.types import Error

_TABLE = 'table.json'  # a sweep writes it at its end


def run(
  argv: Sequence[str], wait: Callable[[float], None] = time.sleep
) -> None:
  """Writes the report; with `--watch` until all runs are finished."""
  args = _arguments(argv)
  if args.every < 1:
    raise Error(f'--every {args.every}: it must be 1 second or more.')
  write = lambda refresh=None: report.write(
    args.workdir, args.out, figures=args.figures, refresh=refresh
  )
  if args.watch:
    try:
      _watch(args.workdir, write, args.every, wait)
    except KeyboardInterrupt:
      signals.heeded()
      write()  # a page that no longer reloads
  else:
    _say(write())
  print(args.out)


def _watch(
  paths: Sequence[str],
  write: Callable[..., list[Run]],
  every: int,
  wait: Callable[[float], None],
) -> None:
  before = None
  while True:
    now = state(paths)
    if now != before:
      runs = report.read(paths)
      done = all(run.finished for run in runs) and all(map(_swept, paths))
      before = now
      _say(write(None if done else every))
      if done:
        return
    wait(every)


def _swept(path: str) -> bool:
  """Returns True if a sweep has written its table, so no run will follow."""
  folder = pathlib.Path(path)
  return not (folder / 'sweep.json').exists() or (folder / _TABLE).exists()


def state(paths: Sequence[str]) -> list[tuple[str, int, int]]:
  """Returns the times and sizes of the files that a report reads."""
  files = [folder / name for folder in find(paths) for name in FILES]
  files += [pathlib.Path(path) / _TABLE for path in paths]
  stats = [(str(file), file.stat()) for file in files if file.exists()]
  return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]


def _say(runs: Sequence[Run]) -> None:
  finished = sum(run.finished for run in runs)
  s = 's' if len(runs) > 1 else ''
  print(f'{len(runs)} run{s}, {finished} finished')


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.report',
    description='A report of runs: one HTML page that needs no network, and '
    'its figures as PNG files.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  folders = 'the folders of runs, or of a sweep'
  add('workdir', nargs='+', metavar='WORKDIR', help=folders)
  out = pathlib.Path('report.html')
  add('--out', type=pathlib.Path, default=out, metavar='FILE')
  where = "for the figures; by default beside FILE, its name with '_files'"
  add('--figures', type=pathlib.Path, metavar='DIR', help=where)
  until = 'write again whenever a run has new records, until all are finished'
  add('--watch', action='store_true', help=until)
  often = 'seconds between two looks'
  add('--every', type=int, default=5, metavar='SECONDS', help=often)
  return command.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
