"""The numbers of a round that show how well a run uses its devices.

They are recorded under `time/` beside the seconds of the stations:

    time/share_of_peak   the share of the measured rate of matrix products
                         (`peaks`) in the seconds of the round's training
    time/memory          bytes in use on the first device; on a CPU the
                         resident memory of the process
    time/waiting         seconds in which no device worked because the host
                         read client states, made batches or saved a checkpoint
    time/checkpoint      seconds of the last checkpoint, of the round before
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm.run import costs, metrics, peaks

# A wait is named in the progress line from this share of the round on.
NAMED = 0.1


class Waits(NamedTuple):
  """Seconds in which the devices waited for the host, by what it did."""

  states: float = 0.0  # reading the clients' states
  batches: float = 0.0  # making the next cohort
  checkpoint: float = 0.0  # saving, after the round before


_TITLES = {
  'states': 'client states',
  'batches': 'batches',
  'checkpoint': 'the checkpoint',
}


class Pace(NamedTuple):
  """Functions of a run's pace.

  `watch(array)` starts to wait, in a thread, until the devices have computed an
  array; the returned function gives the time of `time.monotonic` at which they
  had. `measured(seconds, waits)` returns the fields above for a round with
  `seconds` of training.
  """

  watch: Callable[[Any], Callable[[], float]]
  measured: Callable[[float, Waits], dict[str, float]]


def of(
  program: Any,
  *,
  trips: int,
  rows: int = 1,
  rate: Callable[..., float | None] = peaks.known,
) -> Pace:
  """Returns the `Pace` of a run.

  Args:
    program: the closed jaxpr of a round.
    trips: the passes of loops of unknown length: the local steps.
    rows: device rows, over all processes, that train clients side by side;
      `program` counts the work of one.
    rate: operations per second of this process's devices by dtype, or None.
      It is asked once for each dtype, at the first round, and once more with
      `again=True` after a round that is faster than it: then the rate was
      measured on a busy machine. Other processes are assumed to have the same
      devices.
  """
  flops = {
    kind: done * rows
    for kind, done in costs.operations(program, trips=trips).items()
  }
  known: dict[Any, float | None] = {}
  again: dict[str, bool] = {}  # filled by a round that is faster than the rate

  def rate_of(dtype: Any) -> float:
    if dtype not in known:
      try:
        known[dtype] = rate(dtype, **again)
      except RuntimeError:  # no memory is left on the device
        known[dtype] = None
    here = known[dtype]
    if here is None:
      raise LookupError(dtype)
    return here * jax.process_count()

  def measured(seconds: float, waits: Waits) -> dict[str, float]:
    fields = {'time/waiting': sum(waits), 'time/checkpoint': waits.checkpoint}
    with contextlib.suppress(LookupError):
      share = peaks.share(flops, seconds, rate_of)
      if share > 1 and not again:
        again['again'] = True
        known.clear()
        share = peaks.share(flops, seconds, rate_of)
      fields['time/share_of_peak'] = share
    memory = peaks.memory()
    if memory is not None:
      fields['time/memory'] = memory
    return fields

  return Pace(watch, measured)


def watch(array: Any) -> Callable[[], float]:
  """Returns a function of the time at which the devices had computed an array.

  >>> done = watch(jax.numpy.ones(3) + 1)
  >>> done() <= time.monotonic()
  True
  """
  at: list[float] = []

  def wait() -> None:
    with contextlib.suppress(Exception):  # the round itself raises it
      jax.block_until_ready(array)
    at.append(time.monotonic())

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()

  def ended() -> float:
    thread.join()
    return at[0]

  return ended


def words(values: Mapping[str, Any], waits: Waits) -> list[str]:
  """Returns the parts of a progress line that describe the pace of a round.

  Args:
    values: the record of the round.
    waits: its waits. The longest one is named if it took a tenth of the round.

  >>> values = {'time/share_of_peak': 0.414, 'time/memory': 2_500_000_000}
  >>> values['time/total'] = 4.0
  >>> words(values, Waits(batches=1.0, checkpoint=0.5))
  ['41 % of peak', '2.50 GB', 'waited 1.0 s for batches']
  """
  parts = []
  if 'time/share_of_peak' in values:
    parts.append(f'{100 * values["time/share_of_peak"]:.0f} % of peak')
  if 'time/memory' in values:
    parts.append(metrics.human_bytes(values['time/memory']))
  name, longest = max(waits._asdict().items(), key=lambda item: item[1])
  whole = values.get('time/total', 0.0) + waits.checkpoint
  if longest >= NAMED * whole and longest >= 0.05:
    parts.append(f'waited {longest:.1f} s for {_TITLES[name]}')
  return parts
