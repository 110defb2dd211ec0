"""Profiles of rounds: a trace for Perfetto and TensorBoard, and its longest
operations.

`--config.profile=ROUNDS` names the rounds of a run. The traces lie in the
workdir, `profile/plugins/profile/TIME/`:

    *.trace.json.gz   for https://ui.perfetto.dev and chrome://tracing
    *.xplane.pb       for TensorBoard with its profile plugin,
                      tensorboard --logdir WORKDIR/profile
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from fedjax_llm.types import Error

FOLDER = 'profile'
# Operations that contain others: counting both would count twice.
_OUTER = ('while', 'call', 'conditional', 'end: ')


class Operation(NamedTuple):
  """An operation of a trace: its name, calls, and seconds of all calls."""

  name: str
  calls: int
  seconds: float


class Profile(NamedTuple):
  """A summary of a trace.

  `operations` are the longest ones, the longest first; `busy` is the sum of
  the seconds of all operations, and `span` the seconds from the beginning of
  the first one to the end of the last one. With several streams or threads
  `busy` may exceed `span`.
  """

  operations: tuple[Operation, ...]
  busy: float
  span: float


def rounds(setting: int | Iterable[int] | None) -> frozenset[int]:
  """Returns the rounds, counted from 1, that the setting `profile` names.

  Raises:
    Error: a round is no whole number above 0.

  >>> sorted(rounds((3, 4))), sorted(rounds(2)), sorted(rounds(None))
  ([3, 4], [2], [])
  """
  if setting is None:
    return frozenset()
  several: Any = setting if isinstance(setting, list | tuple) else (setting,)
  for number in several:
    if type(number) is not int or number < 1:
      raise Error(
        f'profile is {setting!r}; it must be a round above 0, or a list of '
        'rounds.'
      )
  return frozenset(several)


@contextlib.contextmanager
def traced(folder: Any, number: int, wanted: bool = True) -> Iterator[None]:
  """Writes a trace of what is done inside to `folder`, as round `number`.

  Does nothing where `wanted` is False. Starting and writing a trace takes time
  of its own, so times of such a round are not comparable with others.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with traced(folder, 1):
  ...     pass
  ...   len(files(folder))
  1
  """
  if not wanted:
    yield
    return
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # calls of Python would fill the trace
  with jax.profiler.trace(str(folder), profiler_options=options):
    with jax.profiler.StepTraceAnnotation('round', step_num=number):
      yield


def files(folder: Any) -> list[pathlib.Path]:
  """Returns the `.xplane.pb` files below a folder, the oldest first."""
  return sorted(pathlib.Path(folder).glob('**/*.xplane.pb'))


def longest(file: Any, number: int = 5) -> Profile:
  """Returns the operations of a trace that took longest, summed by name.

  Args:
    file: a `.xplane.pb` file, read without any other package.
    number: of operations.
  """
  data = jax.profiler.ProfileData.from_file(str(file))
  seconds: dict[str, list[float]] = {}
  first, last = float('inf'), 0.0
  for name, begin, taken in _operations(data):
    sums = seconds.setdefault(name, [0, 0.0])
    sums[0] += 1
    sums[1] += taken
    first, last = min(first, begin), max(last, begin + taken)
  order = sorted(seconds.items(), key=lambda item: -item[1][1])
  return Profile(
    tuple(Operation(name, int(n), s) for name, (n, s) in order[:number]),
    sum(s for _, s in seconds.values()),
    max(last - first, 0.0),
  )


def lines(profile: Profile) -> list[str]:
  """Returns the summary as text.

  >>> print('\\n'.join(lines(Profile((Operation('gemm', 2, 0.5),), 1.0, 2.0))))
  operations took 1 s of 2 s; the longest:
     50.0 %       2 x  gemm
  """
  text = f'{profile.busy:.3g} s of {profile.span:.3g} s'
  rows = [f'operations took {text}; the longest:']
  for name, calls, seconds in profile.operations:
    share = 100 * seconds / (profile.busy or 1.0)
    rows.append(f'  {share:5.1f} % {calls:7d} x  {name[:60]}')
  return rows


def note(folder: Any) -> str:
  """Returns a text on the newest trace in a folder."""
  file = files(folder)[-1]
  places = f'{file.parent}: a trace for Perfetto and TensorBoard'
  return '\n'.join([places, *lines(longest(file))])


def _operations(data: Any) -> Iterator[tuple[str, float, float]]:
  """Yields name, beginning and seconds of the operations of all devices.

  On GPUs these are the kernels and copies of the streams, on TPUs the line of
  operations, on CPU the events of threads that name an operation.
  """
  planes = list(data.planes)
  devices = [p for p in planes if p.name.startswith('/device:')]
  for plane in devices or [p for p in planes if p.name == '/host:CPU']:
    for line in plane.lines:
      if devices and not line.name.startswith(('Stream', 'XLA Ops')):
        continue
      for event in line.events:
        if event.name.startswith(_OUTER):
          continue
        if not devices and not any(k == 'hlo_op' for k, _ in event.stats):
          continue
        yield event.name, event.start_ns / 1e9, event.duration_ns / 1e9
