"""The examples and the clients of each round of a run in stages.

`pools` returns the examples that each client trains on in a round, `sampler`
draws clients that have some.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.data.selection.types import Orders
from fedjax_llm.types import Draw, Error, Sampler

# The purpose of the random stream of a client's memory.
_MEMORY = 203


class Pools(NamedTuple):
  """The examples of each client in each round.

  `of(client, round)` returns their places, and `able(round)` the ids of the
  clients that have an example of the round, ascending.

  >>> result = pools([np.array([0, 1])], (3, 5))
  >>> [result.stage(round) for round in range(5)]
  [0, 0, 0, 1, 1]
  """

  ends: tuple[int, ...]  # the round after which each stage ends
  of: Callable[[int, int], np.ndarray]
  able: Callable[[int], np.ndarray]

  def stage(self, round: int) -> int:
    """Returns the stage of a round, both from 0."""
    return min(bisect.bisect_right(self.ends, round), len(self.ends) - 1)

  def orders(self) -> Orders:
    """Returns passes over the examples of a round, for `cohorts`."""

    def passes(
      client: int, round: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
      pool = self.of(client, round)
      if not len(pool):
        raise Error(
          f'stages: client {client} has no example in round {round + 1}.'
        )
      while True:
        yield rng.permutation(pool)

    return Orders(passes, lambda client, round: len(self.of(client, round)))


def pools(
  stage: Sequence[np.ndarray],
  ends: Sequence[int],
  *,
  train: str = 'stage',
  replay: int = 0,
  when: Sequence[np.ndarray] | None = None,
  window: float | None = None,
  seed: int = 0,
) -> Pools:
  """Returns the `Pools` of clients whose examples belong to stages.

  In a round of stage s, client k has its examples of stage s, those of all
  stages up to s (`train='seen'`), or all of them (`train='all'`). With `replay`
  it also has its memory: of each earlier stage so many examples, chosen once at
  random, which depend on the seed, the client and the stage only. A window is
  described in `data.stages.by_date`.

  Args:
    stage: of each example of each client, [N] arrays, from 0.
    ends: the round after which each of the T stages ends, ascending.
    train, replay, window: of the `data.stages.Plan`.
    when: places in time of the examples, in [0, 1); needed with a window.
    seed: of the memory.

  >>> stage = [np.array([0, 0, 1]), np.array([1])]
  >>> result = pools(stage, (2, 4), replay=1)
  >>> result.of(0, 0).tolist(), len(result.of(0, 2)), result.able(0).tolist()
  ([0, 1], 2, [0])
  """
  ends, last = tuple(ends), len(ends) - 1
  at = lambda round: min(bisect.bisect_right(ends, round), last)

  def memory(client: int, before: int) -> list[int]:
    kept: list[int] = []
    for earlier in range(before):
      own = np.flatnonzero(stage[client] == earlier)
      rng = np.random.default_rng((seed, _MEMORY, client, earlier))
      kept += rng.permutation(own)[:replay].tolist()
    return kept

  def in_window(client: int, round: int) -> np.ndarray:
    assert when is not None and window is not None
    begin = (1 - window) * round / max(ends[-1] - 1, 1)
    u = when[client]
    # Places in time are whole numbers over the number of records: `begin` may
    # miss one by rounding only.
    inside = (u >= begin - 1e-9) & (u < begin + window - 1e-9)
    return np.flatnonzero(inside)

  def present(client: int, round: int) -> np.ndarray:
    """Returns the places of the examples without the memory."""
    if window is not None:
      return in_window(client, round)
    own, now = stage[client], at(round)
    if train == 'all':
      return np.arange(len(own))
    return np.flatnonzero(own <= now if train == 'seen' else own == now)

  def of(client: int, round: int) -> np.ndarray:
    own = present(client, round)
    if not replay:
      return own
    return np.sort(np.append(own, memory(client, at(round))).astype(int))

  several: dict[int, np.ndarray] = {}  # clients, by stage or by round

  def able(round: int) -> np.ndarray:
    key = at(round) if window is None else round
    if key not in several:
      some = [len(present(k, round)) for k in range(len(stage))]
      several[key] = np.flatnonzero(some)
    return several[key]

  return Pools(ends, of, able)


def sampler(
  make: Callable[[np.ndarray], Sampler],
  rounds: Pools,
  num_clients: int,
) -> Sampler:
  """Returns a sampler of the clients that have an example of the round.

  Args:
    make: returns the sampler of some clients, whose ids are their places.
    rounds: the examples of each round.
    num_clients: N; a draw has as many rows as one of all N clients.

  Raises:
    Error: a round has fewer clients with an example than it draws.

  >>> from fedjax_llm.clients import sampling
  >>> stage = [np.array([0]), np.array([1]), np.array([0, 1])]
  >>> draw = sampler(
  ...   lambda ids: sampling.full(len(ids)), pools(stage, (1, 2)), 3)
  >>> draw(0).ids.tolist(), draw(1).ids.tolist()
  ([0, 2, -1], [1, 2, -1])
  """
  width = len(make(np.arange(num_clients))(0).ids)
  made: dict[bytes, Sampler] = {}

  def of(round: int) -> tuple[np.ndarray, Sampler]:
    ids = rounds.able(round)
    key = ids.tobytes()
    if key not in made:
      try:
        made[key] = make(ids)
      except Error as error:
        raise Error(
          f'stages: {len(ids)} clients have an example in round {round + 1}: '
          f'{error}'
        ) from error
    return ids, made[key]

  for round in range(rounds.ends[-1]):
    of(round)

  def draw(round: int) -> Draw:
    ids, sample = of(int(round))
    part = sample(int(round))
    missing = width - len(part.ids)
    pad = lambda x, value: np.concatenate([x, np.full(missing, value, x.dtype)])
    own = np.asarray(part.ids)
    real = np.where(own >= 0, ids[np.maximum(own, 0)], -1).astype(own.dtype)
    return part._replace(
      ids=pad(real, -1), reports=pad(np.asarray(part.reports), False)
    )

  return draw
