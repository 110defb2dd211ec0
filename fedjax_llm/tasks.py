"""What a run learns: to write on, or to classify.

A task is named in the section `task` of a config; without one it is causal_lm.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fedjax_llm import local
from fedjax_llm.data.sources import Record
from fedjax_llm.models import LoadedModel
from fedjax_llm.types import Error, Loss

__all__ = ['causal_lm', 'classification']


class Task(NamedTuple):
  """What differs between tasks on the way from records to an adapter.

  `labels(records) -> ` the classes, None where nothing is classified;
  `check(loaded)` refuses a model that is made for another task;
  `loss(loaded, max_targets=, per_row=) -> Loss`; `head` names the modules that
  an adapter's file has to hold, and `peft_type` is PEFT's name of the task.
  """

  labels: Callable[[Sequence[Record]], tuple[str, ...] | None]
  check: Callable[[LoadedModel], None]
  loss: Callable[..., Loss]
  head: tuple[str, ...] = ()
  peft_type: str = 'CAUSAL_LM'


def causal_lm() -> Task:
  """Next-token prediction: `local.causal_lm`."""

  def check(loaded: LoadedModel) -> None:
    if not loaded.config.causal:
      raise Error(
        f'{loaded.name} is an encoder ({loaded.config.family}): its tokens see '
        'those that they would predict, so it cannot be trained to write, and '
        "masked words are not trained here; set task.name='classification'."
      )

  def loss(loaded: LoadedModel, *, max_targets: int, per_row: bool = False):
    return local.causal_lm(
      loaded.model, max_targets=max_targets, per_row=per_row
    )

  return Task(lambda records: None, check, loss)


def classification(labels: Sequence[str] | None = None) -> Task:
  """One label a text: `local.classification` on an encoder's classifier.

  Args:
    labels: the classes, in the order of a trained head; by default those that
      the records have, sorted (whole numbers by their size).
  """

  def found(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(labels) if labels is not None else label_names(records)

  def check(loaded: LoadedModel) -> None:
    if loaded.config.head != 'classifier':
      raise Error(
        f'{loaded.name} has no classifier: task.name=classification needs an '
        'encoder, model.name=pretrained or random_encoder.'
      )

  def loss(loaded: LoadedModel, *, max_targets: Any, per_row: bool = False):
    del max_targets  # of tokens
    return local.classification(loaded.model, per_row=per_row)

  return Task(found, check, loss, ('pooler', 'classifier'), 'SEQ_CLS')


def label_names(records: Sequence[Record]) -> tuple[str, ...]:
  """The labels that there are, sorted.

  >>> label_names([Record(label='10'), Record(label='9'), Record(label='9')])
  ('9', '10')

  Raises `Error` where a record has none, or there are fewer than two.
  """
  found = set()
  for record in records:
    if record.label is None:
      raise Error(
        f'{record.where or "record"}: this text has no label, so it cannot be '
        'classified; give the source a label_key.'
      )
    found.add(record.label)
  if len(found) < 2:
    raise Error(
      f'there is only one label, {", ".join(found) or "none"}: classification '
      'needs two or more.'
    )
  numbers = all(name.removeprefix('-').isdecimal() for name in found)
  return tuple(sorted(found, key=int if numbers else None))
