"""The best round of a run by its evaluations, and early stopping.

    best(records)      the round with the lowest held-out loss
    judge(...)         the same during a run, with patience

Methods with personal models are judged by the mean loss of these models on
their clients' own texts ('evals/personal/own/client_mean'), all others by
'evals/heldout/loss'. A metric with 'accuracy' in its name is best where it is
highest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.types import Error

OWN, HELDOUT = 'evals/personal/own/client_mean', 'evals/heldout/loss'

Records = Sequence[Mapping[str, Any]]


def score(record: Mapping[str, Any], by: str | None = None) -> float | None:
  """Returns the metric to minimise of a record; None if it has none.

  >>> score({'evals/heldout/loss': 2.5}), score({'local/loss': 2.5})
  (2.5, None)
  >>> score({'evals/heldout/accuracy': 0.75}, 'heldout/accuracy')
  -0.75
  """
  name = f'evals/{by.removeprefix("evals/")}' if by else None
  if name is None:
    name = OWN if OWN in record else HELDOUT
  value = record.get(name)
  if not isinstance(value, int | float):
    return None
  return -value if 'accuracy' in name else value


def best(
  records: Records,
  by: str | None = None,
  rounds: Iterable[int] | None = None,
) -> int | None:
  """Returns the first round with the best metric; None without evaluations.

  Args:
    records: the records of the rounds, ascending.
    by: the name of the metric; None: the default of this module.
    rounds: the rounds to choose from; None: all.

  >>> loss = 'evals/heldout/loss'
  >>> best([{'round': 0, loss: 3.0}, {'round': 1, loss: 2.5}, {'round': 2}])
  1
  """
  among = None if rounds is None else set(rounds)
  scores = [
    (value, record['round'])
    for record in records
    if among is None or record['round'] in among
    if (value := score(record, by)) is not None
  ]
  return min(scores)[1] if scores else None


class Judge(NamedTuple):
  """Functions that follow the best round of a run.

  `note(round, metrics)` adds a round; `best()` returns the best one so far, or
  None; `over()` returns True when patience has run out.
  """

  note: Callable[[int, Mapping[str, Any]], None]
  best: Callable[[], int | None]
  over: Callable[[], bool]


def judge(
  records: Records = (),
  *,
  by: str | None = None,
  patience: int | None = None,
  keep: bool = False,
) -> Judge:
  """Returns a `Judge` of the rounds of a run, with those of earlier starts.

  Args:
    records: the records of the rounds that are done.
    by: the name of the metric, see `best`.
    patience: evaluations in a row without a better one before `over()` is True;
      None: any number.
    keep: True if the best round is kept, so that there must be one.

  Raises:
    Error: `patience` is below 1; from `note`: the evaluations lack that metric.

  >>> watch = judge(patience=1)
  >>> for number, loss in enumerate([3.0, 2.0, 2.0]):
  ...   watch.note(number, {'evals/heldout/loss': loss})
  >>> watch.best(), watch.over()
  (1, True)
  """
  if patience is not None and patience < 1:
    raise Error(f'evals.patience is {patience}; it must be at least 1.')
  scores: list[tuple[float, int]] = []

  def note(round: int, metrics: Mapping[str, Any]) -> None:
    value = score(metrics, by)
    names = [
      x.removeprefix('evals/') for x in metrics if x.startswith('evals/')
    ]
    tested = [x for x in names if isinstance(metrics[f'evals/{x}'], float)]
    wanted = by or (not tested and (keep or patience is not None))
    if value is None and names and round == 0 and wanted:
      field = f'evals.best_by={by}' if by else 'evals.patience and keep_best'
      known = ', '.join(sorted(tested)) or 'nothing'
      raise Error(f'{field}: the evaluations of this run tell {known}.')
    if value is not None and value == value:
      scores.append((value, round))

  def best_so_far() -> int | None:
    return min(scores)[1] if scores else None

  def over() -> bool:
    if patience is None or not scores:
      return False
    since = [number for _, number in scores].index(best_so_far() or 0)
    return len(scores) - 1 - since >= patience

  for record in records:
    note(record['round'], record)
  return Judge(note, best_so_far, over)
