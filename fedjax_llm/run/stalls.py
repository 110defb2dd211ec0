"""Rounds that have stopped: a thread notices them, and a sentence is printed.

`watched` is a context around the rounds of a run.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

SECONDS = 600.0  # without work before the sentence


@contextlib.contextmanager
def watched(
  write: Callable[[str], None],
  *,
  seconds: float = SECONDS,
  used: Callable[[], float] = time.process_time,
) -> Iterator[Callable[[int], None]]:
  """Writes a sentence where a round on a CPU does no work, once a round.

  A round stands still if the process uses less than a hundredth of `seconds` of
  processor time in `seconds` and begins no other round. On an accelerator the
  host may wait like that, so nothing is written there.

  Args:
    write: prints a line; called in another thread.
    seconds: the length of the time without work.
    used: returns the processor time of this process so far, in seconds.

  Yields:
    The function to call with the number of each round when it begins.

  >>> with watched(print) as begins:
  ...   begins(1)  # a round that ends soon
  """
  over, rounds = threading.Event(), [0]

  def watch() -> None:
    before, number, warned = used(), rounds[0], 0
    while not over.wait(seconds):
      now, last = used(), number
      idle, before, number = now - before < 0.01 * seconds, now, rounds[0]
      if idle and last == number != warned:
        warned = number
        write(sentence(number, seconds))

  def begins(number: int) -> None:
    rounds[0] = number

  if jax.default_backend() != 'cpu':
    yield begins
    return
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield begins
  finally:
    over.set()
    thread.join(1)


def sentence(number: int, seconds: float) -> str:
  """Returns the line about a round that stands still.

  >>> sentence(3, 600)[:51]
  'round 3 has not used the processor for 10 minutes: '
  """
  return (
    f'round {number} has not used the processor for {seconds / 60:.3g} '
    'minutes: on few cores two factorisations of stacks of matrices '
    '(jnp.linalg) can wait for each other for ever; those of fedjax_llm.linalg '
    'cannot. Ctrl-C twice ends the run, and the same command goes on from the '
    'last checkpoint.'
  )
