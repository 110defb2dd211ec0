"""The section `privacy` of a config: one mechanism, with all that it needs.

`section` returns the plan of a run, a `Plan` or a `Mechanism`.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from fedjax_llm.privacy import mechanisms, plan
from fedjax_llm.types import Error

MECHANISMS = {
  'central': plan.client_level,
  'correlated': mechanisms.correlated_level,
  'examples': mechanisms.example_level,
  'local': mechanisms.local_level,
  'distributed': mechanisms.distributed,
}


def section(
  *,
  clip: float,
  delta: float,
  mechanism: Literal[
    'central', 'correlated', 'examples', 'local', 'distributed'
  ] = 'central',
  epsilon: float | None = None,
  noise_multiplier: float | None = None,
  accountant: str = 'rdp',
  adaptive: bool = False,
  quantile: float = 0.5,
  clip_rate: float = 0.2,
  count_noise: float | None = None,
  bands: int | None = None,
  matrix: Literal['banded', 'blt', 'tree'] = 'banded',
  buffers: int = 3,
  example_rate: float | None = None,
  clipping: str = 'abadi',
  microbatch: int | None = None,
  least: int | None = None,
  grid: float = 2.0**14,
  rate: float = 1.0,
  num_clients: int = 1,
  cohort_size: int | None = None,
  num_rounds: int = 1,
  separation: int = 1,
  turns: Sequence[int] = (0, 1),
  batch_size: int = 1,
  num_steps: int = 1,
) -> Any:
  """Returns the plan of a mechanism by its name.

  Args:
    clip: the largest norm of a client's update, of an example's gradient with
      mechanism='examples'.
    delta: of the guarantee.
    mechanism: 'central' (`plan.client_level`), or one of `mechanisms`.
    epsilon: the budget; alone, the noise is found.
    noise_multiplier: z; alone, epsilon is counted.
    accountant: 'rdp' or 'pld'.
    adaptive, quantile, clip_rate, count_noise: of 'central'.
    bands, matrix, buffers: of 'correlated'.
    example_rate, clipping, microbatch: of 'examples'.
    least, grid: of 'distributed'.
    rate, num_clients, cohort_size, num_rounds, separation, turns,
      batch_size, num_steps: filled in by the program.

  Raises:
    Error: another mechanism, a field of another mechanism, or as the mechanism.

  >>> section(clip=1.0, delta=1e-5, noise_multiplier=1.0, bands=2)
  Traceback (most recent call last):
  fedjax_llm.types.Error: privacy.bands is 2, and mechanism='central' has no \
such field.
  """
  fields = locals()
  del fields['mechanism']
  if mechanism not in MECHANISMS:
    raise Error(
      f'privacy.mechanism is {mechanism!r}: it must be one of '
      f'{", ".join(MECHANISMS)}.'
    )
  build = MECHANISMS[mechanism]
  takes = inspect.signature(build).parameters
  defaults = inspect.signature(section).parameters
  for name in (
    *('accountant', 'adaptive', 'quantile', 'clip_rate', 'count_noise'),
    *('bands', 'matrix', 'buffers', 'example_rate', 'clipping', 'microbatch'),
    *('least', 'grid'),
  ):
    if name not in takes and fields[name] != defaults[name].default:
      raise Error(
        f'privacy.{name} is {fields[name]!r}, and mechanism={mechanism!r} has '
        'no such field.'
      )
  return build(**{k: v for k, v in fields.items() if k in takes})
