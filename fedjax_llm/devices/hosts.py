"""Several processes as one program: joining, messages and a common end.

Every process runs the same program on the devices of its machine. All of them
compute the rounds together; process 0 alone reads and writes the workdir,
evaluates the model and prints. Values that it reads reach the others as JSON
(`from_first`), through JAX's coordination service, or as arrays (`exchange`),
through the devices.

Every process reads all texts, since any of them may get any client, but makes
arrays only for its own clients and reads only the weights that lie on its own
devices. Processes that share a copy of the base (`sharding.num_sharing`) have
the same clients and evaluate the model together. Where all see the workdir
they may write checkpoints together (`checkpoint.Writers`).

A process that fails ends all of them: it writes a last message to the
coordination service, which every process polls a few times a second, and
process 0 prints it once.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from fedjax_llm.types import Error

_END, _STOP, _GONE = (f'fedjax_llm/{name}' for name in ('end', 'stop', 'gone'))
_LOOK = 0.2  # seconds between two polls for a last message

# State of this process, as the connection itself is.
_turns = itertools.count()
_leaving = threading.Event()


# --------------------------------------------------------- coming and going --


def join(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat: int = 100,
  patience: int = 300,
  bind: str | None = None,
) -> None:
  """Makes this process one of several; does nothing without a coordinator.

  Args:
    coordinator: 'address:port' of process 0, the same on all processes; or
      'auto' where JAX detects it (TPU pods, Slurm, Open MPI, Kubernetes).
    num_processes: the number of processes; not with 'auto'.
    process_id: the index of this process, from 0; not with 'auto'.
    heartbeat: seconds of silence after which a process counts as lost, and all
      others end.
    patience: seconds to wait for the others at the beginning.
    bind: 'address:port' on which process 0 listens, where it differs from the
      coordinator's (behind an address translation); not with 'auto'. Only this
      address is bound. Any program that reaches the port can join in the place
      of a process, read the messages between processes (the config, names of
      clients) and end the run: name an address of a private network.

  Raises:
    Error: a field is missing or out of range, no other process could be
      reached, or 'auto' on a system that JAX does not detect.
  """
  if coordinator is None:
    for field, value in (
      ('num_processes', num_processes),
      ('process_id', process_id),
      ('bind', bind),
    ):
      if value is not None:
        raise Error(
          f'hosts.{field} is {value}, but hosts.coordinator is missing: the '
          'address:port of process 0, or auto.'
        )
    return
  for field, value in (('heartbeat', heartbeat), ('patience', patience)):
    if value < 1:
      raise Error(f'hosts.{field} is {value}; it must be at least 1.')
  arguments: dict[str, Any] = {}
  if coordinator != 'auto':
    arguments = _explicit(coordinator, num_processes, process_id, bind)
  elif (num_processes, process_id, bind) != (None, None, None):
    raise Error(
      'hosts.coordinator=auto finds hosts.num_processes, hosts.process_id and '
      'hosts.bind by itself: leave them out.'
    )
  # Its SIGTERM would come before ours.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=patience,
      heartbeat_timeout_seconds=heartbeat,
    )
  except (ValueError, RuntimeError) as error:
    reason = ' '.join(str(error).split())[:200]
    if coordinator == 'auto' and isinstance(error, ValueError):
      reason = 'no TPU pod, Slurm, Open MPI or Kubernetes: give address:port'
    raise Error(
      f'hosts.coordinator={coordinator}: the processes did not find each other '
      f'({reason}).'
    ) from error
  if not first():
    # Only process 0 prints; errors and warnings of all still reach stderr.
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
  threading.Thread(target=_watch, daemon=True).start()


def _explicit(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  bind: str | None,
) -> dict[str, Any]:
  for field, address in (('coordinator', coordinator), ('bind', bind)):
    host, _, port = (address or coordinator).rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
      other = ', or auto' if field == 'coordinator' else ''
      raise Error(f'hosts.{field} is {address!r}: it is address:port{other}.')
  if num_processes is None or num_processes < 1:
    raise Error(
      f'hosts.num_processes is {num_processes}; with a coordinator it must be '
      'at least 1.'
    )
  if process_id is None or not 0 <= process_id < num_processes:
    raise Error(
      f'hosts.process_id is {process_id}; it must be one of 0 to '
      f'{num_processes - 1}.'
    )
  return {
    'coordinator_address': coordinator,
    # JAX by itself listens on all addresses of the machine.
    'coordinator_bind_address': bind or coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
    'cluster_detection_method': 'deactivate',
  }


def _group() -> Any:
  """Returns JAX's state of the group; its client is None for one process."""
  from jax._src import distributed

  return distributed.global_state


def _client() -> Any:
  return _group().client


def several() -> bool:
  """Returns True if `join` has made this process one of several."""
  return _client() is not None


def index() -> int:
  """Returns the index of this process, from 0."""
  return _group().process_id


def count() -> int:
  """Returns the number of processes."""
  return _group().num_processes


def first() -> bool:
  """Returns True on process 0, which reads, writes, evaluates and prints."""
  return index() == 0


def leave() -> None:
  """Ends the common work; returns when process 0 has called it too."""
  if several():
    from_first(lambda: None)
    _leaving.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
      jax.distributed.shutdown()


# ------------------------------------------------------------------ messages --


def from_first(ask: Callable[[], Any]) -> Any:
  """Returns the result of `ask()` on process 0, sent as JSON to the others.

  The other processes wait for it and do not call `ask`. Every process must make
  the same calls in the same order.

  >>> from_first(lambda: {'round': 3})
  {'round': 3}
  """
  if not several():
    return ask()
  client, turn = _client(), next(_turns)
  if first():
    text = json.dumps(ask())
    client.key_value_set(_said(turn), text)
    return json.loads(text)
  while True:
    try:
      return json.loads(client.blocking_key_value_get(_said(turn), 10_000))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def _said(turn: int) -> str:
  return f'fedjax_llm/said/{turn}'


def meet() -> None:
  """Returns when every process has called it.

  Collectives time out while a process is busy otherwise; this waits a day.
  """
  if several():
    turn = next(_turns)
    _client().wait_at_barrier(f'fedjax_llm/meet/{turn}', 1000 * 24 * 3600)


def agree(what: str, value: Any) -> None:
  """Raises an `Error` on a process where `value` differs from process 0's."""
  mine = json.dumps(value, sort_keys=True)
  if from_first(lambda: mine) != mine:
    raise Error(f'{what} must be the same as on process 0, but it is not.')


def anybody(asked: bool) -> bool:
  """Returns True on every process if `asked` is true on any of them."""
  if several() and asked and not first():
    _client().key_value_set(_STOP, '', allow_overwrite=True)
  meet()  # process 0 reads the flag after every process could set it
  return from_first(lambda: asked or (several() and _look(_STOP) is not None))


def _look(key: str) -> str | None:
  try:
    return _client().key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' in str(error):
      return None
    raise


# ------------------------------------------------------------------- the end --


def end(message: str, status: int) -> int:
  """Prints why the program ends and returns the exit status.

  One of several processes does not return: all of them end with this status,
  and process 0 prints the message of the process that failed.
  """
  if not several():
    _say(message, status)
    return status
  if not first():
    # An error that all processes meet is reported by process 0.
    time.sleep(1)
    if message.startswith('error: '):
      message = message.replace('error:', f'error: process {index()}:', 1)
  words = json.dumps({'message': message, 'status': status})
  try:
    _client().key_value_set(_END, words)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      _say(message, status)
      _exit(status)
  time.sleep(30)  # `_watch` ends this process
  _exit(status)


_LOST = (
  'another process was lost; the same command on all goes on from the last '
  'checkpoint'
)
_WORDS = ('gloo', 'nccl', 'connection', 'heartbeat', 'coordination', 'barrier')


def explained(error: Exception) -> str:
  """Returns a sentence about a runtime error in one of several processes.

  >>> explained(RuntimeError('Gloo all-reduce failed: read error'))[:24]
  'another process was lost'
  """
  reason = ' '.join(str(error).split())
  return f'{_LOST} ({reason[:80]} ...).'


def lost(error: Exception) -> bool:
  """Returns True if a runtime error means that another process has ended.

  >>> lost(RuntimeError('Gloo all-reduce failed: read error'))
  True
  """
  return any(word in str(error).lower() for word in _WORDS)


def _watch() -> None:
  """Polls for a last message until this process leaves."""
  misses = 0
  while not _leaving.wait(_LOOK):
    try:
      words = _look(_END)
      misses = 0
    except jax.errors.JaxRuntimeError:
      misses += 1
      if misses < 5 or _leaving.is_set():
        continue
      words = json.dumps({'message': f'error: {_LOST}.', 'status': 1})
    if words is not None:
      _obey(**json.loads(words), lost=misses > 0)


def _obey(message: str, status: int, lost: bool) -> None:
  if lost or first():
    _say(message, status)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    if lost:
      pass
    elif first():
      # The service ends with process 0, so the others must exit before it.
      deadline = time.monotonic() + 5
      others = count() - 1
      while time.monotonic() < deadline:
        if len(_client().key_value_dir_get(_GONE)) >= others:
          break
        time.sleep(0.05)
    else:
      _client().key_value_set(f'{_GONE}/{index()}', '')
  _exit(status)


def _say(message: str, status: int) -> None:
  file = sys.stderr if status else sys.stdout
  print(message, file=file, flush=True)


def _exit(status: int) -> NoReturn:
  for file in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      file.flush()
  os._exit(status)  # a collective may still wait for another process
