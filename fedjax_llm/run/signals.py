"""SIGTERM and Ctrl-C: the orderly end of a program.

The first signal ends the program in order: at once outside of rounds (`Stopped`
is raised), or after the round that is being computed (`stop_after_round`). A
second one ends it at once.

An exception from a signal handler can be lost: Python ignores exceptions inside
callbacks of the garbage collector and destructors, and JAX has such a callback.
So the signal is stored, and `Stopped` is raised again until the program has
left `stoppable`.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 2.0  # seconds until `Stopped` is raised once more
_SOON = 0.01  # the same after it was ignored


class Stopped(KeyboardInterrupt):
  """Raised by a signal outside of a round."""


class _Watch:
  """The state of signals inside one `stoppable`."""

  def __init__(self) -> None:
    self.asked = False
    self.waits = False  # a round is finished first


_watches: list[_Watch] = []  # the innermost is last


def _watch() -> _Watch | None:
  return _watches[-1] if _watches else None


def _heed(number: int, frame: Any) -> None:
  watch = _watch()
  if watch is None:
    return
  watch.asked = True
  for other in _SIGNALS:  # the second one ends the process
    signal.signal(other, signal.SIG_DFL)
  if not watch.waits:
    _raise_again(_AGAIN)
    raise Stopped


def _raise_again(seconds: float) -> None:
  if hasattr(signal, 'setitimer'):
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)


def _insist(number: int, frame: Any) -> None:
  watch = _watch()
  if watch is not None and watch.asked and not watch.waits:
    raise Stopped


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Makes SIGTERM and Ctrl-C raise `Stopped`, until `stop_after_round`.

  It does nothing outside of the main thread, which gets the signals.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  watch = _Watch()
  handlers: dict[Any, Any] = dict.fromkeys(_SIGNALS, _heed)
  if hasattr(signal, 'SIGALRM'):
    handlers[signal.SIGALRM] = _insist
  hook = sys.unraisablehook

  def ignored(unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, Stopped):
      _raise_again(_SOON)
    else:
      hook(unraisable)

  _watches.append(watch)
  sys.unraisablehook = ignored
  before = {one: signal.signal(one, new) for one, new in handlers.items()}
  try:
    with _second_ends(watch):
      yield
  finally:
    _raise_again(0.0)  # never
    for one, old in before.items():
      signal.signal(one, signal.SIG_DFL if old is None else old)
    sys.unraisablehook = hook
    _watches.pop()


@contextlib.contextmanager
def _second_ends(watch: _Watch) -> Iterator[None]:
  """Counts signals while the main thread cannot, such as during a compilation.

  Python runs a handler only between two of its own instructions; a thread can
  read the bytes that signals write into a socket at any time.
  """
  reader, writer = socket.socketpair()
  writer.setblocking(False)

  def count() -> None:
    came = 0
    while True:
      try:
        numbers = reader.recv(64)
      except OSError:
        return
      if not numbers or 0 in numbers:
        return
      for number in filter(_SIGNALS.__contains__, numbers):
        came += 1
        if came > 1:
          os._exit(128 + number)
        if watch.waits:
          print(
            'stopping after this round; a second signal stops at once',
            file=sys.stderr,
            flush=True,
          )

  before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=count, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    with contextlib.suppress(OSError):
      writer.send(b'\0')
    thread.join(1)
    reader.close()
    writer.close()


def stop_after_round() -> Callable[[], bool]:
  """Makes signals only set a flag from now on; returns the flag's reader."""
  watch = _watch()
  if watch is None:
    return lambda: False
  if watch.asked:  # and its exception was lost
    raise Stopped
  watch.waits = True
  return lambda: watch.asked


def heeded() -> None:
  """Marks the signal as handled: it is not raised again."""
  watch = _watch()
  if watch is not None:
    watch.asked = False
    _raise_again(0.0)


def stopping() -> bool:
  """Returns True after a signal that does not wait for a round."""
  watch = _watch()
  return watch is not None and watch.asked and not watch.waits
