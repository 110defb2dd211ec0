"""The plan of a private run: sampling, clip, noise and accountant in one.

`client_level` returns a `Plan`, the section `privacy` of a config.
"""

from typing import Any, NamedTuple

from scipy import stats

from fedjax_llm.privacy import accounting
from fedjax_llm.privacy.clipping import Adaptive, noisy_mean
from fedjax_llm.types import Error, StreamingAggregator

# What a run writes beside the noisy sums.
NOT_COVERED = (
  'losses, accuracies, norms and all other metrics of clients and of held-out '
  'texts; the choice of a round by them (evals.keep_best, evals.patience); '
  'parts that clients keep private, and what they say of them; samples of '
  'held-out texts; the numbers and names of clients. None of this is noised: '
  'it is not covered by the guarantee, and no reader of the adapter may get it.'
)
ASSUMED = (
  'The server is trusted. Neighbours differ in one client, whose updates are '
  'there or are zero; the number of clients is public. The seed stays secret: '
  'draws and noise follow from it. Noise is float32 from a generator that is '
  'not cryptographic.'
)


class Plan(NamedTuple):
  """The settings of client-level privacy, with the noise multiplier found.

  >>> plan = client_level(clip=1.0, noise_multiplier=2.0, delta=1e-5, rate=0.1,
  ...                     num_clients=50)
  >>> plan.denominator
  5.0
  """

  clip: float
  noise_multiplier: float
  delta: float
  budget: float | None  # epsilon that no round may pass
  rate: float  # q
  num_clients: int  # N
  num_rounds: int  # those of the budget, at most those of the config
  overflow: float  # the probability that a sample exceeds the rows
  accountant: str
  adaptive: Adaptive | None

  @property
  def denominator(self) -> float:
    """Returns q N, the expected number of clients a round."""
    return self.rate * self.num_clients

  def rule(self) -> StreamingAggregator:
    """Returns the rule of the run, `noisy_mean`."""
    return noisy_mean(
      self.clip, self.noise_multiplier, self.denominator, self.adaptive
    )

  def epsilon(self, num_rounds: int) -> float:
    """Returns epsilon after a number of rounds, at the plan's delta."""
    return accounting.epsilon(
      noise_multiplier=self.noise_multiplier,
      rate=self.rate,
      num_rounds=num_rounds,
      delta=self.delta,
      overflow=self.overflow,
      accountant=self.accountant,
    )

  def metrics(self, num_rounds: int) -> dict[str, float]:
    """Returns the metrics of the guarantee after a number of rounds."""
    return {'privacy/epsilon': self.epsilon(num_rounds)}

  def record(self) -> dict[str, Any]:
    """Returns the guarantee and its limits as JSON values."""
    fields = self._asdict()
    if self.adaptive is not None:
      fields['adaptive'] = self.adaptive._asdict()
    return {
      **fields,
      'epsilon': self.epsilon(self.num_rounds),
      'unit': 'client',
      'assumed': ASSUMED,
      'not covered by the guarantee': NOT_COVERED,
    }

  def check(self, state: Any) -> None:
    """Checks that a state goes on with the noise of this plan.

    Raises:
      Error: it has another noise multiplier.
    """
    check_noise(state, self.noise_multiplier)


def client_level(
  *,
  clip: float,
  delta: float,
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  accountant: str = 'rdp',
  adaptive: bool = False,
  quantile: float = 0.5,
  clip_rate: float = 0.2,
  count_noise: float | None = None,
  rate: float = 1.0,
  num_clients: int = 1,
  cohort_size: int | None = None,
  num_rounds: int = 1,
) -> Plan:
  """Returns the `Plan` of client-level central differential privacy.

  With `epsilon` alone the noise is found for all rounds. With
  `noise_multiplier` alone epsilon is what the accountant counts. With both the
  run ends before the round that would pass epsilon.

  Args:
    clip: C, the largest norm of a client's whole update (`noisy_mean`).
    delta: of the guarantee; below 1 / N at best.
    epsilon: the budget.
    noise_multiplier: z; the noise of the sum has the deviation z C.
    accountant: 'rdp' or 'pld' (`accounting.epsilon`).
    adaptive: move C towards a quantile of the norms (`noisy_mean`).
    quantile: gamma, with adaptive.
    clip_rate: eta, with adaptive.
    count_noise: sigma_b, with adaptive; None: q N / 20.
    rate: q, filled in by the program, as all below.
    num_clients: N.
    cohort_size: the rows of a cohort; None: N.
    num_rounds: T.

  Raises:
    Error: neither epsilon nor noise, a number out of range, a budget that no
      round keeps, or the package dp-accounting is not installed.

  >>> client_level(clip=1.0, delta=1e-5)
  Traceback (most recent call last):
  fedjax_llm.types.Error: privacy needs epsilon (its noise is then found), \
noise_multiplier (its epsilon is then counted), or both.
  """
  check_numbers(clip, delta, epsilon, noise_multiplier, accountant)
  accounting.package()  # before anything is read or computed
  rows = num_clients if cohort_size is None else cohort_size
  overflow = float(stats.binom.sf(rows, num_clients, rate))
  if noise_multiplier is None:
    assert epsilon is not None
    noise_multiplier = accounting.noise_multiplier(
      epsilon=epsilon,
      delta=delta,
      rate=rate,
      num_rounds=num_rounds,
      overflow=overflow,
      accountant=accountant,
    )
  moving = Adaptive(quantile, clip_rate, count_noise) if adaptive else None
  plan = Plan(
    clip=clip,
    noise_multiplier=noise_multiplier,
    delta=delta,
    budget=epsilon,
    rate=rate,
    num_clients=num_clients,
    num_rounds=num_rounds,
    overflow=overflow,
    accountant=accountant,
    adaptive=moving,
  )
  plan.rule()  # raises for numbers out of range
  return plan._replace(num_rounds=rounds_within(plan))


def check_numbers(
  clip: float,
  delta: float,
  epsilon: float | None,
  noise_multiplier: float | None,
  accountant: str,
) -> None:
  """Raises `Error` for fields of a plan that are out of range or missing.

  >>> check_numbers(1.0, 2.0, 8.0, None, 'pld')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: privacy.delta is 2.0: it must be above 0 and below 1.
  """
  if epsilon is None and noise_multiplier is None:
    raise Error(
      'privacy needs epsilon (its noise is then found), noise_multiplier (its '
      'epsilon is then counted), or both.'
    )
  if not 0 < delta < 1:
    raise Error(f'privacy.delta is {delta}: it must be above 0 and below 1.')
  for name, number in (
    ('clip', clip),
    ('epsilon', epsilon),
    ('noise_multiplier', noise_multiplier),
  ):
    if number is not None and not number > 0:
      raise Error(f'privacy.{name} is {number}: it must be above 0.')
  if accountant not in accounting.ACCOUNTANTS:
    raise Error(
      f'privacy.accountant is {accountant!r}: it must be one of '
      f'{", ".join(accounting.ACCOUNTANTS)}.'
    )


def check_noise(state: Any, noise_multiplier: float) -> None:
  """Raises `Error` if a rule's state has another noise multiplier.

  >>> check_noise(None, 1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this run has the noise multiplier None, and the \
section privacy leads to 1: keep num_rounds and the number of clients, or set \
privacy.noise_multiplier from the beginning.
  """
  has = getattr(state, 'noise_multiplier', None)
  has = None if has is None else float(has)
  if has is None or abs(has - noise_multiplier) > 1e-5 * max(has, 1e-5):
    raise Error(
      f'this run has the noise multiplier {has}, and the section privacy '
      f'leads to {noise_multiplier:.6g}: keep num_rounds and the number '
      'of clients, or set privacy.noise_multiplier from the beginning.'
    )


def rounds_within(plan: Any) -> int:
  """Returns the most rounds within the budget; all of them without one.

  >>> from types import SimpleNamespace
  >>> rounds_within(SimpleNamespace(
  ...   budget=3.5, num_rounds=9, epsilon=lambda rounds: 1.0 * rounds))
  3
  """
  if plan.budget is None or plan.epsilon(plan.num_rounds) <= plan.budget:
    return plan.num_rounds
  low, high = 0, plan.num_rounds
  while high - low > 1:
    middle = (low + high) // 2
    inside = plan.epsilon(middle) <= plan.budget
    low, high = (middle, high) if inside else (low, middle)
  if low == 0:
    raise Error(
      f'privacy.epsilon is {plan.budget:g}, and one round with '
      f'noise_multiplier={plan.noise_multiplier:g} has {plan.epsilon(1):.3g}: '
      'raise one of the two.'
    )
  return low
