"""Samplers: which clients take part in a round.

Builders return a `types.Sampler`, round -> Draw.

Every sampler is a pure function of the round and takes the same keywords, so
that a configuration can switch the name. None draws a client twice in a round.
A Draw always has K = `cohort_size` rows: ids ascend, padding (-1) comes last.

Each client has its own random numbers: the i-th of a stream that is keyed by
(seed, purpose, round). They do not depend on the number of clients.

    availability   a client can be drawn in this round with this probability
    dropout        a drawn client fails to report with this probability
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedjax_llm.types import Draw, Error, Sampler

__all__ = [
  'by_size',
  'cyclic',
  'full',
  'poisson',
  'rotating',
  'uniform',
  'with_root',
]

# Purposes: the second word of a random stream's key.
_AVAILABLE, _DROPPED, _CHOSEN, _PASS, _POISSON = 101, 102, 103, 104, 105


def _numbers(seed: int, purpose: int, number: int, num: int) -> np.ndarray:
  """Returns uniform numbers in [0, 1), one a client.

  A longer stream begins with the same numbers.
  """
  return np.random.default_rng((seed, purpose, number)).random(num)


def _sampler(
  choose: Callable[[int, np.ndarray], np.ndarray],
  num_clients: int,
  cohort_size: int,
  availability: float,
  dropout: float,
  seed: int,
) -> Sampler:
  """Returns a sampler from `choose(round, available [N]) -> ids`.

  It checks the arguments and adds the drop-outs.
  """
  if num_clients < 1:
    raise Error(f'num_clients is {num_clients}: a federation needs a client.')
  if cohort_size < 1:
    raise Error(f'cohort_size is {cohort_size}: a round needs a client.')
  if cohort_size > num_clients:
    raise Error(
      f'cohort_size is {cohort_size}, but the population has only '
      f'{num_clients} clients.'
    )
  if not 0 < availability <= 1:
    raise Error(
      f'availability is {availability}: it is a probability above 0 and at '
      'most 1.'
    )
  if not 0 <= dropout < 1:
    raise Error(
      f'dropout is {dropout}: it is a probability of at least 0 and below 1.'
    )
  if seed < 0:
    raise Error(f'seed is {seed}: it is a whole number of at least 0.')

  def sample(round: int) -> Draw:
    round = int(round)
    available = _numbers(seed, _AVAILABLE, round, num_clients) < availability
    chosen = np.sort(choose(round, available))
    ids = np.full(cohort_size, -1, np.int32)
    ids[: len(chosen)] = chosen
    stays = _numbers(seed, _DROPPED, round, num_clients) >= dropout
    return Draw(ids=ids, reports=(ids >= 0) & stays[ids])

  return sample


def weighted(
  size: np.ndarray,
  cohort_size: int,
  availability: float,
  dropout: float,
  seed: int,
) -> Sampler:
  """Returns a sampler of the K smallest e_i / size_i, e_i exponential."""

  def choose(round, available):
    u = _numbers(seed, _CHOSEN, round, len(size))
    can = np.flatnonzero(available & (size > 0))
    arrival = -np.log1p(-u[can]) / size[can]
    return can[np.argsort(arrival, kind='stable')[:cohort_size]]

  return _sampler(choose, len(size), cohort_size, availability, dropout, seed)


def weighted_by_logs(
  logs: np.ndarray,
  cohort_size: int,
  availability: float,
  dropout: float,
  seed: int,
) -> Sampler:
  """Returns `weighted` for sizes exp(logs), which need not be representable.

  A log of minus infinity is the size 0.
  """

  def choose(round, available):
    u = _numbers(seed, _CHOSEN, round, len(logs))
    can = np.flatnonzero(available & (logs > -np.inf))
    with np.errstate(divide='ignore'):  # u = 0 arrives first
      arrival = np.log(-np.log1p(-u[can])) - logs[can]
    return can[np.argsort(arrival, kind='stable')[:cohort_size]]

  return _sampler(choose, len(logs), cohort_size, availability, dropout, seed)


def uniform(
  num_clients: int,
  cohort_size: int,
  *,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of K available clients, each set equally probable.

  Fewer available clients than K leave rows of padding. Unavailable clients and
  drop-outs do not change the random numbers of the others.

  Args:
    num_clients: N.
    cohort_size: K.
    sizes: unused here; see `by_size`.
    availability: probability that a client can be drawn in a round.
    dropout: probability that a drawn client does not report.
    seed: of every random number of this sampler.

  Raises:
    Error: K < 1, K > N, or a probability out of range.

  >>> sample = uniform(num_clients=1000, cohort_size=3, seed=1)
  >>> draw = sample(0)
  >>> len(set(draw.ids.tolist())), draw.reports.tolist()
  (3, [True, True, True])
  >>> (sample(0).ids == draw.ids).all(), (sample(1).ids == draw.ids).all()
  (np.True_, np.False_)
  """
  del sizes  # every client counts the same
  size = np.ones(max(num_clients, 0))
  return weighted(size, cohort_size, availability, dropout, seed)


def by_size(
  num_clients: int,
  cohort_size: int,
  *,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of K clients in turn, with probability ~ their size.

  Successive sampling without replacement: the next client is i with probability
  size_i / (sum of the sizes not drawn yet). It is computed as the K smallest of
  e_i / size_i with e_i exponential, which is the Gumbel top-k of log size_i
  (Efraimidis and Spirakis, Information Processing Letters 97, 2006). The first
  draw is exactly proportional to the sizes; the chance of being among K is not,
  since it cannot exceed 1. A client of size 0 is never drawn.

  Args and errors as in `uniform`; `sizes` [N] is needed here.

  >>> sample = by_size(num_clients=3, cohort_size=1, sizes=[8, 1, 1])
  >>> ids = [int(sample(round).ids[0]) for round in range(1000)]
  >>> 0.75 < ids.count(0) / 1000 < 0.85
  True
  """
  if sizes is None:
    raise Error('by_size needs sizes: one number a client.')
  size = np.asarray(sizes, np.float64)
  if size.shape != (num_clients,):
    raise Error(
      f'sizes has {size.size} numbers for {num_clients} clients: it needs one '
      'a client.'
    )
  if not (np.isfinite(size).all() and (size >= 0).all() and size.any()):
    raise Error(
      'sizes must be finite and not negative, and one of them above 0.'
    )
  return weighted(size, cohort_size, availability, dropout, seed)


def cyclic(
  num_clients: int,
  cohort_size: int,
  *,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of passes over all clients in random order, K a round.

  A pass takes ceil(N / K) rounds and visits every client once; where K does not
  divide N, the last round of a pass is short (padding). A client that is not
  available when its turn comes leaves its row empty and waits for the next
  pass.

  Args and errors as in `uniform`.

  >>> sample = cyclic(num_clients=6, cohort_size=2)
  >>> sorted(int(i) for round in range(3) for i in sample(round).ids)
  [0, 1, 2, 3, 4, 5]
  """
  del sizes
  rounds_a_pass = -(-num_clients // max(cohort_size, 1))

  def choose(round, available):
    number, turn = divmod(round, rounds_a_pass)
    order = np.argsort(
      _numbers(seed, _PASS, number, num_clients), kind='stable'
    )
    ids = order[turn * cohort_size : (turn + 1) * cohort_size]
    return ids[available[ids]]

  return _sampler(choose, num_clients, cohort_size, availability, dropout, seed)


def rotating(
  num_clients: int,
  cohort_size: int,
  *,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of passes over all clients in one order, K a round.

  The order is drawn once, so two turns of a client are exactly ceil(N / K)
  rounds apart: the separation that correlated noise counts with (`cyclic` draws
  an order a pass). A client that is not available waits for its next turn.

  Args and errors as in `uniform`.

  >>> sample = rotating(num_clients=5, cohort_size=2)
  >>> all((sample(r).ids == sample(r + 3).ids).all() for r in range(9))
  True
  """
  del sizes
  rounds_a_pass = -(-num_clients // max(cohort_size, 1))

  def choose(round, available):
    order = np.argsort(_numbers(seed, _PASS, 0, num_clients), kind='stable')
    turn = round % rounds_a_pass
    ids = order[turn * cohort_size : (turn + 1) * cohort_size]
    return ids[available[ids]]

  return _sampler(choose, num_clients, cohort_size, availability, dropout, seed)


def full(
  num_clients: int,
  cohort_size: int | None = None,
  *,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of all available clients in every round: K = N.

  Args and errors as in `uniform`; a `cohort_size` other than N is refused.

  >>> full(3)(0).ids.tolist()
  [0, 1, 2]
  """
  del sizes
  if cohort_size is not None and cohort_size != num_clients:
    raise Error(
      f'full takes all {num_clients} clients every round: cohort_size must be '
      f'{num_clients} or absent, not {cohort_size}.'
    )
  return _sampler(
    lambda round, available: np.flatnonzero(available),
    num_clients,
    num_clients,
    availability,
    dropout,
    seed,
  )


def poisson(
  num_clients: int,
  cohort_size: int,
  *,
  rate: float | None = None,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler that draws each client on its own with probability q.

  The number of clients of a round is then random, and may be zero; a draw has
  K = `cohort_size` rows, the rest padding. Of a larger sample K clients are
  kept at random. Differential privacy counts with such samples.

  Args and errors as in `uniform`, and
    rate: q; None: K / (2 N), half of the rows in expectation.

  >>> sample = poisson(num_clients=4, cohort_size=4, rate=0.5, seed=1)
  >>> [sample(round).reports.tolist().count(True) for round in range(8)]
  [2, 4, 2, 1, 1, 3, 1, 1]
  """
  del sizes
  if rate is None:
    rate = max(cohort_size, 1) / (2 * max(num_clients, 1))
  if not 0 < rate <= 1:
    raise Error(f'rate is {rate}: it is a probability above 0 and at most 1.')

  def choose(round, available):
    u = _numbers(seed, _POISSON, round, num_clients)
    ids = np.flatnonzero(available & (u < rate))
    return ids[np.argsort(u[ids], kind='stable')[:cohort_size]]

  return _sampler(choose, num_clients, cohort_size, availability, dropout, seed)


def with_root(
  num_clients: int,
  cohort_size: int,
  *,
  root: Sequence[int] = (0,),
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns `uniform` for all but the clients `root`, who are in every round.

  The root is the server's own data in the form of clients, for rules that trust
  it (`aggregators.fltrust`): it is always available and always reports.

  Args and errors as in `uniform`, and
    root: ids, at most K of them.

  >>> sample = with_root(num_clients=100, cohort_size=3, root=[7])
  >>> all(7 in sample(round).ids for round in range(5))
  True
  """
  del sizes
  own = np.unique(np.asarray(tuple(root), np.int32))
  if not len(own) or own[0] < 0 or own[-1] >= num_clients:
    raise Error(
      f'root is {tuple(root)}: it holds ids from 0 to {num_clients - 1}, at '
      'least one.'
    )
  if len(own) > cohort_size:
    raise Error(
      f'root has {len(own)} clients, and cohort_size is {cohort_size}: a round '
      'holds all of them.'
    )

  def choose(round, available):
    u = _numbers(seed, _CHOSEN, round, num_clients)
    can = np.setdiff1d(np.flatnonzero(available), own)
    order = can[np.argsort(u[can], kind='stable')]
    return np.concatenate([own, order[: cohort_size - len(own)]])

  draw = _sampler(choose, num_clients, cohort_size, availability, dropout, seed)

  def sample(round: int) -> Draw:
    one = draw(round)
    return one._replace(reports=one.reports | np.isin(one.ids, own))

  return sample
