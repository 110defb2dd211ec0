"""Stages of continual and multi-domain runs: which records belong to which.

A builder returns a `Plan`. Its `split` assigns a stage to every record; in the
rounds of a stage clients train on their examples of that stage.

    by_key     the values of a field, in an order: classes, topics, speakers
    by_date    periods of equal size, or a window that slides with the rounds
    domains    one source of data after another
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedjax_llm.data.drift import times
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

__all__ = ['by_date', 'by_key', 'domains']

Train = Literal['stage', 'seen', 'all']
_KEYS = ('label', 'client', 'date')


class Split(NamedTuple):
  """The stages of records; records of no stage are left out.

  >>> Split(('a',), [Record(text='hi')], np.array([0]), None).names
  ('a',)
  """

  names: tuple[str, ...]  # of the T stages
  records: list[Record]
  stage: np.ndarray  # [records] int, from 0
  when: np.ndarray | None  # [records] in [0, 1), their place in time; or None


class Plan(NamedTuple):
  """The stages of a run, before its records are read.

  `split` gets the records of the section `data`, and of each section of
  `sources`, as one list for each.
  """

  split: Callable[[Sequence[Sequence[Record]]], Split]
  rounds: int | tuple[int, ...]  # of each stage
  train: Train = 'stage'
  replay: int = 0
  window: float | None = None
  sources: tuple[Mapping[str, Any], ...] = ()


def by_key(
  rounds: int | Sequence[int],
  key: str = 'label',
  order: Sequence[str | Sequence[str]] | None = None,
  size: int = 1,
  train: Train = 'stage',
  replay: int = 0,
) -> Plan:
  """Returns stages by the values of a field, such as classes or topics.

  Stage i holds the records whose field has a value of `order[i]`. Without an
  order the sorted values are cut into stages of `size` values, which is
  class-incremental learning where the field is the class.

  Args:
    rounds: of each stage, or one number for all.
    key: 'label', 'client' or 'date', a field of the records.
    order: the values of each stage, one or several; records of other values
      are left out. None: all values.
    size: values a stage, without an order.
    train: the examples of a round: of its 'stage', of the stages 'seen' so
      far, or of 'all' stages (joint training).
    replay: examples of each earlier stage that a client also trains on, chosen
      once at random (experience replay, Rolnick et al. 2019, arXiv
      1811.11682; a memory of a fixed number of examples a task, Chaudhry et al.
      2019, arXiv 1902.10486).

  Raises:
    Error: an argument out of range; from `split`, a record without the field,
      a value that no record has or that is listed twice.

  >>> records = [Record(text=x, label=x) for x in 'abca']
  >>> split = by_key(2, order=('c', ('a', 'b'))).split([records])
  >>> split.names, split.stage.tolist()
  (('c', 'a+b'), [1, 1, 0, 1])
  """
  if key not in _KEYS:
    raise Error(f'stages.key is {key!r}: it is one of {", ".join(_KEYS)}.')
  if size < 1:
    raise Error(f'stages.size is {size}: it is at least 1.')

  def split(sources: Sequence[Sequence[Record]]) -> Split:
    records = [record for one in sources for record in one]
    values = [_value(record, key) for record in records]
    known = sorted(set(values))
    if order is None:
      groups = [known[i : i + size] for i in range(0, len(known), size)]
    else:
      one = lambda x: isinstance(x, str | int)
      groups = [[str(x)] if one(x) else list(map(str, x)) for x in order]
    stage: dict[str, int] = {}
    for i, group in enumerate(groups):
      for value in group:
        if value in stage:
          raise Error(f'stages.order names {value!r} twice.')
        if value not in known:
          some = ', '.join(known[:10]) + (', ...' if len(known) > 10 else '')
          raise Error(
            f'stages.order names {value!r}, which is the {key} of no record; '
            f'there are {some}.'
          )
        stage[value] = i
    kept = [i for i, value in enumerate(values) if value in stage]
    return Split(
      names=tuple('+'.join(group) for group in groups),
      records=[records[i] for i in kept],
      stage=np.array([stage[values[i]] for i in kept], int),
      when=None,
    )

  return Plan(split, *_checked(rounds, train, replay))


def by_date(
  rounds: int | Sequence[int],
  periods: int = 4,
  window: float | None = None,
  train: Train = 'stage',
  replay: int = 0,
) -> Plan:
  """Returns periods of time as stages, by `Record.date`.

  The records, sorted by date (as numbers where all are numbers, else as text),
  are cut into periods of equal size; records of one date stay together. With a
  `window` w the clients' data drift in every round instead of once a stage: in
  round r of R (from 0) a client trains on those of its examples whose place u
  in time, the share of records with an earlier date, lies in

      [a, a + w),   a = (1 - w) r / (R - 1)

  and the periods are those of the evaluation.

  Args:
    rounds: of each period, or one number for all.
    periods: T, the number of stages.
    window: w, above 0 and at most 1; None: no window.
    train, replay: as in `by_key`.

  Raises:
    Error: an argument out of range, a window with `train` or `replay`; from
      `split`, a record without a date, fewer dates than periods.

  >>> records = [Record(text=d, date=d) for d in ('2020', '2022', '2019')]
  >>> split = by_date(1, periods=3).split([records])
  >>> split.names, split.stage.tolist(), split.when.round(2).tolist()
  (('2019', '2020', '2022'), [1, 2, 0], [0.33, 0.67, 0.0])
  """
  if periods < 2:
    raise Error(f'stages.periods is {periods}: it is at least 2.')
  if window is not None and not 0 < window <= 1:
    raise Error(
      f'stages.window is {window}: it is a share above 0 and at most 1.'
    )
  if window is not None and (train != 'stage' or replay):
    raise Error(
      f'stages.window={window} sets the examples of each round: leave '
      'stages.train and stages.replay out.'
    )

  def split(sources: Sequence[Sequence[Record]]) -> Split:
    records = [record for one in sources for record in one]
    dates = [_value(record, 'date') for record in records]
    keys = times(dates)
    earlier, before, counts = {}, 0, collections.Counter(keys)
    for key in sorted(counts):
      earlier[key] = before
      before += counts[key]
    when = np.array([earlier[key] for key in keys]) / max(len(records), 1)
    stage = np.floor(when * periods + 1e-9).astype(int)
    names = []
    for period in range(periods):
      inside = [i for i in range(len(records)) if stage[i] == period]
      if not inside:
        raise Error(
          f'stages.periods is {periods}: no record begins period {period + 1}, '
          f'as there are {len(earlier)} different dates of {len(records)} '
          'records.'
        )
      first = dates[min(inside, key=lambda i: keys[i])]
      last = dates[max(inside, key=lambda i: keys[i])]
      names.append(first if first == last else f'{first} to {last}')
    return Split(tuple(names), records, stage, when)

  return Plan(split, *_checked(rounds, train, replay), window)


def domains(
  rounds: int | Sequence[int],
  then: Sequence[Mapping[str, Any]],
  names: Sequence[str] | None = None,
  train: Train = 'stage',
  replay: int = 0,
) -> Plan:
  """Returns one source of data after another as stages.

  The first stage is the section `data`, the others are sections like it.

  Args:
    rounds: of each stage, or one number for all.
    then: sections of data, `dict(name=..., path=...)`.
    names: of all stages; None: domain1, domain2, ...
    train, replay: as in `by_key`.

  Raises:
    Error: an argument out of range, no further source, another number of names.

  >>> plan = domains(1, then=[{'name': 'packaged'}], names=('a', 'b'))
  >>> split = plan.split([[Record(text='x')], [Record(text='y')]])
  >>> split.names, split.stage.tolist()
  (('a', 'b'), [0, 1])
  """
  total = len(then) + 1
  if total < 2:
    raise Error('stages.then is empty: a second source of data is missing.')
  called = tuple(names or [f'domain{i + 1}' for i in range(total)])
  if len(called) != total or len(set(called)) != total:
    raise Error(
      f'stages.names is {tuple(called)}: {total} different names are needed, '
      'one for data and one for each section of stages.then.'
    )

  def split(sources: Sequence[Sequence[Record]]) -> Split:
    sizes = [len(one) for one in sources]
    return Split(
      names=called,
      records=[record for one in sources for record in one],
      stage=np.repeat(np.arange(total), sizes),
      when=None,
    )

  plan = Plan(split, *_checked(rounds, train, replay))
  return plan._replace(sources=tuple(dict(section) for section in then))


def _value(record: Record, key: str) -> str:
  value = getattr(record, key)
  if value is None:
    raise Error(
      f'{record.where or "record"}: stages need the {key} of each record; give '
      f'the source a {key}_key.'
    )
  return str(value)


def _checked(
  rounds: int | Sequence[int], train: str, replay: int
) -> tuple[Any, Any, int]:
  each = rounds if isinstance(rounds, int) else tuple(rounds)
  some = (each,) if isinstance(each, int) else each
  if not some or any(not isinstance(n, int) or n < 1 for n in some):
    raise Error(
      f'stages.rounds is {rounds!r}: every stage has at least 1 round.'
    )
  if train not in ('stage', 'seen', 'all'):
    raise Error(f'stages.train is {train!r}: it is one of stage, seen, all.')
  if replay < 0:
    raise Error(f'stages.replay is {replay}: it is at least 0.')
  if replay and train != 'stage':
    raise Error(
      f'stages.replay={replay} adds examples of earlier stages, which '
      f'stages.train={train} holds already: leave one of them out.'
    )
  return each, train, replay
