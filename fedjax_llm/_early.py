"""Signals before a program begins and after it is over.

Importing the package takes seconds. `python -m fedjax_llm.PROGRAM`, or the
command `fedjax_llm PROGRAM`, that is stopped meanwhile ends as it does later,
with a sentence and no traceback.
"""

import contextlib
import itertools
import os
import signal
import sys
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GOES_ON = 'the same command goes on from the last checkpoint'

_status: list[int] = []  # the exit status of a program that is over


def install() -> None:
  """Heeds signals from now on, if this process runs a program of ours.

  >>> install()  # in this process, which does not: nothing changes
  """
  words = sys.orig_argv
  ours = any(
    word == '-m' and name.split('.')[0] == 'fedjax_llm'
    for word, name in itertools.pairwise(words)
  )
  importing = sys.argv[:1] == ['-m']
  command = os.path.splitext(os.path.basename(sys.argv[0] or ''))[0]
  if (ours and importing) or command == 'fedjax_llm':
    for one in SIGNALS:
      signal.signal(one, _leave)


def over(status: int) -> int:
  """Notes the exit status of a program that has ended; returns it.

  >>> over(1)
  1
  """
  _status[:] = [status]
  return status


def _leave(number: int, frame: Any) -> None:
  if not _status:
    with contextlib.suppress(OSError, ValueError):
      print(f'stopped; {GOES_ON}', flush=True)
  os._exit(_status[0] if _status else 0)


install()
