"""The system of a federation: how fast each client computes and communicates.

`fleet` and `table` return a `System`, `duration` the seconds of a client's
round on it. Samplers with a clock (`clients.timed`) decide by these seconds
who arrives when. Nothing here is measured on this machine.
"""

import csv
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.clients.published import DEVICES, LINKS
from fedjax_llm.types import Error

__all__ = ['fleet', 'table']

_KINDS, _HOURS = 301, 302  # purposes of the random streams
DAY = 86400.0  # seconds


class System(NamedTuple):
  """The devices and links of N clients, one number each.

  >>> fleet(num_clients=2, devices=('phone',), links=('mobile',)).operations
  array([6.45e+11, 6.45e+11])
  """

  operations: np.ndarray  # [N] operations a second that the program reaches
  down: np.ndarray  # [N] bytes a second to the client
  up: np.ndarray  # [N] bytes a second from the client
  latency: np.ndarray  # [N] seconds of a round trip
  watts: np.ndarray  # [N] under load; NaN: not known
  # The part of a day in which a client is available: [N] hours.
  opens: np.ndarray
  hours: np.ndarray  # 24: always
  # [N] of the network for a byte in either direction; NaN: not known
  joules_per_byte: np.ndarray


class Job(NamedTuple):
  """One client's round, in numbers that its device and link turn to seconds.

  >>> Job(operations=2e9, down=4e6, up=4e6, num_steps=4).operations
  2000000000.0
  """

  operations: float  # of all its steps
  down: float  # bytes that it receives
  up: float  # bytes that it sends
  num_steps: int  # S


class Seconds(NamedTuple):
  """The parts of a client's round, in seconds; [N] each.

  >>> Seconds(np.ones(2), np.ones(2), np.ones(2)).total
  array([3., 3.])
  """

  down: np.ndarray  # half of the round trip included
  compute: np.ndarray
  up: np.ndarray  # half of the round trip included

  @property
  def total(self) -> np.ndarray:
    return self.down + self.compute + self.up


def energy(system: System, job: Job) -> np.ndarray:
  """Returns the joules of a job for every client, [N, 2]: device and network.

      watts operations / rate,  (down + up) joules per byte

  A device draws its watts while it computes; the network's figure counts bytes,
  not seconds. NaN where one is not known.

  >>> one = fleet(num_clients=1, devices=('h100',), links=('broadband',))
  >>> energy(one, Job(2.27e14, 5e8, 5e8, 1)).round(-2).tolist()
  [[400.0, 108000.0]]
  """
  device = system.watts * job.operations / system.operations
  return np.stack(
    [device, system.joules_per_byte * (job.down + job.up)], axis=-1
  )


def duration(system: System, job: Job) -> Seconds:
  """Returns the seconds of a job on the device and link of every client.

      latency / 2 + down / down rate,  operations / rate,  latency / 2 + up / up
      rate

  >>> one = fleet(num_clients=1, devices=('phone',), links=('mobile',))
  >>> parts = duration(one, Job(6.45e11, 4.495e6, 0.0, 1))
  >>> [round(float(x[0]), 2) for x in parts]
  [1.02, 1.0, 0.02]
  """
  half = system.latency / 2
  return Seconds(
    half + job.down / system.down,
    job.operations / system.operations,
    half + job.up / system.up,
  )


def fleet(
  *,
  num_clients: int,
  devices: Sequence[str] = ('phone', 'orin_nano', 'rtx_4090'),
  shares: Sequence[float] | None = None,
  links: Sequence[str] = ('mobile', 'broadband'),
  link_shares: Sequence[float] | None = None,
  utilisation: float = 0.3,
  spread: float = 0.0,
  hours: float = 24.0,
  joules_per_byte: float | None = None,
  seed: int = 0,
) -> System:
  """Returns a system of published devices and links, drawn by their shares.

  Args:
    num_clients: N.
    devices: names of `published.DEVICES`.
    shares: of the clients that have each device; equal if None.
    links: names of `published.LINKS`.
    link_shares: of the clients that have each link; equal if None.
    utilisation: the share of a device's peak that a client's program reaches.
    spread: sigma of a log-normal factor on each client's speed, the same in
      every round: devices of one kind differ by age, heat and other programs.
    hours: of every day in which a client is available, from an hour that is
      drawn for it; 24: always.
    joules_per_byte: electricity of the network for a byte, for all links; None:
      that of `published.LINKS`, for mobile networks and fixed broadband.
    seed: of the draw.

  Raises:
    Error: an unknown name, shares that do not fit, a number out of range.

  >>> system = fleet(num_clients=4, devices=('phone', 'h100'), seed=1)
  >>> sorted(set((system.operations / 0.3 / 1e12).tolist()))
  [2.15, 756.45]
  """
  for field, names, known in (
    ('devices', devices, DEVICES),
    ('links', links, LINKS),
  ):
    if not names or isinstance(names, str):
      raise Error(f'system.{field} is {names!r}: it is a list of names.')
    for name in names:
      if name not in known:
        raise Error(
          f'system.{field} has {name!r}: it takes {", ".join(sorted(known))}.'
        )
  if not 0 < utilisation <= 1:
    raise Error(
      f'system.utilisation is {utilisation}: it is above 0 and at most 1.'
    )
  if not (spread >= 0 and math.isfinite(spread)):
    raise Error(f'system.spread is {spread}: it is a number of at least 0.')
  if not 0 < hours <= 24:
    raise Error(f'system.hours is {hours}: it is above 0 and at most 24.')
  if joules_per_byte is not None and not 0 <= joules_per_byte < math.inf:
    raise Error(
      f'system.joules_per_byte is {joules_per_byte}: it is a number of at '
      'least 0, or None.'
    )
  if seed < 0:
    raise Error(f'seed is {seed}: it is a whole number of at least 0.')
  rng = np.random.default_rng((seed, _KINDS))
  of = _dealt('shares', devices, shares, num_clients, rng)
  on = _dealt('link_shares', links, link_shares, num_clients, rng)
  slower = np.exp(spread * rng.standard_normal(num_clients))

  def number(kinds, which, field):
    values = [getattr(kinds[name], field) for name in which]
    return np.array([np.nan if x is None else x for x in values], float)

  opens = np.random.default_rng((seed, _HOURS)).uniform(0, 24, num_clients)
  speed = number(DEVICES, [devices[i] for i in of], 'operations') * utilisation
  mine = [links[i] for i in on]
  return System(
    operations=speed / slower,
    down=number(LINKS, mine, 'down'),
    up=number(LINKS, mine, 'up'),
    latency=number(LINKS, mine, 'latency'),
    watts=number(DEVICES, [devices[i] for i in of], 'watts'),
    opens=opens,
    hours=np.full(num_clients, float(hours)),
    joules_per_byte=number(LINKS, mine, 'joules')
    if joules_per_byte is None
    else np.full(num_clients, float(joules_per_byte)),
  )


# The columns of a table of one's own, and the values where one is absent.
_COLUMNS = dict(
  operations=None, down=None, up=None, latency=0.0, watts=float('nan'),
  opens=0.0, hours=24.0, joules_per_byte=float('nan'),
)  # fmt: skip


def table(*, num_clients: int, path: str, seed: int = 0) -> System:
  """Returns the system of a CSV file of measured devices, one a line.

  The columns `operations` (a second, as reached), `down` and `up` (bytes a
  second) are needed; `latency` (seconds, 0), `watts`, `joules_per_byte` of the
  network, and `opens` and `hours` (the hour of a day from which the device is
  available, and for how many) are not. With fewer lines than clients each line
  serves several, drawn.

  Args:
    num_clients: N.
    path: of the file.
    seed: of the draw.

  Raises:
    Error: no such file, no line, a missing or an unknown column, a value that
      is not a number in range.

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile('w', suffix='.csv') as file:
  ...   _ = file.write('operations,down,up\\n2e12,1e6,5e5\\n')
  ...   file.flush()
  ...   table(num_clients=2, path=file.name).up
  array([500000., 500000.])
  """
  file = pathlib.Path(path)
  try:
    with file.open(newline='', encoding='utf-8') as lines:
      reader = csv.DictReader(lines)
      rows, names = list(reader), reader.fieldnames or ()
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise Error(
      f'system.path: {path} cannot be read as CSV: {error}.'
    ) from None
  unknown = [name for name in names if name not in _COLUMNS]
  missing = [k for k, v in _COLUMNS.items() if v is None and k not in names]
  if unknown or missing:
    raise Error(
      f'system.path: {path} has the columns {", ".join(map(str, names))}; it '
      'needs operations, down, up and may have latency, watts, opens, hours, '
      'joules_per_byte.'
    )
  if not rows:
    raise Error(f'system.path: {path} has no line with a device.')
  values = {
    name: np.array([_number(path, i, name, row) for i, row in enumerate(rows)])
    for name in _COLUMNS
  }
  rng = np.random.default_rng((seed, _KINDS))
  which = np.resize(np.arange(len(rows)), num_clients)
  which = which[rng.permutation(num_clients)]
  return System(**{name: column[which] for name, column in values.items()})


def _number(path: str, line: int, name: str, row: dict) -> float:
  text, absent = row.get(name), _COLUMNS[name]
  if text in (None, '') and absent is not None:
    return absent
  try:
    value = float(text or '')
  except ValueError:
    value = float('nan')
  most = 24.0 if name in ('opens', 'hours') else float('inf')
  least_is_fine = name in ('latency', 'opens', 'joules_per_byte')
  if not (0 <= value <= most and math.isfinite(value)) or (
    value == 0 and not least_is_fine
  ):
    raise Error(
      f'system.path: {path}, line {line + 2}: {name} is {text!r}; it is a '
      f'number {"of at least" if least_is_fine else "above"} 0'
      f'{" and at most 24" if most == 24 else ""}.'
    )
  return value


def _dealt(field, kinds, shares, num: int, rng) -> np.ndarray:
  """Returns the kind of each client; shares are met as nearly as N allows."""
  weight = np.ones(len(kinds)) if shares is None else np.asarray(shares, float)
  if weight.shape != (len(kinds),) or not (
    np.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0
  ):
    raise Error(
      f'system.{field} is {shares}: it takes one share of at least 0 for each '
      f'of the {len(kinds)} names.'
    )
  place = (rng.permutation(num) + 0.5) / num
  return np.searchsorted(np.cumsum(weight)[:-1] / weight.sum(), place, 'right')


def available(system: System, now: float) -> np.ndarray:
  """Returns True for every client that is available at a time in seconds.

  >>> system = fleet(num_clients=1)._replace(opens=np.array([22.0]),
  ...                                        hours=np.array([4.0]))
  >>> [bool(available(system, h * 3600)[0]) for h in (1, 3, 23, 46)]
  [True, False, True, True]
  """
  hour = now % DAY / 3600
  return (hour - system.opens) % 24 < system.hours


def wait(system: System, now: float) -> float:
  """Returns the seconds until some client is available, 0 if one is.

  >>> system = fleet(num_clients=1)._replace(opens=np.array([22.0]),
  ...                                        hours=np.array([4.0]))
  >>> wait(system, 3 * 3600) / 3600
  19.0
  """
  if available(system, now).any():
    return 0.0
  seconds = float(np.min((system.opens - now % DAY / 3600) % 24) * 3600)
  more = np.spacing(now + seconds)
  while not available(system, now + seconds).any():  # just before, by rounding
    seconds, more = seconds + float(more), 2 * more
  return seconds
