"""The stages of `scripts/device_checks`, in order of worth.

A stage is a function `(dry, have) -> Iterator[(point, result)]`: it measures
one point after another and leaves out those in `have`. It may yield a result
`{'skipped': reason}`; an exception while a point is measured is caught with
`attempt`, and a package that is missing leaves the point out.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Point = tuple[str, dict[str, Any]]
Points = Iterator[Point]


class Stage(NamedTuple):
  """A stage: its name, 'module:function', seconds at most, and its title."""

  name: str
  program: str
  limit: int
  about: str

  def run(self, dry: bool, have: frozenset[str]) -> Points:
    module, _, function = self.program.partition(':')
    try:
      points = getattr(importlib.import_module(module), function)
    except ImportError as error:
      return iter([(self.name, without(error))])
    return points(dry, have)


STAGES = (
  Stage('machine', 'machine:points', 45, 'versions, memory, rates'),
  Stage('parity', 'parity:points', 105, 'against float32 on the CPU'),
  Stage('ours', 'rounds:main_points', 110, 'ours: 64 clients, hidden 1024'),
  Stage('peers', 'peers:main_points', 160, 'PyTorch: the same work'),
  Stage('profile', 'profiled:points', 60, 'a profile of one round'),
  Stage('billion', 'rounds:billion_points', 90, 'ours: a 1B shape'),
  Stage('billion_peers', 'peers:billion_points', 90, 'PyTorch: a 1B shape'),
  Stage('cohorts', 'rounds:other_points', 110, 'ours: other cohorts'),
  Stage('cohorts_peers', 'peers:other_points', 110, 'PyTorch: other cohorts'),
  Stage('attention', 'parity:attention_speed', 60, 'attention by itself'),
  Stage('aggregation', 'reductions:points', 45, 'rules on a stack'),
  Stage('compile', 'rounds:compile_points', 80, 'seconds to compile'),
  Stage('tests', 'suite:points', 150, 'the tests that make sense here'),
)


def without(error: ImportError) -> dict[str, Any]:
  """Returns the result of a point that a missing package leaves out."""
  return {'skipped': f'{error.name or error} is not installed here'}


def attempt(
  name: str, have: frozenset[str], measure: Callable[[], dict[str, Any]]
) -> Points:
  """Yields the point `name`, or its error; nothing if it is in `have`."""
  if name in have:
    return
  try:
    result = measure()
  except Exception as error:  # of any library: the next point is worth trying
    absent = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(absent, ImportError):
      yield name, without(absent)
      return
    text = ' '.join(str(error).split())
    result = {'error': f'{type(error).__name__}: {text[:300]}'}
  yield name, result
