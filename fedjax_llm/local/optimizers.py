"""Local optimizers: any of optax by its name, with a schedule over the run.

`optimizer` and `lora_plus` return a `LocalOptimizer`, `build_schedule` an optax
schedule.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.local import ranges
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error, Gradient, known


class LocalOptimizer(NamedTuple):
  """An optax optimizer with its name, settings and learning rate a step.

  `update(grads, state, params, step) -> (updates, state)` where step counts
  over the whole run: round * S + s.

  >>> adam = optimizer('adamw', 1e-3, weight_decay=0.1)
  >>> adam.name, adam.keywords, float(adam.learning_rate(0))
  ('adamw', {'weight_decay': 0.1}, 0.001)
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
  learning_rate: Callable[[Any], Any]
  name: str
  keywords: Mapping[str, Any]
  differentiable: bool = False  # local training then has a gradient
  clip_norm: float | None = None  # of a step's gradient over the whole tree
  # Of example-level privacy (`local.per_example`): the gradient of a step, and
  # a function called at the beginning of every descent.
  gradient: Gradient | None = None
  begins: Callable[[], None] = lambda: None


def names() -> tuple[str, ...]:
  """Returns the names of the optax optimizers that take a learning rate.

  `lbfgs` is left out because it needs more than gradients, `noisy_sgd` because
  its noise would be the same for every client.
  """
  return tuple(
    name
    for name in dir(optax)
    if not name.startswith(('_', 'scale_by_'))
    and name not in ('lbfgs', 'noisy_sgd')
    and inspect.isfunction(getattr(optax, name))
    and 'learning_rate' in inspect.signature(getattr(optax, name)).parameters
  )


def schedule_names() -> tuple[str, ...]:
  """Returns the names of the schedules of optax."""
  return tuple(
    name
    for name in dir(optax)
    if name.endswith('_schedule') and inspect.isfunction(getattr(optax, name))
  )


def build_schedule(
  field: str, schedule: Mapping[str, Any]
) -> Callable[[Any], Any]:
  """Returns a schedule of optax by its name: count -> rate.

  Args:
    field: the config's field, for error messages.
    schedule: `name`, and the keywords of that schedule.

  Raises:
    Error: an unknown name or keyword, or a value that the schedule refuses.

  >>> linear = dict(name='linear_schedule', init_value=1.0, end_value=0.0)
  >>> rate = build_schedule('x', {**linear, 'transition_steps': 4})
  >>> float(rate(3))
  0.25
  """
  settings = dict(schedule)
  name = settings.pop('name', None)
  builder = _lookup(f'{field}.name', name, schedule_names())
  _check(field, str(name), builder, settings)
  try:
    return builder(**settings)
  except (TypeError, ValueError, ArithmeticError) as error:
    raise Error(f'{field}: {str(error).rstrip(".")}.') from error


def optimizer(
  name: str = 'adamw',
  learning_rate: float = 1e-3,
  schedule: Mapping[str, Any] | None = None,
  b_ratio: float = 1.0,
  differentiable: bool = False,
  clip_norm: float | None = None,
  **keywords: Any,
) -> LocalOptimizer:
  """Returns an optax optimizer by name, with its own `keywords`.

  Args:
    name: e.g. 'sgd', 'adamw', 'lion' (`names()` lists them).
    learning_rate: the constant rate; ignored if there is a schedule.
    schedule: `dict(name='cosine_decay_schedule', init_value=1e-3,
      decay_steps=100)`: an optax schedule of the step over the whole run,
      round * S + s, though the optimizer's moments start afresh each round.
    b_ratio: how many times faster the factors b learn: see `lora_plus`.
    differentiable: training can be differentiated in reverse (`jax.grad`
      through a round, see `differentiable.rounds`). All S steps are then
      computed, those of padding too, and the backward pass computes steps again
      instead of storing them. The outcome is the same.
    clip_norm: a step's gradient over all trained leaves is scaled down to this
      norm where it is longer; penalties and corrections come after.

  Raises:
    Error: an unknown optimizer, schedule or keyword; a ratio or clip_norm
      that is not positive; `differentiable` without `eps_root` where the
      optimizer takes one: it divides by the root of squared gradients, which
      has no gradient where these are zero, as those of LoRA's a are at first.

  >>> sgd = optimizer('sgd', 0.5)
  >>> state = sgd.init({'w': jnp.ones(2)})
  >>> sgd.update({'w': jnp.ones(2)}, state, {'w': jnp.ones(2)}, 0)[0]
  {'w': Array([-0.5, -0.5], dtype=float32)}
  """
  if clip_norm is not None and known(clip_norm) and not clip_norm > 0:
    raise Error(f'local.clip_norm is {clip_norm}; it must be above 0.')
  build = _lookup('local.name', name, names())
  _check('local', name, build, keywords)
  rate = optax.constant_schedule(learning_rate)
  if schedule:
    rate = build_schedule('local.schedule', schedule)
  ranges.check_rate(rate, 'local.schedule' if schedule else 'local')
  ranges.check(keywords, 'local')
  roots = 'eps_root' in inspect.signature(build).parameters
  if differentiable and roots and not keywords.get('eps_root'):
    raise Error(
      f'local.differentiable: {name} has no gradient where the gradient of a '
      'step is zero; set local.eps_root above 0, such as 1e-12.'
    )

  # The rate is a field of the state: any optimizer then follows our step count
  # instead of its own, which starts afresh in every round. The other settings
  # stay Python numbers: several optimizers branch on them in Python.
  others = set(inspect.signature(build).parameters) - {'learning_rate'}
  try:
    inner = optax.inject_hyperparams(build, static_args=others)(
      learning_rate=learning_rate, **keywords
    )
  except TypeError as error:
    raise Error(f'local: {error}.') from error

  def update(grads, state, params, step):
    value = jnp.asarray(rate(step), jnp.float32)
    state = state._replace(
      hyperparams={**state.hyperparams, 'learning_rate': value}
    )
    return inner.update(grads, state, params)

  ranges.check_runs(inner, name)
  built = LocalOptimizer(
    inner.init, update, rate, name, keywords, differentiable, clip_norm
  )
  plain = known(b_ratio) and b_ratio == 1
  return built if plain else lora_plus(built, b_ratio)


def lora_plus(optimizer: LocalOptimizer, ratio: float = 16.0) -> LocalOptimizer:
  """Returns LoRA+: the factors b of adapters learn faster than the factors a.

      eta_b = ratio * eta_a

  Hayou et al. 2024, arXiv 2402.12354, which starts its search at 2^4. b is the
  factor that starts at zero, "B" in papers. The steps of b are multiplied,
  weight decay included: for an optimizer with steps proportional to its rate,
  this is a learning rate of their own. A ratio of one is LoRA.

  Raises:
    Error: a ratio that is not positive; from the first step, parameters without
      low-rank factors.

  >>> faster = lora_plus(optimizer('sgd', 0.5), ratio=4.0)
  >>> grads = LowRank(jnp.ones(1), jnp.ones(1), None)
  >>> step, _ = faster.update(grads, faster.init(grads), grads, 0)
  >>> step.a.tolist(), step.b.tolist()
  ([-0.5], [-2.0])
  """
  if known(ratio) and ratio <= 0:
    raise Error(f'local.b_ratio is {ratio}; it must be above 0.')
  is_node = lambda x: isinstance(x, LowRank)

  def update(grads, state, params, step):
    updates, state = optimizer.update(grads, state, params, step)
    leaves = jax.tree.leaves(updates, is_leaf=is_node)
    if not any(map(is_node, leaves)):
      raise Error(
        'local.b_ratio needs low-rank factors: adapter.name=lora, or leave it '
        'out.'
      )
    faster = lambda x: None if x.b is None else (x.b * ratio).astype(x.b.dtype)
    return jax.tree.map(
      lambda x: x._replace(b=faster(x)) if is_node(x) else x,
      updates,
      is_leaf=is_node,
    ), state

  return optimizer._replace(
    update=update, keywords={**optimizer.keywords, 'b_ratio': ratio}
  )


def _lookup(field: str, name: Any, known: tuple[str, ...]) -> Callable:
  if name not in known:
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise Error(
      f'{field}: {name!r} is unknown.{hint} There are: {", ".join(known)}.'
    )
  return getattr(optax, name)


def _check(field: str, name: str, build: Callable, keywords: Mapping) -> None:
  """Raises `Error` for a keyword that the optax function does not have."""
  allowed = [
    p for p in inspect.signature(build).parameters if p != 'learning_rate'
  ]
  for key in keywords:
    if key not in allowed:
      near = difflib.get_close_matches(key, allowed, 1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise Error(
        f'{field}.{key}: {name} has no such argument.{hint} It takes: '
        f'{", ".join(allowed)}.'
      )
