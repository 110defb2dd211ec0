"""Runs programs that a model has written in processes of their own.

A process has limits of time and memory, an empty folder, and no environment or
input. That stops loops and accidents; it is no protection from a program that
means harm, which can still read files and use the network.
"""

import concurrent.futures
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fedjax_llm.types import Error

# Sets limits inside the new process, then runs the program from its input.
_RUNNER = """
import os, resource, sys
memory, seconds, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
source = sys.stdin.read()
try:
  exec(compile(source, 'program', 'exec'), {'__name__': '__main__'})
except MemoryError:
  os._exit(3)
os.write(2, word.encode())
os._exit(0)
"""


class Outcome(NamedTuple):
  """The end of a program: 'passed', 'failed', 'timed out' or 'out of memory'.

  `detail` is the last line of its errors.

  >>> Outcome('passed').detail
  ''
  """

  status: Literal['passed', 'failed', 'timed out', 'out of memory']
  detail: str = ''


def run(program: str, *, timeout: float = 5.0, memory_mb: int = 512) -> Outcome:
  """Runs a Python program; it passes if its last statement is done.

  Args:
    program: the source.
    timeout: seconds until the process and its children are killed.
    memory_mb: the address space of the process in units of 2^20 bytes.

  Raises:
    Error: a limit that is not positive, or a system without such limits.

  >>> run('assert 1 + 1 == 2', timeout=60).status
  'passed'
  >>> run('assert 1 + 1 == 3', timeout=60).status
  'failed'
  """
  if not timeout > 0 or memory_mb < 1:
    raise Error(
      f'{timeout=} and {memory_mb=}: both limits of a program must be positive.'
    )
  if os.name != 'posix':
    raise Error('programs are run with limits of POSIX systems only.')
  # Errors go to a file, which the limit of files bounds, and not to a pipe,
  # which a child of the program could keep open.
  with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
    limits = [str(memory_mb * 2**20), str(int(timeout) + 1)]
    # Written behind the last statement: a program that ends the process itself
    # has not passed, whatever its status.
    word = secrets.token_hex(16)
    process = subprocess.Popen(
      [sys.executable, '-I', '-c', _RUNNER, *limits, word],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=log,
      cwd=folder,
      env={},
      start_new_session=True,
    )
    try:
      process.communicate(program.encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
      return Outcome('timed out', f'after {timeout} seconds')
    finally:
      _end(process)
    log.seek(0)
    errors = log.read()
  if process.returncode == 0 and errors.endswith(word.encode()):
    return Outcome('passed')
  lines = errors.decode(errors='replace').strip().splitlines()
  detail = lines[-1][:200] if lines else ''
  if process.returncode == 3 and not detail:
    return Outcome('out of memory', f'more than {memory_mb} MB')
  if process.returncode == -signal.SIGXCPU:
    return Outcome('timed out', f'after {timeout} seconds')
  return Outcome('failed', detail)


def run_all(
  programs: Sequence[str],
  *,
  timeout: float = 5.0,
  memory_mb: int = 512,
  num_processes: int | None = None,
) -> list[Outcome]:
  """Runs programs, some at a time; the outcomes are in their order.

  `num_processes` is by default the number of processors.

  >>> [outcome.status for outcome in run_all(['x = 1', 'x ='], timeout=60)]
  ['passed', 'failed']
  """
  one = lambda program: run(program, timeout=timeout, memory_mb=memory_mb)
  workers = num_processes or os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(one, programs))


def _end(process: subprocess.Popen) -> None:
  """Kills a process with its children, and waits for it."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  for stream in (process.stdin, process.stdout, process.stderr):
    if stream is not None:
      stream.close()
