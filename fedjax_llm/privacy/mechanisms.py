"""Plans of privacy beside the central noise of `client_level`.

correlated     client-level, trusted server, noise that cancels over rounds
example_level  noise in every local step; the server need not be trusted
local_level    noise in every message; the server need not be trusted
distributed    noise of all clients together, under a secure sum

Each returns a `Mechanism`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_llm.privacy import accounting, correlated, plan, streams
from fedjax_llm.types import Error, StreamingAggregator

_SEED = (
  'The seed stays secret: draws and noise follow from it. Noise is float32 '
  'from a generator that is not cryptographic. Whether a client reported at '
  'all is public.'
)
ASSUMED = {
  'correlated': (
    'The server is trusted. Neighbours differ in one client, whose updates are '
    'there or are zero; who takes part in which round is public. '
  ),
  'examples': (
    'The server need not be trusted. Neighbours differ in one example of one '
    'client, whose gradients are there or are zero; the number of examples of '
    'a client and who takes part in which round are public, the sample of a '
    'step is not. An example that several clients hold counts for each. '
  ),
  'local': (
    'The server need not be trusted. Neighbours differ in all texts of one '
    'client; who takes part in which round is public. '
  ),
  'distributed': (
    'The server sees sums alone, and clients add their noise. Neighbours '
    'differ in one client, whose message is there or is only its noise; who '
    'takes part in which round is public. Skellam numbers are drawn in '
    'float32. '
  ),
}


class Mechanism(NamedTuple):
  """A mechanism whose cost is a composition of equal parts.

  Round t has cost that of `counts[t]` Gaussians of multiplier `factor` z, each
  on a Poisson sample of `rate`: `counts` are the most that one unit took part
  in until then, over all units.

  >>> plan = local_level(clip=1.0, delta=1e-5, noise_multiplier=20.0,
  ...                    turns=(0, 1, 1, 2))
  >>> plan.epsilon(2) == plan.epsilon(1) < plan.epsilon(3)
  True
  """

  mechanism: str
  unit: str  # 'client' or 'example'
  clip: float
  noise_multiplier: float  # z
  delta: float
  budget: float | None
  num_rounds: int
  accountant: str
  counts: tuple[int, ...]  # [T + 1]
  rate: float = 1.0
  factor: float = 1.0
  denominator: float = 1.0
  bands: int | None = None
  clipping: str | None = None
  microbatch: int | None = None
  least: int | None = None
  grid: float | None = None
  matrix: str | None = None  # None: banded
  buffers: int | None = None
  separation: int | None = None

  def stream(self) -> streams.Stream | None:
    """Returns the stream of noise; None: banded, or none."""
    if self.matrix is None:
      return None
    return streams.named(
      self.matrix,
      buffers=self.buffers or 1,
      num_rounds=len(self.counts) - 1,
      separation=self.separation or 1,
      turns=self.counts[-1],
    )

  def rule(self) -> StreamingAggregator | None:
    """Returns the rule of the run; None where any rule will do."""
    if self.mechanism != 'correlated':
      return None
    return correlated.correlated_mean(
      self.clip,
      self.noise_multiplier,
      self.denominator,
      self.bands or 1,
      stream=self.stream(),
    )

  def epsilon(self, num_rounds: int) -> float:
    """Returns epsilon after a number of rounds, at the plan's delta.

    Raises:
      Error: a round outside of the plan, whose schedule is not counted.
    """
    if not 0 <= num_rounds < len(self.counts):
      raise Error(
        f'privacy: epsilon after {num_rounds} rounds is not known, as the '
        f'schedule was counted for 0 to {len(self.counts) - 1} rounds.'
      )
    count = self.counts[num_rounds]
    if self.grid is not None:
      return accounting.skellam_epsilon(
        noise_multiplier=self.noise_multiplier,
        grid=self.grid,
        num_rounds=count,
        delta=self.delta,
      )
    return accounting.epsilon(
      noise_multiplier=self.factor * self.noise_multiplier,
      rate=self.rate,
      num_rounds=count,
      delta=self.delta,
      accountant=self.accountant,
    )

  def metrics(self, num_rounds: int) -> dict[str, float]:
    """Returns the metrics of the guarantee after a number of rounds."""
    return {'privacy/epsilon': self.epsilon(num_rounds)}

  def record(self) -> dict[str, Any]:
    """Returns the guarantee and its limits as JSON values."""
    fields = {k: v for k, v in self._asdict().items() if v is not None}
    del fields['counts']
    return {
      **fields,
      'compositions': self.counts[self.num_rounds],
      'epsilon': self.epsilon(self.num_rounds),
      'assumed': ASSUMED[self.mechanism] + _SEED,
      'not covered by the guarantee': plan.NOT_COVERED,
    }

  def check(self, state: Any) -> None:
    """Checks that a rule's state goes on with the noise of this plan.

    Raises:
      Error: it has another noise multiplier, or another matrix.
    """
    if self.mechanism != 'correlated':
      return
    plan.check_noise(state, self.noise_multiplier)
    if (stream := self.stream()) is not None:
      has = float(state.more[1]) if state.more else None
      if has is None or abs(has - stream.sensitivity) > 1e-5 * has:
        raise Error(
          f'this run began with a matrix of sensitivity {has}, and '
          f'privacy.matrix={self.matrix!r} now has {stream.sensitivity:.6g}: '
          'it is that of all rounds, so keep num_rounds and the section '
          'clients.'
        )


def _planned(
  mechanism: str,
  counts: Sequence[int],
  epsilon: float | None,
  noise_multiplier: float | None,
  delta: float,
  **fields: Any,
) -> Mechanism:
  """Returns the plan, with its noise and the rounds of its budget found."""
  num_rounds = len(counts) - 1
  built = Mechanism(
    mechanism=mechanism,
    noise_multiplier=noise_multiplier or 0.0,
    delta=delta,
    budget=epsilon,
    num_rounds=num_rounds,
    counts=tuple(counts),
    **fields,
  )
  plan.check_numbers(
    built.clip, delta, epsilon, noise_multiplier, built.accountant
  )
  accounting.package()
  if noise_multiplier is None:
    assert epsilon is not None
    if built.grid is None:
      noise = accounting.noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        rate=built.rate,
        num_rounds=counts[-1],
        accountant=built.accountant,
      )
      built = built._replace(noise_multiplier=noise / built.factor)
    else:
      built = built._replace(noise_multiplier=_least_noise(built, epsilon))
  return built._replace(num_rounds=plan.rounds_within(built))


def _least_noise(built: Mechanism, epsilon: float) -> float:
  spent = lambda z: built._replace(noise_multiplier=z).epsilon(built.num_rounds)
  low, high = 0.0, 1.0
  while spent(high) > epsilon:
    low, high = high, 2 * high
    if high > 1e4:
      raise Error(
        f'privacy.epsilon is {epsilon:g}: no noise reaches it over '
        f'{built.counts[-1]} turns of a client with delta={built.delta:g}.'
      )
  while high - low > 1e-3 * high:
    middle = (low + high) / 2
    low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
  return high


def correlated_level(
  *,
  clip: float,
  delta: float,
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  accountant: str = 'rdp',
  bands: int | None = None,
  matrix: str = 'banded',
  buffers: int = 3,
  separation: int = 1,
  cohort_size: int = 1,
  turns: Sequence[int] = (0, 1),
) -> Mechanism:
  """Returns the plan of `correlated_mean`: DP-FTRL without sampling.

  Args:
    clip, delta, epsilon, noise_multiplier, accountant: as in `client_level`.
    bands: b of matrix='banded'; None: the separation.
    matrix: 'banded', 'blt' or 'tree' (`streams.named`).
    buffers: of matrix='blt'.
    separation: the rounds between two turns of a client, at least.
    cohort_size: the denominator.
    turns: the most turns of a client in 0, 1, ..., T rounds.

  Raises:
    Error: more bands than the separation, bands of another matrix, or as
      `client_level`.

  >>> correlated_level(clip=1.0, delta=1e-5, noise_multiplier=1.0, bands=3,
  ...                  separation=2)
  Traceback (most recent call last):
  fedjax_llm.types.Error: privacy.bands is 3, and a client takes part again \
after 2 rounds: bands must be at most 2.
  """
  if matrix != 'banded':
    if bands is not None:
      raise Error(
        f'privacy.bands is {bands}, and privacy.matrix={matrix!r} has no bands.'
      )
    planned = _planned(
      'correlated', turns, epsilon, noise_multiplier, delta,
      clip=clip, unit='client', accountant=accountant, matrix=matrix,
      buffers=buffers if matrix == 'blt' else None, separation=separation,
      denominator=float(cohort_size),
    )  # fmt: skip
    planned.stream()  # raises for numbers out of range
    return planned
  bands = separation if bands is None else bands
  if bands > separation:
    raise Error(
      f'privacy.bands is {bands}, and a client takes part again after '
      f'{separation} rounds: bands must be at most {separation}.'
    )
  return _planned(
    'correlated', turns, epsilon, noise_multiplier, delta,
    clip=clip, unit='client', accountant=accountant, bands=bands,
    denominator=float(cohort_size),
  )  # fmt: skip


def example_level(
  *,
  clip: float,
  delta: float,
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  accountant: str = 'rdp',
  clipping: str = 'abadi',
  microbatch: int | None = None,
  example_rate: float | None = None,
  batch_size: int = 1,
  num_steps: int = 1,
  turns: Sequence[int] = (0, 1),
) -> Mechanism:
  """Returns the plan of noise in local steps, `local.per_example.noisy`.

  Clients take their steps on Poisson samples of their examples. All S steps of
  every turn of a client are counted; the sampling of clients is not, as the
  server knows who takes part.

  Args:
    clip: C, of the gradient of an example.
    clipping: 'abadi' or 'automatic'.
    microbatch: examples whose gradients exist at once.
    example_rate: q, the probability of an example in a step.
    batch_size: B, the denominator of a step.
    num_steps: S.
    turns: as in `correlated_level`.

  Raises:
    Error: as `client_level`.

  >>> example_level(clip=0.5, delta=1e-5, noise_multiplier=2.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: privacy.example_rate is None: it is a probability \
above 0 and at most 1.
  """
  if example_rate is None or not 0 < example_rate <= 1:
    raise Error(
      f'privacy.example_rate is {example_rate}: it is a probability above 0 '
      'and at most 1.'
    )
  return _planned(
    'examples', [num_steps * n for n in turns], epsilon, noise_multiplier,
    delta, clip=clip, unit='example', accountant=accountant, rate=example_rate,
    clipping=clipping, microbatch=microbatch, denominator=float(batch_size),
  )  # fmt: skip


def local_level(
  *,
  clip: float,
  delta: float,
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  accountant: str = 'rdp',
  turns: Sequence[int] = (0, 1),
) -> Mechanism:
  """Returns the plan of noise in every message, `sent.noised`.

  Two clipped updates differ by up to 2 C, so each turn is a Gaussian of
  multiplier z / 2.

  Raises:
    Error: as `client_level`.

  >>> local_level(clip=0.5, delta=1e-5, noise_multiplier=2.0).clip
  0.5
  """
  return _planned(
    'local', turns, epsilon, noise_multiplier, delta,
    clip=clip, unit='client', accountant=accountant, factor=0.5,
  )  # fmt: skip


def distributed(
  *,
  clip: float,
  delta: float,
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  least: int | None = None,
  grid: float = 2.0**14,
  cohort_size: int = 1,
  turns: Sequence[int] = (0, 1),
) -> Mechanism:
  """Returns the plan of Skellam noise under a secure sum, `sent.skellam`.

  Args:
    least: the fewest reports of a round that is not given up; None: all of the
      cohort.
    grid: the clip norm in steps of the grid.
    cohort_size: the rows of a cohort.

  Raises:
    Error: `least` or `grid` out of range, or as `client_level`.

  >>> plan = distributed(
  ...   clip=0.5, delta=1e-5, noise_multiplier=2.0, cohort_size=4)
  >>> plan.clip, plan.least
  (0.5, 4)
  """
  least = cohort_size if least is None else least
  if not 1 <= least <= cohort_size:
    raise Error(
      f'privacy.least is {least}: it must be from 1 to clients.cohort_size='
      f'{cohort_size}.'
    )
  if not grid >= 1:
    raise Error(f'privacy.grid is {grid}: it must be at least 1.')
  return _planned(
    'distributed', turns, epsilon, noise_multiplier, delta,
    clip=clip, unit='client', accountant='rdp', least=least, grid=float(grid),
  )  # fmt: skip
