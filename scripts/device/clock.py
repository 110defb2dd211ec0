"""The clock of all rounds, without jax."""

import statistics
import time
from collections.abc import Callable


def median(
  run: Callable[[], object], rounds: int = 5, seconds: float = 6.0
) -> float:
  """Returns the median seconds of some calls after a first one.

  Args:
    run: a call that returns when the device is done.
    rounds: the number of timed calls.
    seconds: after which no further call begins.
  """
  run()
  taken: list[float] = []
  while len(taken) < rounds and sum(taken) < seconds:
    began = time.perf_counter()
    run()
    taken.append(time.perf_counter() - began)
  return statistics.median(taken)
