"""A profile of one round: the longest operations, and the trace itself."""

import os
import pathlib
import shutil
import tempfile
from typing import Any

import rounds
import shapes
from stages import Points, attempt

from fedjax_llm.run import profiling


def points(dry: bool, have: frozenset[str]) -> Points:
  for work in shapes.main(dry):
    name = f'profile {work.name}'
    yield from attempt(name, have, lambda work=work: profile(work))


def profile(work: shapes.Work) -> dict[str, Any]:
  """Returns the five longest operations of a round after the first."""
  _, run = rounds.times(work)
  run()
  with tempfile.TemporaryDirectory() as folder:
    with profiling.traced(folder, 1):
      run()
    (file,) = profiling.files(folder)
    result = profiling.longest(file)
    keep(file, work.name)
  for line in profiling.lines(result):
    print(f'# {line}', flush=True)
  return {
    'span': result.span,
    'busy': result.busy,
    'longest': [list(operation) for operation in result.operations],
  }


def keep(file: pathlib.Path, name: str, limit: int = 15 << 20) -> None:
  """Keeps a trace for Perfetto in the folder of results, if it is small."""
  folder = pathlib.Path(os.environ['DEVICE_CHECKS_OUT'])
  for trace in file.parent.glob('*.trace.json.gz'):
    if trace.stat().st_size < limit:
      shutil.copy(trace, folder / f'round_{name}.trace.json.gz')
