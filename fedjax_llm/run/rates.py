"""The learning rates of a run, and servers whose rate follows a schedule."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.optimizers import build_schedule
from fedjax_llm.run import builders


def scheduled(builder: builders.Builder) -> builders.Builder:
  """Adds the keyword `schedule` to a builder of server optimizers.

  It is an optax schedule that replaces `learning_rate`; its steps are the
  rounds in which at least one client reported:
  dict(name='cosine_decay_schedule', init_value=1.0, decay_steps=100).

  >>> from fedjax_llm import server
  >>> falls = dict(name='linear_schedule', init_value=1.0, end_value=0.0)
  >>> sgd = scheduled(server.sgd)(schedule={**falls, 'transition_steps': 2})
  >>> delta, state = np.float32(-1), sgd.init(np.float32(0))
  >>> first, state = sgd.update(delta, state)
  >>> second, state = sgd.update(delta, state)
  >>> float(first), float(second)
  (1.0, 0.5)
  """

  @functools.wraps(builder)
  def built(
    *, schedule: Mapping[str, Any] | None = None, **keywords: Any
  ) -> Any:
    if schedule:
      keywords['learning_rate'] = build_schedule('server.schedule', schedule)
    return builder(**keywords)

  keyword = inspect.Parameter.KEYWORD_ONLY
  known = dict(builders.parameters(builder))
  known['schedule'] = inspect.Parameter(
    'schedule', keyword, default=None, annotation=Mapping[str, Any] | None
  )
  built.__signature__ = inspect.Signature(  # type: ignore
    [x.replace(kind=keyword) for x in known.values()]
  )
  return built


def num_steps(batches: Any, axis: int = 1) -> int:
  """Returns the number of steps S of batches [K, S, ...], or of another axis.

  >>> num_steps({'tokens': np.zeros((4, 3, 2))})
  3
  """
  return np.shape(jax.tree.leaves(batches)[0])[axis]


def of(
  optimizer: Any, server: Mapping[str, Any] | None
) -> Callable[[int, int], dict[str, float]]:
  """Returns the function that computes a round's learning rates.

  Args:
    optimizer: the local optimizer.
    server: the section of the server with its defaults, or None.

  Returns:
    `(round, num_steps) -> {'local/learning_rate': ...}`: the rate of the
    round's first local step, for rounds counted from 1 with `num_steps` steps
    each, and 'server/learning_rate'; an unknown rate is left out.

  >>> from fedjax_llm import local
  >>> metrics = of(local.optimizer('sgd', 0.5), {'name': 'sgd'})
  >>> metrics(1, 3)
  {'local/learning_rate': 0.5}
  """
  schedule = (server or {}).get('schedule')
  rate = (server or {}).get('learning_rate')
  served = build_schedule('server.schedule', schedule) if schedule else None

  def rates(round: int, num_steps: int) -> dict[str, float]:
    metrics = {}
    if isinstance(optimizer, LocalOptimizer):
      first = optimizer.learning_rate((round - 1) * num_steps)
      metrics['local/learning_rate'] = float(first)
    if served is not None:
      metrics['server/learning_rate'] = float(served(round - 1))
    elif isinstance(rate, int | float):
      metrics['server/learning_rate'] = float(rate)
    return metrics

  return rates
