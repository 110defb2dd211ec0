"""Samplers with a clock: who takes part depends on who arrives when.

Builders return a `Timed`: a sampler, round -> Draw, that also tells the
simulated time at which each round ends. The times follow from the devices and
links of the clients (`clients.system`) and the operations and bytes of a
client's round, never from the machine that simulates. A round here is one
change of the server's parameters.

    deadline   synchronous rounds with over-selection, a deadline, partial work
    buffered   asynchronous: the server waits for K arrivals, whoever they are
    tiered     clients of one speed are synchronous, groups are not

All are pure in (seed, round): a resumed run sees the same draws. They are
computed from round 0 on and kept, a few arrays [K] a round.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.clients import system as systems
from fedjax_llm.clients.attendance import attendance
from fedjax_llm.clients.system import Job, System
from fedjax_llm.types import Draw, Error

__all__ = ['buffered', 'deadline', 'tiered']

# A client whose work fills its deadline exactly is in time, whatever the
# rounding of its seconds.
ROUNDING = 1e-9

# Purposes of the random streams.
_CHOSEN, _LOST, _JITTER, _JOB, _TIER = 311, 312, 313, 314, 315


class Timed(NamedTuple):
  """A sampler, and the simulated clock of its rounds.

  `clock(round)` returns metrics of the end of a round: 'clock/seconds' since
  the start, 'clock/joules' of all computation so far (absent where a device's
  watts are not known), 'clock/joules_network' of all messages so far (absent
  where a link's joules a byte are not known), 'clock/lost' clients whose work
  was lost in this round, and 'clock/staleness', the mean number of rounds since
  the clients of this round started.
  """

  draw: Callable[[int], Draw]
  clock: Callable[[int], dict[str, float]]

  def __call__(self, round: int) -> Draw:
    return self.draw(int(round))


class _Round(NamedTuple):
  draw: Draw
  end: float  # seconds since the start
  joules: np.ndarray  # [2] of all computation and of all messages so far
  lost: int


def sequence(step: Callable[[int, float], tuple[Draw, float, Any, int]]):
  """Returns a `Timed` of rounds that are computed one after another.

  `step(round, now) -> (draw, end, joules [2] of this round, lost)`.
  """
  rounds: list[_Round] = []

  def at(number: int) -> _Round:
    while len(rounds) <= number:
      now, spent = 0.0, np.zeros(2)
      if rounds:
        now, spent = rounds[-1].end, rounds[-1].joules
      draw, end, joules, lost = step(len(rounds), now)
      rounds.append(_Round(draw, end, spent + joules, lost))
    return rounds[number]

  def clock(number: int) -> dict[str, float]:
    round = at(int(number))
    started = round.draw.started
    values = {
      'clock/seconds': round.end,
      'clock/joules': float(round.joules[0]),
      'clock/joules_network': float(round.joules[1]),
      'clock/lost': float(round.lost),
    }
    if started is not None:
      age = number - started[round.draw.ids >= 0]
      values['clock/staleness'] = float(age.mean()) if age.size else 0.0
    return {k: v for k, v in values.items() if not math.isnan(v)}

  return Timed(lambda number: at(number).draw, clock)


def deadline(
  num_clients: int,
  cohort_size: int,
  *,
  system: System,
  job: Callable[[], Job],
  seconds: float | None = None,
  over_selection: float = 1.0,
  partial: bool = False,
  dropout: float = 0.0,
  jitter: float = 0.0,
  sizes: Sequence[float] | np.ndarray | None = None,
  seed: int = 0,
) -> Timed:
  """Returns synchronous rounds: the first K of c K chosen clients count.

  A round ends with the K-th arrival (Bonawitz et al. 2019, arXiv 1902.01046,
  section 2.2), at the deadline, or when no client is left to wait for. The work
  of all others is lost. With `partial`, a client that cannot do all its steps
  by the deadline does as many as it can (`Draw.steps`), as FedProx's clients do
  (arXiv 1812.06127, section 3.2); one that cannot do a single step is lost.

  Args:
    num_clients: N.
    cohort_size: K.
    system: the devices and links.
    job: returns the operations and bytes of a client's round.
    seconds: the deadline of a round; None: none.
    over_selection: c.
    partial: fewer steps instead of lost work.
    dropout: probability that a client's work is lost.
    jitter: sigma of a log-normal factor on the seconds of a client's round,
      drawn for every round.
    sizes: unused here.
    seed: of every random number of this sampler.

  Raises:
    Error: K < 1, K > N, or a number out of range.

  >>> system = systems.fleet(num_clients=3, devices=('orin_nano', 'rtx_4090'),
  ...                        links=('ethernet',))
  >>> rounds = deadline(3, 1, system=system, over_selection=3.0,
  ...                   job=lambda: Job(1e13, 0, 0, 4))
  >>> first = rounds(0)
  >>> system.operations[first.ids[0]] == max(system.operations)
  np.True_
  >>> round(rounds.clock(0)['clock/seconds'], 3)  # 1e13 / (0.3 * 82.6e12)
  0.405
  """
  del sizes
  check(num_clients, cohort_size, dropout, jitter, seed)
  if seconds is not None and not seconds > 0:
    raise Error(f'clients.seconds is {seconds}: a deadline is above 0.')
  if not 1 <= over_selection < math.inf:
    raise Error(f'clients.over_selection is {over_selection}: at least 1.')
  if partial and seconds is None:
    raise Error('clients.partial needs a deadline: set clients.seconds.')
  limit = math.inf if seconds is None else float(seconds)
  made: list = []  # the job and its seconds, once they are asked for

  def step(number, now):
    now += systems.wait(system, now)
    if not made:
      one = job()
      made[:] = [one, systems.duration(system, one)]
    work, parts = made
    draw = lambda purpose: np.random.default_rng((seed, purpose, number))
    can = np.flatnonzero(systems.available(system, now))
    order = np.argsort(draw(_CHOSEN).random(num_clients)[can], kind='stable')
    ids = can[order[: math.ceil(over_selection * cohort_size)]]
    slower = np.exp(jitter * draw(_JITTER).standard_normal(num_clients))[ids]
    links = (parts.down + parts.up)[ids] * slower
    compute = parts.compute[ids] * slower
    steps = np.full(len(ids), work.num_steps)
    if partial:
      free = np.maximum(limit - links, 0) / np.maximum(compute, 1e-300)
      steps = np.floor(work.num_steps * free * (1 + ROUNDING))
      steps = np.minimum(steps, work.num_steps).astype(np.int64)
    compute = compute * steps / work.num_steps
    took = links + compute
    lost = draw(_LOST).random(num_clients)[ids] < dropout
    lost |= (took > limit * (1 + ROUNDING)) | (steps < 1)
    took = np.where(lost, took, np.minimum(took, limit))
    arrival = np.where(lost, np.inf, took)
    first = np.argsort(arrival, kind='stable')[:cohort_size]
    first = first[np.isfinite(arrival[first])]
    if len(first) == cohort_size:
      end = float(arrival[first].max())
    else:  # waits for all, but not beyond the deadline
      end = min(limit, float(took.max()))
    kept = first[np.argsort(ids[first])]
    drawn = padded(ids[kept], cohort_size)
    if partial:
      rows = np.zeros(cohort_size, np.int32)
      rows[: len(kept)] = steps[kept]
      drawn = drawn._replace(steps=rows)
    joules = systems.energy(system, work)[ids]
    joules[:, 0] *= slower * steps / work.num_steps
    joules = joules.sum(0)
    return drawn, now + end, joules, len(ids) - len(kept)

  return sequence(step)


def buffered(
  num_clients: int,
  cohort_size: int,
  *,
  system: System,
  job: Callable[[], Job],
  concurrency: int | None = None,
  dropout: float = 0.0,
  jitter: float = 0.0,
  sizes: Sequence[float] | np.ndarray | None = None,
  seed: int = 0,
) -> Timed:
  """Returns asynchronous rounds: the server waits for K arrivals.

  `concurrency` clients train at any time, each from the parameters of the
  round in which it started (`Draw.started`). Whoever arrives goes into a
  buffer, and another client, at random among those that are available and
  neither training nor in the buffer, starts in its place. With K arrivals the
  round ends (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1; K = 1 is
  FedAsync, arXiv 1903.03934). Clients that arrive at the same moment are
  replaced after it, so clients of one speed are synchronous. Work that is lost
  frees its place when it would have arrived.

  Args and errors as in `deadline`, and
    concurrency: C, clients that train at any time; 2 K if None, at most N.

  >>> system = systems.fleet(num_clients=4, devices=('orin_nano', 'rtx_4090'),
  ...                        links=('ethernet',))
  >>> rounds = buffered(4, 1, system=system, concurrency=2,
  ...                   job=lambda: Job(1e13, 0, 0, 4))
  >>> [int(rounds(i).started[0]) for i in range(4)]
  [0, 1, 0, 2]
  """
  del sizes
  check(num_clients, cohort_size, dropout, jitter, seed)
  if concurrency is None:
    concurrency = min(2 * cohort_size, num_clients)
  if not 1 <= concurrency <= num_clients:
    raise Error(
      f'clients.concurrency is {concurrency}: it is at least 1 and at most the '
      f'{num_clients} clients.'
    )
  training: list[tuple[float, int, int, int, bool]] = []  # a heap, by arrival
  at_hand = attendance(system)  # busy: they train, or wait in the buffer
  state = {'job': 0, 'free': concurrency}
  # Seconds [N] and joules [N, 2] of a round, once they are asked for.
  parts: list[np.ndarray] = []

  def begin(now: float, version: int) -> np.ndarray:
    """Starts a client in every free place that finds one; returns joules."""
    joules = np.zeros(2)
    at_hand.advance(now)
    while state['free'] and at_hand.num_idle():
      rng = np.random.default_rng((seed, _JOB, state['job']))
      client = at_hand.take(rng)
      slower = math.exp(jitter * rng.standard_normal())
      lost = bool(rng.random() < dropout)
      took = float(parts[0][client]) * slower
      joules += parts[1][client] * (slower, 1.0)
      heapq.heappush(
        training, (now + took, state['job'], client, version, lost)
      )
      state['job'] += 1
      state['free'] -= 1
    return joules

  def step(number, now):
    if not parts:
      one = job()
      parts[:] = [
        systems.duration(system, one).total, systems.energy(system, one),
      ]  # fmt: skip
    arrived: list[tuple[int, int]] = []
    joules, lost = np.zeros(2), 0
    while len(arrived) < cohort_size:
      if not training or training[0][0] > now:
        joules += begin(now, number)
      if state['free']:  # nobody is available: time goes on
        following = at_hand.following()
        if not training or following < training[0][0]:
          now = following
          continue
      now, _, client, version, gone = heapq.heappop(training)
      state['free'] += 1
      if gone:
        at_hand.free(client)
        lost += 1
      else:
        arrived.append((client, version))
    for client, _ in arrived:
      at_hand.free(client)
    ids, started = np.array(sorted(arrived), np.int64).T
    made = padded(ids, cohort_size)
    return made._replace(started=started.astype(np.int32)), now, joules, lost

  return sequence(step)


def tiered(
  num_clients: int,
  cohort_size: int,
  *,
  system: System,
  job: Callable[[], Job],
  num_tiers: int = 3,
  dropout: float = 0.0,
  jitter: float = 0.0,
  sizes: Sequence[float] | np.ndarray | None = None,
  seed: int = 0,
) -> Timed:
  """Returns rounds of tiers: clients of about the same speed train together.

  Clients are sorted by the seconds of their round and cut into tiers of equal
  size (Chai et al. 2020, arXiv 2001.09249). Each tier runs synchronous rounds
  of K of its clients on its own, each with the server's parameters of the
  moment in which it starts (`Draw.started`), so slow tiers are late and hold
  nobody up (the semi-synchronous form of Chai et al. 2021, arXiv 2010.05958).
  Rounds that end at the moment in which a tier starts come before it. A tier of
  which nobody is available waits, and starts from what the server has then.

  Args and errors as in `deadline`, and
    num_tiers: the number of tiers, each of at least K clients.

  >>> system = systems.fleet(num_clients=4, devices=('orin_nano', 'rtx_4090'),
  ...                        links=('ethernet',))
  >>> rounds = tiered(4, 2, system=system, num_tiers=2,
  ...                 job=lambda: Job(1e13, 0, 0, 4))
  >>> fast = {int(i) for i in rounds(0).ids}
  >>> all({int(i) for i in rounds(n).ids} == fast for n in range(64))
  True
  """
  del sizes
  check(num_clients, cohort_size, dropout, jitter, seed)
  if not 1 <= num_tiers <= num_clients // cohort_size:
    raise Error(
      f'clients.num_tiers is {num_tiers}: it is at least 1, and each tier '
      f'needs cohort_size={cohort_size} of the {num_clients} clients.'
    )
  # By end: (end, tier, turn, start, ids, lost).
  running: list[tuple[float, int, int, float, np.ndarray, np.ndarray]] = []
  ends: list[float] = []  # of the rounds so far
  made: list = []  # the seconds and the tiers, once they are asked for

  def begin(tier: int, turn: int, now: float):
    rng = np.random.default_rng((seed, _TIER, tier, turn))
    seconds, energy, tiers = made
    mine = tiers[tier]
    ids = mine[np.argsort(rng.random(len(mine)), kind='stable')]
    now += systems.wait(_of(system, mine), now)
    here = systems.available(_of(system, ids), now)
    ids = np.sort(ids[here][:cohort_size])
    slower = np.exp(jitter * rng.standard_normal(len(ids)))
    lost = rng.random(len(ids)) < dropout
    end = now + float(np.max(seconds.total[ids] * slower))
    heapq.heappush(running, (end, tier, turn, now, ids, lost))
    return (energy[ids] * np.stack([slower, np.ones(len(ids))], -1)).sum(0)

  def step(number, now):
    joules = np.zeros(2)
    if not made:
      one = job()
      seconds = systems.duration(system, one)
      order = np.argsort(seconds.total, kind='stable')
      tiers = np.array_split(order, num_tiers)
      made[:] = [seconds, systems.energy(system, one), tiers]
      joules += sum(begin(t, 0, now) for t in range(num_tiers))
    else:
      tier, turn = ended.pop()
      joules += begin(tier, turn + 1, now)
    end, tier, turn, start, ids, lost = heapq.heappop(running)
    ended.append((tier, turn))
    draw = padded(ids, cohort_size)
    version = bisect.bisect_right(ends, start)
    started = np.full(cohort_size, version, np.int32)
    ends.append(end)
    reports = draw.reports.copy()
    reports[: len(ids)] &= ~lost
    return (
      draw._replace(
        started=started, reports=reports,
        tier=np.full(cohort_size, tier, np.int32),
      ),
      end, joules, int(lost.sum()),
    )  # fmt: skip

  ended: list[tuple[int, int]] = []
  return sequence(step)


# ------------------------------------------------------------------- parts --


def check(num_clients, cohort_size, dropout, jitter, seed) -> None:
  if cohort_size < 1 or num_clients < cohort_size:
    raise Error(
      f'cohort_size is {cohort_size}: it is at least 1 and at most the '
      f'{num_clients} clients of the population.'
    )
  if not 0 <= dropout < 1:
    raise Error(
      f'dropout is {dropout}: it is a probability of at least 0 and below 1.'
    )
  if not 0 <= jitter < math.inf:
    raise Error(f'clients.jitter is {jitter}: it is a number of at least 0.')
  if seed < 0:
    raise Error(f'seed is {seed}: it is a whole number of at least 0.')


def padded(ids: np.ndarray, cohort_size: int) -> Draw:
  """Returns a draw of ids in ascending order, padded to K rows."""
  rows = np.full(cohort_size, -1, np.int32)
  rows[: len(ids)] = ids
  return Draw(rows, rows >= 0)


def _of(system: System, ids: np.ndarray) -> System:
  return System(*(column[ids] for column in system))
