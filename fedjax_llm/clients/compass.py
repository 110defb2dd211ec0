"""FedCompass's schedule: groups of clients that arrive at the same time.

Li et al. 2023, arXiv 2309.14675 (ICLR 2024), in the form of the authors'
package APPFL 1.12. `compass` returns a `clients.timed.Timed`.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.clients import system as systems
from fedjax_llm.clients import timed
from fedjax_llm.clients.system import Job, System
from fedjax_llm.types import Error

__all__ = ['compass']

_JOB = 321  # the purpose of the random stream
_ARRIVAL, _TIMER = 0, 1  # kinds of events; arrivals of a moment come first


class _Work(NamedTuple):
  """What a client is doing."""

  start: float
  steps: int
  version: int
  group: int  # -1: its first round, which no group waits for
  lost: bool


class _Group(NamedTuple):
  expected: float  # T, the moment in which all of it should arrive
  latest: float
  waiting: set[int]
  arrived: list[int]


def compass(
  num_clients: int,
  cohort_size: int | None = None,
  *,
  system: System,
  job: Callable[[], Job],
  min_steps: int = 1,
  latest_time_factor: float = 1.2,
  speed_momentum: float = 0.9,
  dropout: float = 0.0,
  jitter: float = 0.0,
  sizes: Sequence[float] | np.ndarray | None = None,
  seed: int = 0,
) -> timed.Timed:
  """Returns FedCompass's rounds: local steps are dealt by measured speed.

  All clients train all the time. The server measures the seconds of a step of
  each, s_k <- (1 - mu) s_k + mu (seconds / steps), and deals steps such that
  clients arrive in groups:

      join      the group g with most steps q = floor((T_g - now) / s_k), if
                q_min <= q <= q_max
      or begin  a group, q = max_g floor((L_g + q_max min_{j in g} s_j - now) /
                s_k) over the q <= q_max, at least q_min; q_max if there is none
                T = now + q s_k,  L = now + lambda q s_k

  A round is an aggregation: of a group, when all of it has arrived or at L; of
  a single client, when it arrives for the first time, after q_max steps. Who
  arrives after L trains on from the present parameters, and its work is
  aggregated with the next group's; newer work of the same client replaces it,
  as in APPFL, and it is counted as lost ('clock/lost'). Clients of a group that
  arrived get new steps in order of speed, the fastest first (Li et al. 2023,
  arXiv 2309.14675, algorithms 1 and 2). q_max is `cohort.num_steps`, and links
  count as part of a step's seconds. A round has N rows (`Draw.steps`,
  `Draw.started`).

  Args:
    num_clients: N.
    cohort_size: N, or absent.
    system: the devices and links; every client is always available.
    job: returns the operations and bytes of a client's round.
    min_steps: q_min.
    latest_time_factor: lambda.
    speed_momentum: mu, the weight of the newest measurement.
    dropout: probability that a client's work is lost on arrival.
    jitter: sigma of a log-normal factor on the seconds of each client's work.
    sizes: unused here.
    seed: of every random number of this sampler.

  Raises:
    Error: a number out of range, or a client with hours of absence.

  >>> system = systems.fleet(num_clients=2, devices=('orin_nano', 'rtx_4090'),
  ...                        links=('ethernet',))
  >>> rounds = compass(2, system=system, job=lambda: Job(1e13, 0, 0, 90))
  >>> np.sort(rounds(0).steps).tolist()  # the fast client's first
  [0, 90]
  >>> np.sort(rounds(80).steps).tolist()  # both at once
  [1, 90]
  """
  del sizes
  if cohort_size is not None and cohort_size != num_clients:
    raise Error(
      f'clients.cohort_size is {cohort_size}: with clients.name=compass all '
      f'{num_clients} clients train all the time; leave it out.'
    )
  timed.check(num_clients, num_clients, dropout, jitter, seed)
  if not latest_time_factor >= 1:
    raise Error(
      f'clients.latest_time_factor is {latest_time_factor}: it is at least 1.'
    )
  if not 0 < speed_momentum <= 1:
    raise Error(
      f'clients.speed_momentum is {speed_momentum}: it is above 0 and at most '
      '1.'
    )
  if (system.hours < 24).any():
    raise Error(
      'clients.name=compass deals steps to clients that are always available: '
      'set system.hours=24.'
    )
  events: list[tuple[float, int, int]] = []  # (moment, kind, client or group)
  work: dict[int, _Work] = {}
  speed: dict[int, float] = {}  # s_k, measured
  groups: dict[int, _Group] = {}
  later: dict[int, _Work] = {}  # arrived too late for their group
  count = dict(jobs=0, groups=0, replaced=0)
  made: list[Any] = []  # the job, its seconds and joules, once asked for

  def begin(client: int, steps: int, now: float, version: int, group: int):
    """Starts a client; returns its joules."""
    one, parts, energy = made
    rng = np.random.default_rng((seed, _JOB, count['jobs']))
    count['jobs'] += 1
    slower = math.exp(jitter * rng.standard_normal())
    lost = bool(rng.random() < dropout)
    compute = float(parts.compute[client]) * steps / one.num_steps * slower
    links = float(parts.down[client] + parts.up[client]) * slower
    work[client] = _Work(now, steps, version, group, lost)
    heapq.heappush(events, (now + links + compute, _ARRIVAL, client))
    return energy[client] * (steps / one.num_steps * slower, 1.0)

  def whole(number: float) -> int:
    return math.floor(number * (1 + timed.ROUNDING))

  def assign(client: int, now: float, version: int) -> np.ndarray:
    """Deals a client its steps and its group; returns its joules."""
    most, own = made[0].num_steps, speed[client]
    chosen, steps = -1, -1
    for name, group in groups.items():
      could = whole((group.expected - now) / own)
      if min_steps <= could <= most and could >= steps:
        chosen, steps = name, could
    if chosen < 0:
      for group in groups.values():
        if now < group.latest:
          fastest = min(speed[k] for k in (*group.waiting, *group.arrived))
          could = whole((group.latest + fastest * most - now) / own)
          steps = max(steps, could if could <= most else -1)
      steps = most if steps < 0 else max(steps, min_steps)
      chosen = count['groups']
      count['groups'] += 1
      seconds = steps * own
      latest = now + latest_time_factor * seconds * (1 + timed.ROUNDING)
      groups[chosen] = _Group(now + seconds, latest, set(), [])
      heapq.heappush(events, (latest, _TIMER, chosen))
    groups[chosen].waiting.add(client)
    return begin(client, steps, now, version, chosen)

  def aggregate(rows: dict[int, _Work]):
    """Returns the draw of a round, and the number of works that were lost."""
    kept = {k: one for k, one in rows.items() if not one.lost}
    draw = timed.padded(np.array(sorted(kept), np.int32), num_clients)
    column = lambda field: np.array(
      [getattr(kept[k], field) if k >= 0 else 0 for k in draw.ids.tolist()],
      np.int32,
    )
    draw = draw._replace(started=column('version'), steps=column('steps'))
    return draw, len(rows) - len(kept)

  def of_group(name: int, now: float, number: int):
    """Ends a round with a group; returns what a step of `timed` returns."""
    group = groups[name]
    rows = {**later, **{k: work[k] for k in group.arrived}}
    replaced = count['replaced'] + sum(k in later for k in group.arrived)
    count['replaced'] = 0
    later.clear()
    draw, lost = aggregate(rows)
    lost += replaced
    # Nobody joins it any more; who it still waits for is late.
    groups[name] = _Group(0.0, 0.0, group.waiting, group.arrived)
    order = sorted(group.arrived, key=lambda k: speed[k])
    joules = sum(assign(k, now, number + 1) for k in order)
    group.arrived.clear()
    if not group.waiting:
      del groups[name]
    return draw, now, joules, lost

  def step(number, now):
    joules = np.zeros(2)
    if not made:
      one = job()
      if not 1 <= min_steps <= one.num_steps:
        raise Error(
          f'clients.min_steps is {min_steps}: it is at least 1 and at most '
          f'cohort.num_steps={one.num_steps}.'
        )
      made[:] = [
        one, systems.duration(system, one), systems.energy(system, one),
      ]  # fmt: skip
      joules += sum(
        begin(k, one.num_steps, now, 0, -1) for k in range(num_clients)
      )
    while True:
      now, kind, name = heapq.heappop(events)
      if kind == _TIMER:
        group = groups.get(name)
        if group and group.arrived and group.latest > 0:
          draw, end, more, lost = of_group(name, now, number)
          return draw, end, joules + more, lost
        continue
      one = work[name]
      seconds = (now - one.start) / one.steps
      mix = speed_momentum if name in speed else 1.0
      speed[name] = (1 - mix) * speed.get(name, 0.0) + mix * seconds
      if one.group < 0:
        draw, lost = aggregate({name: one})
        return draw, now, joules + assign(name, now, number + 1), lost
      group = groups[one.group]
      group.waiting.remove(name)
      if now <= group.latest:
        group.arrived.append(name)
        if not group.waiting:
          draw, end, more, lost = of_group(one.group, now, number)
          return draw, end, joules + more, lost
        continue
      count['replaced'] += name in later
      later[name] = one
      if not group.waiting and not group.arrived:
        del groups[one.group]
      joules += assign(name, now, number)

  return timed.sequence(step)
