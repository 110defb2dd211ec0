"""Tasks: the loss of a run, and the path from records to batches.

The section `task` of a config names a task; the default is causal_lm. A user's
task is a builder `my_package.my_module:my_task` that returns a `Task`; no other
file needs a change.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import batching, local
from fedjax_llm.data import encoding
from fedjax_llm.data.collate import Collate, by_kind, pairs, texts
from fedjax_llm.data.sources import Record
from fedjax_llm.models import LoadedModel
from fedjax_llm.types import (
  Base,
  Error,
  Example,
  Loss,
  Pair,
  Pairs,
  Params,
  Population,
)

__all__ = ['causal_lm', 'classification']


class Measures(NamedTuple):
  """The names of a task's metrics, and whether accuracies are among them.

  >>> Measures('label', accuracies=True).unit
  'label'
  """

  unit: str = 'token'  # what `LossSum.count` counts, in the singular
  accuracies: bool = False  # the accuracy of each client is reported as well


def no_labels(records: Sequence[Record]) -> None:
  """Returns None: the `Task.labels` of tasks without classes."""
  del records


def of_texts(loaded: LoadedModel) -> None:
  """Raises `Error` for a network of images, in a task of texts.

  >>> from fedjax_llm import models
  >>> of_texts(models.random_vit())
  Traceback (most recent call last):
  fedjax_llm.types.Error: random-vit-0 reads images (vit), and this task is of \
texts: set task.name to image_classification, zero_shot or contrastive.
  """
  if loaded.config.reads_images:
    raise Error(
      f'{loaded.name} reads images ({loaded.config.family}), and this task is '
      'of texts: set task.name to image_classification, zero_shot or '
      'contrastive.'
    )


def any_model(loaded: LoadedModel) -> None:
  """Accepts every model: the default `Task.check`."""
  del loaded


class Task(NamedTuple):
  """The functions in which tasks differ, from records to an adapter's file.

  Records to examples:
    `labels(records) -> ` the classes, None without classification;
    `encode(record, Encoding) -> Encoded` makes the examples of one record, each
    an `Example`, `Pair`, `Image`, `ImageWithText` or a user's own pytree;
    `prepare(loaded, population) -> population` may add values of the model to
    the examples before training (reference log-probabilities); where it names
    `start`, it gets the adapter with which training starts.

  Examples to batches:
    `length(example) -> int` is the length by which examples are sorted,
    bucketed and packed, at least the tokens of the example's longest text; rows
    are padded to the longest;
    `collate(examples, width, pad_id) -> (rows -> batch)`: see `data.collate`.

  Batches to losses and metrics:
    `check(loaded)` raises `Error` for a model that is made for another task;
    `loss(loaded, per_row=) -> Loss`, one sum for each row with `per_row`;
    `metrics` names the unit that the loss counts.

  Further, `example(length, vocab_size) -> example` makes an artificial example
  with a loss on every token, from which `plan` gets the shapes of a batch;
  where it names `config`, it gets that of the network (the size of its images);
  `writes` is True if replies are generated from held-out texts; `head` names
  the modules that an adapter's file has to hold, and `peft_type` is PEFT's name
  of the task, None for one that PEFT has no name for. `scores` names the
  numbers that a network of this task gives a text, where they are no classes of
  the records. `beside(loaded) -> weights` by name stand beside those of the
  network in the base of a run.

  >>> Task(loss=lambda loaded, per_row=False: None).metrics.unit
  'token'
  """

  loss: Callable[..., Loss]
  encode: encoding.Encode = encoding.texts
  collate: Collate = by_kind
  length: Callable[[Any], int] = batching.length
  metrics: Measures = Measures()
  labels: Callable[[Sequence[Any]], tuple[str, ...] | None] = no_labels
  check: Callable[[LoadedModel], None] = any_model
  prepare: Callable[..., Population] | None = None
  example: Callable[..., Any] | None = None
  writes: bool = False
  head: tuple[str, ...] = ()
  peft_type: str | None = 'CAUSAL_LM'
  scores: tuple[str, ...] | None = None
  beside: Callable[[LoadedModel], Mapping[str, Base]] | None = None


def causal_lm() -> Task:
  """Returns the task of next-token prediction: `local.causal_lm` on texts."""

  def check(loaded: LoadedModel) -> None:
    of_texts(loaded)
    if not loaded.config.causal:
      raise Error(
        f'{loaded.name} is an encoder ({loaded.config.family}): its tokens see '
        'those that they would predict, so it cannot be trained to write, and '
        "masked words are not trained here; set task.name='classification'."
      )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.causal_lm(loaded.model, per_row=per_row)

  def example(length: int, vocab_size: int) -> Example:
    return Example(_tokens(length, vocab_size), np.arange(length) > 0)

  return Task(
    loss,
    encode=encoding.texts,
    collate=texts,
    check=check,
    example=example,
    writes=True,
  )


def classification(labels: Sequence[str] | None = None) -> Task:
  """Returns the task of one label a text: `local.classification`.

  An encoder reads the first token, a causal network the last one.

  Args:
    labels: the classes, in the order of a trained head; by default the labels
      of the records, sorted (whole numbers by size).
  """

  def classes(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(labels) if labels is not None else label_names(records)

  def check(loaded: LoadedModel) -> None:
    of_texts(loaded)
    if loaded.config.head not in ('classifier', 'score'):
      raise Error(
        f'{loaded.name} has no classifier: task.name=classification needs '
        'model.name=pretrained, random_encoder or random.'
      )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.classification(loaded.model, per_row=per_row)

  def example(length: int, vocab_size: int) -> Example:
    return Example(_tokens(length, vocab_size), np.zeros(length, bool), label=0)

  return Task(
    loss,
    encode=encoding.labelled,
    collate=texts,
    metrics=Measures('label', accuracies=True),
    labels=classes,
    check=check,
    example=example,
    head=('pooler', 'classifier', 'score'),
    peft_type='SEQ_CLS',
  )


def with_references(
  loaded: LoadedModel,
  population: Population,
  *,
  start: Params | None = None,
  batch_size: int = 8,
) -> Population:
  """Adds log-probabilities under the reference model to pairs, once a run.

      reference = log p(reply | prompt; base, start), in nats, of every reply

  The reference is the model with which training starts. The numbers stay those
  of that model where a method writes changes into its base.

  Args:
    loaded: the model, without an adapter.
    population: a population of pairs (`types.Pair`).
    start: the adapter with which training starts; None: no adapter.
    batch_size: pairs computed at a time.

  Returns:
    The population with every `reference_chosen` and `reference_rejected` set,
    and `reference_mismatched` of pairs with a mismatched reply.
  """
  parts = (population.train, population.heldout, population.new)
  everything = [pair for part in parts for own in part for pair in own]
  width = -(-max(map(batching.length, everything)) // 8) * 8
  build = pairs(everything, width)
  nats = local.causal_lm(loaded.model, per_row=True)
  sides = ('chosen', 'rejected', 'mismatched')

  @jax.jit
  def score(base: Base, start: Params, batch: Pairs) -> dict[str, jax.Array]:
    key = jax.random.key(0)  # no dropout
    texts = {side: getattr(batch, side) for side in sides}
    return {
      f'reference_{side}': -nats(base, start, text, key).total
      for side, text in texts.items()
      if text is not None
    }

  def scored(own: Sequence[Pair]) -> tuple[Pair, ...]:
    result: list[Pair] = []
    for first in range(0, len(own), batch_size):
      some = own[first : first + batch_size]
      rows = [[pair] for pair in some] + [[]] * (batch_size - len(some))
      values = score(loaded.base, start or {}, build(rows))
      values = {name: np.asarray(x) for name, x in values.items()}
      result += [
        pair._replace(**{name: float(x[i]) for name, x in values.items()})
        for i, pair in enumerate(some)
      ]
    return tuple(result)

  train, heldout, new = (tuple(map(scored, part)) for part in parts)
  return population._replace(train=train, heldout=heldout, new=new)


def _tokens(length: int, vocab_size: int) -> np.ndarray:
  """Returns token ids that are nearly all different, [T] int32."""
  return (np.arange(length) * 7919 % vocab_size).astype(np.int32)


def label_names(records: Sequence[Record]) -> tuple[str, ...]:
  """Returns the labels of the records, sorted.

  >>> label_names([Record(label='10'), Record(label='9'), Record(label='9')])
  ('9', '10')

  Raises `Error` where a record has none, or there are fewer than two.
  """
  labels = set()
  for record in records:
    if record.label is None:
      raise Error(
        f'{record.where or "record"}: this record has no label, so it cannot '
        'be classified; give the source a label_key.'
      )
    labels.add(record.label)
  if len(labels) < 2:
    raise Error(
      f'there is only one label, {", ".join(labels) or "none"}: classification '
      'needs two or more.'
    )
  numbers = all(name.removeprefix('-').isdecimal() for name in labels)
  return tuple(sorted(labels, key=int if numbers else None))
