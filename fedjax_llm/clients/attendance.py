"""Who is available, as simulated time goes on.

`attendance` returns an `Attendance` over the hours of a `System`. Asynchronous
samplers (`clients.timed.buffered`) start one client after another from it; an
opening, a closing and a start each cost little, however many clients there are.
"""

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_llm.clients.system import DAY, System, available

__all__: list[str] = []


class Attendance(NamedTuple):
  """The clients that are available and idle, at a time that only moves on.

  `advance(now)` opens and closes clients up to a time in seconds. `num_idle()`
  counts those that are available and not busy, `take(rng)` returns one of them
  at random and makes it busy, `free(client)` ends that. `following()` is the
  time of the next opening or closing, infinite if all are always available.

  >>> from fedjax_llm.clients import system as systems
  >>> hours = attendance(systems.fleet(num_clients=2))
  >>> one = hours.take(np.random.default_rng(0))
  >>> two = hours.take(np.random.default_rng(0))
  >>> sorted([one, two]), hours.num_idle()
  ([0, 1], 0)
  """

  advance: Callable[[float], None]
  num_idle: Callable[[], int]
  take: Callable[[np.random.Generator], int]
  free: Callable[[int], None]
  following: Callable[[], float]


def attendance(system: System) -> Attendance:
  """Returns the attendance of all clients, none of them busy, at time 0.

  A client is available in [d DAY + opens, d DAY + opens + hours) of every day
  d, always if its hours are 24.

  >>> from fedjax_llm.clients import system as systems
  >>> fleet = systems.fleet(num_clients=1, hours=2.0)
  >>> hours = attendance(fleet._replace(opens=np.array([5.0])))
  >>> hours.num_idle(), hours.following() / 3600
  (0, 5.0)
  >>> hours.advance(5 * 3600.0)
  >>> hours.num_idle(), hours.following() / 3600
  (1, 7.0)
  """
  num = len(system.hours)
  present = available(system, 0.0)  # at this moment, busy or not
  # The day of a client's present interval, or of its next one.
  day = np.where(present & (system.opens > 0), -1, 0)
  begin = day * DAY + system.opens * 3600
  change = np.where(present, begin + system.hours * 3600, begin)
  some = np.flatnonzero(system.hours < 24).tolist()
  events = [(float(change[k]), k) for k in some]
  heapq.heapify(events)
  days = day.tolist()
  # Flags of all clients, one byte each.
  here, idle = bytearray(present.tobytes()), bytearray(present.tobytes())
  busy = bytearray(num)
  flags = np.frombuffer(idle, bool)
  count = int(present.sum())

  def mark(client: int) -> None:
    """Renews the flag of a client that is idle or no longer."""
    nonlocal count
    now = here[client] & ~busy[client] & 1
    count += now - idle[client]
    idle[client] = now

  def advance(now: float) -> None:
    while events and events[0][0] <= now:
      _, k = events[0]
      here[k] ^= 1
      if not here[k]:
        days[k] += 1
      at = days[k] * DAY + float(system.opens[k]) * 3600
      at += float(system.hours[k]) * 3600 * here[k]
      heapq.heapreplace(events, (at, k))
      mark(k)

  def take(rng: np.random.Generator) -> int:
    tries = rng.integers(num, size=16).tolist()  # mostly one of the first few
    client = next((k for k in tries if idle[k]), None)
    if client is None:
      client = int(np.flatnonzero(flags)[rng.integers(count)])
    busy[client] = 1
    mark(client)
    return client

  def free(client: int) -> None:
    busy[client] = 0
    mark(client)

  def following() -> float:
    return events[0][0] if events else math.inf

  return Attendance(advance, lambda: count, take, free, following)
