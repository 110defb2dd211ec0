"""Checks of the settings of an optax optimizer and its schedule.

The functions raise an `Error`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.types import Error, known

# Settings of optax, by name: the least and the greatest value.
_SHARE, _NOT_NEGATIVE = (0.0, 1.0), (0.0, np.inf)
_RANGES = {
  **dict.fromkeys(
    (
      *('b1', 'b2', 'b3', 'beta', 'decay', 'decay_rate', 'momentum'),
      *('beta1', 'beta2', 'rho', 'ema_decay', 'preconditioner_decay'),
    ),
    _SHARE,
  ),
  **dict.fromkeys(
    (
      *('eps', 'eps_root', 'eps_in_sqrt', 'weight_decay', 'noise_scale'),
      *('weight_decay_rate', 'initial_accumulator_value', 'min_dim_size'),
      *('trust_coefficient', 'initial_scale', 'clipping_threshold'),
    ),
    _NOT_NEGATIVE,
  ),
}
_STEPS = (0, 1, 2, 10, 100, 1000, 10_000)


def check(settings: Mapping[str, Any], where: str) -> None:
  """Raises `Error` for a setting of optax outside its range.

  >>> check({'b1': 1.5}, 'local')
  Traceback (most recent call last):
  fedjax_llm.types.Error: local.b1 is 1.5, but must be a number from 0 to 1.
  """
  for name, value in settings.items():
    if name == 'mask' and isinstance(value, str | int | float):
      raise Error(
        f'{where}.mask is {value!r}, but must be none, a tree of booleans, or '
        'a function that returns one.'
      )
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    low, high = _RANGES.get(name, (-np.inf, np.inf))
    if np.isfinite(value) and low <= value <= high:
      continue
    allowed = 'finite'
    if low > -np.inf:
      allowed = 'a number of at least 0'
    if high < np.inf:
      allowed = f'a number from {low:g} to {high:g}'
    raise Error(f'{where}.{name} is {value}, but must be {allowed}.')


def check_rate(rate: Callable[[Any], Any], where: str) -> None:
  """Raises `Error` if a schedule is negative or not finite.

  It is checked at a few steps up to 10,000; traced numbers are not checked.

  >>> check_rate(lambda step: -0.1, 'local')
  Traceback (most recent call last):
  fedjax_llm.types.Error: local: the learning rate is -0.1 at step 0, but must \
be finite and not negative.
  """
  for step in _STEPS:
    try:
      value = rate(step)
      if not known(value):
        return
      value = float(value)
    except (TypeError, ValueError, ArithmeticError) as error:
      raise Error(f'{where}: {str(error).rstrip(".")}.') from error
    if not (np.isfinite(value) and value >= 0):
      raise Error(
        f'{where}: the learning rate is {value:g} at step {step}, but must be '
        'finite and not negative.'
      )


def check_runs(transform: optax.GradientTransformation, name: str) -> None:
  """Raises `Error` if an optimizer cannot take a step with its settings.

  Only shapes are computed.
  """
  leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)

  def step(grads, params):
    return transform.update(grads, transform.init(params), params)

  try:
    jax.eval_shape(step, {'w': leaf}, {'w': leaf})
  except (TypeError, ValueError, ArithmeticError) as error:
    text = str(error).splitlines()[0].rstrip('.')
    raise Error(f'local: {name} cannot be used like this: {text}.') from error
