"""The cells of a comparison: a JSON file each, in an order, within a budget.

A script trains the cells that are `missing`, in their order, and `save`s each,
so the same command goes on where it was stopped.
"""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

Cell = TypeVar('Cell')


class Budget(NamedTuple):
  """The time of a command: `spent()` and `left()` return seconds.

  >>> Budget(None, 0.0).left()
  inf
  """

  minutes: float | None  # None: all that it takes
  began: float

  def spent(self) -> float:
    return time.monotonic() - self.began

  def left(self) -> float:
    if self.minutes is None:
      return float('inf')
    return 60 * self.minutes - self.spent()


def budget(minutes: float | None) -> Budget:
  """Returns the `Budget` of a command that begins now."""
  return Budget(minutes, time.monotonic())


def missing(
  cells: Iterable[Cell], path_of: Callable[[Cell], pathlib.Path]
) -> list[Cell]:
  """Returns the cells that have no file yet, in their order."""
  return [cell for cell in cells if not path_of(cell).exists()]


def save(path: pathlib.Path, value: Any, **options: Any) -> None:
  """Writes a JSON file, all of it or nothing.

  `options` are those of `json.dumps`; without any the indent is 1.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  part.write_text(json.dumps(value, **(options or {'indent': 1})) + '\n')
  os.replace(part, path)


def line(name: str, seconds: float, number: int, needed: float | None) -> str:
  """Returns a line about a cell that is done and the time of those left.

  >>> line('FedIT, seed 0', 61.2, 3, 180.0)
  'FedIT, seed 0: 61 s; 3 cells left, about 3 minutes'
  """
  about = '' if needed is None else f', about {needed / 60:.0f} minutes'
  return f'{name}: {seconds:.0f} s; {number} cells left{about}'


def unfinished(number: int, things: str = 'cells') -> str:
  """Returns the sentence about cells that the budget did not allow, or ''.

  >>> unfinished(2), unfinished(0)
  ('2 cells are left; the same command goes on.', '')
  """
  return f'{number} {things} are left; the same command goes on.' * bool(number)


def listed(names: Iterable[str]) -> list[str]:
  """Returns the lines of a page that name its missing cells, or none.

  >>> listed(['FedIT, seed 1', 'FedIT, seed 2'])
  ['', 'Missing: FedIT, seed 1; FedIT, seed 2.']
  """
  joined = '; '.join(names)
  return ['', f'Missing: {joined}.'] if joined else []
