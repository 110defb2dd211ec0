"""Shared parts of the measuring programs: the clock and the results file."""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from compare import machine


def arguments(doc: str, out: str) -> argparse.ArgumentParser:
  """Returns a parser with the shared flags; `out` is the default of --out."""
  parser = argparse.ArgumentParser(
    prog=f'scripts/benchmark {pathlib.Path(out).stem}',
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--quick', action='store_true', help='small sizes')
  parser.add_argument('--repeats', type=int, default=0, help='calls each')
  parser.add_argument(
    *('--out', '-o'),
    type=pathlib.Path,
    default=pathlib.Path('runs/benchmark') / out,
    help='a .json file; what it holds already is not measured again',
  )
  return parser


class Records:
  """Results by name, written after each one, so that a run can be resumed."""

  def __init__(self, path: pathlib.Path, **settings: Any):
    self.path = path
    self.results: dict[str, Any] = {'machine': machine(), **settings}
    if path.exists():
      before = json.loads(path.read_text())
      if any(before.get(k) != v for k, v in self.results.items()):
        raise SystemExit(
          f'{path} is of another day, machine or setting: take another --out.'
        )
      self.results = before

  def keep(self, part: str, name: Any, measure: Callable[[], Any]) -> Any:
    """Returns the result `name` of a part, measuring it if it is missing."""
    by_name = self.results.setdefault(part, {})
    if str(name) not in by_name:
      by_name[str(name)] = measure()
      self.path.parent.mkdir(parents=True, exist_ok=True)
      new = self.path.with_suffix('.new')
      new.write_text(json.dumps(self.results, indent=1) + '\n')
      new.replace(self.path)
    return by_name[str(name)]


def seconds(
  functions: Mapping[str, Callable[[], Any]], repeats: int, pause: float = 0.0
) -> dict[str, float]:
  """Returns medians of interleaved calls, without the first, which compiles.

  A slow minute of the machine affects all functions. `pause` waits before each
  call until the threads of the previous library stop spinning.
  """
  for call in functions.values():
    jax.block_until_ready(call())
  taken = {name: [] for name in functions}
  for _ in range(repeats):
    for name, call in functions.items():
      time.sleep(pause)
      began = time.perf_counter()
      jax.block_until_ready(call())
      taken[name].append(time.perf_counter() - began)
  return {name: statistics.median(values) for name, values in taken.items()}
