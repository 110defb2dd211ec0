"""The contract of a selection of examples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Examples = Sequence[Sequence[Any]]  # [N] clients, each any number of examples
# examples -> [n, D] float, one row an example, under the frozen model
Features = Callable[[Sequence[Any]], np.ndarray]


class Scored(NamedTuple):
  """A choice of rows by a score under the served model, inside the round."""

  by: str  # 'loss' or 'gradient'
  pool: int  # candidates a row that is kept


class Orders(NamedTuple):
  """The order of each client's examples in each round.

  `passes(client, round, rng) -> ` an endless iterator over passes, each the
  places of examples; `kept(client, round) -> int`, the number of examples that
  may be drawn.
  """

  passes: Callable[[int, int, np.random.Generator], Iterator[np.ndarray]]
  kept: Callable[[int, int], int]


class Selection(NamedTuple):
  """A selection of examples; the parts that it does not have are None.

  `prepare(examples [N], features, seed) -> ` the places of the examples that
  each client keeps, once, before training; `order(examples [N]) -> Orders`;
  `scored`: the rows of a round are chosen inside of it.

  >>> first = Selection(prepare=lambda examples, features, seed: [
  ...   np.array([0]) for own in examples])
  >>> first.prepare([['a', 'b'], ['c']], None, 0)
  [array([0]), array([0])]
  """

  prepare: Callable[[Examples, Features, int], list[np.ndarray]] | None = None
  order: Callable[[Examples], Orders] | None = None
  scored: Scored | None = None
