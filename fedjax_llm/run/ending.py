"""How a program ends: its exit status and the sentence of an error."""

import os
import tempfile
import traceback
from collections.abc import Callable

import jax

from fedjax_llm import _early
from fedjax_llm.devices import hosts
from fedjax_llm.run import signals
from fedjax_llm.run.signals import Stopped as Stopped
from fedjax_llm.run.signals import stoppable as stoppable
from fedjax_llm.types import Error


def status(program: Callable[[], None]) -> int:
  """Runs a program and returns its exit status.

  A mistake of the user (`Error`) is printed as one sentence. So is every other
  exception, with the path of a file that holds the traceback.
  """
  try:
    with stoppable():
      try:
        program()
        hosts.leave()
      except Exception as error:
        if signals.stopping():  # a library has turned `Stopped` into this error
          raise Stopped from error
        raise
    return _early.over(0)
  except Stopped:
    return hosts.end(f'stopped; {_early.GOES_ON}', _early.over(0))
  except KeyboardInterrupt:
    return hosts.end(f'\nstopped; {_early.GOES_ON}', _early.over(130))
  except Exception as error:
    return hosts.end(f'error: {_sentence(error)}', _early.over(1))


def _sentence(error: Exception) -> str:
  if isinstance(error, Error):
    return str(error)
  if isinstance(error, OSError):
    return f'{error.filename or "the system"}: {error.strerror or error}.'
  if isinstance(error, jax.errors.JaxRuntimeError):
    if 'RESOURCE_EXHAUSTED' in str(error):
      return 'out of memory: set block_size, or lower cohort.batch_size.'
    if hosts.several() and hosts.lost(error):
      return hosts.explained(error)
  words = ' '.join(str(error).split())
  short = words if len(words) <= 300 else f'{words[:300]} ...'
  return (
    f'{UNFORESEEN}, {type(error).__name__}: {short.rstrip(".")}. The traceback '
    f'is in {_log(error)}.'
  )


UNFORESEEN = 'this was not foreseen'  # begins messages that are not `Error`s


def _log(error: Exception) -> str:
  """Writes the traceback of an error into a new file; returns its path."""
  text = ''.join(traceback.format_exception(error))
  try:
    number, path = tempfile.mkstemp(prefix='fedjax_llm_', suffix='.log')
    with os.fdopen(number, 'w', encoding='utf-8', errors='replace') as file:
      file.write(text)
  except OSError as failed:
    return f'no file ({failed.strerror})'
  return path
