"""Tasks that learn from preferences: a chosen and a rejected reply a prompt.

Their records have `prompt` or `messages`, `chosen` and `rejected`
(`data.preferences`). Each task is a loss of `local.preference`; the reference
log-probabilities are computed once, before training (`with_references`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm import batching, data, local
from fedjax_llm.data import encoding
from fedjax_llm.data.collate import pairs
from fedjax_llm.data.sources import Record
from fedjax_llm.local.preference import Term
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import tasks
from fedjax_llm.types import (
  Error,
  Example,
  Loss,
  Pair,
  Params,
  Population,
)

__all__ = ['dpo', 'ipo', 'kto', 'orpo', 'simpo']


def dpo(beta: float = 0.1) -> tasks.Task:
  """Returns the task of direct preference optimisation: `local.dpo`.

  >>> dpo(beta=0.5).metrics.unit
  'pair'
  """
  return _task(local.dpo(beta))


def ipo(beta: float = 0.1) -> tasks.Task:
  """Returns the task of identity preference optimisation: `local.ipo`."""
  return _task(local.ipo(beta))


def kto(
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> tasks.Task:
  """Returns the task of Kahneman-Tversky optimisation: `local.kto`.

  The reply to another prompt, of which it needs one a pair, is the preferred
  reply of the client's next pair.
  """
  return _task(local.kto(beta, desirable_weight, undesirable_weight))


def orpo(beta: float = 0.1) -> tasks.Task:
  """Returns the task of odds-ratio preference optimisation: `local.orpo`."""
  return _task(local.orpo(beta))


def simpo(
  beta: float = 2.0, gamma: float = 1.0, nll: float = 0.0
) -> tasks.Task:
  """Returns the task of simple preference optimisation: `local.simpo`."""
  return _task(local.simpo(beta, gamma, nll))


def encode(record: Record, how: encoding.Encoding) -> data.Encoded:
  """Encodes a record with two replies as one `Pair`; the replies are learned.

  There is no pair if one of the replies is empty or too long.

  Raises:
    Error: a record without `chosen` and `rejected`.

  >>> from fedjax_llm.data import tokenizers
  >>> how = encoding.Encoding(tokenizers.bytes(), template='plain')
  >>> record = Record(prompt='2+2', chosen='4', rejected='five')
  >>> (pair,) = encode(record, how).examples
  >>> len(pair.chosen.tokens), int(pair.rejected.loss_mask.sum())
  (7, 5)
  """
  if record.chosen is None or record.rejected is None:
    missing = 'chosen' if record.chosen is None else 'rejected'
    raise Error(
      f'{record.where or "record"}: {missing} is missing: tasks of preferences '
      'need two replies to a prompt; data.name=preferences reads them.'
    )
  sides = [_side(record, x, how) for x in (record.chosen, record.rejected)]
  pair = [side.examples[-1] for side in sides if side.examples]
  counts = (sum(values) for values in zip(*(side[1:] for side in sides)))
  return data.Encoded([Pair(*pair)] if len(pair) == 2 else [], *counts)


def _side(record: Record, reply: str, how: encoding.Encoding) -> data.Encoded:
  """Encodes the prompt with one reply; only the last turn is learned."""
  whole = record._replace(response=reply, chosen=None, rejected=None)
  if record.messages is not None:
    earlier = tuple({**turn, 'weight': 0} for turn in record.messages)
    last = {'role': 'assistant', 'content': reply}
    whole = whole._replace(response=None, messages=(*earlier, last))
  return encoding.texts(whole, how)


def mismatched(
  own: Sequence[Pair], width: int, others: Sequence[Pair] = ()
) -> tuple[Pair, ...]:
  """Returns a client's pairs, each with the preferred reply of its next one.

  The last pair gets that of the first; a single pair gets that of the first of
  `others`, further pairs of the client. Texts are cut to `width` tokens.

  Raises:
    Error: a single pair, and no others.

  >>> text = lambda *tokens: Example(
  ...   np.array(tokens), np.arange(len(tokens)) > 0)
  >>> two = [Pair(text(i, i), text(i, 9)) for i in (1, 2)]
  >>> [pair.mismatched.tokens.tolist() for pair in mismatched(two, 8)]
  [[1, 2], [2, 1]]
  """
  order = list(own) if len(own) > 1 else [*own, *others[:1]]
  if own and len(order) == 1:
    raise Error(
      'task.name=kto compares a reply with that of another pair of its client, '
      'and a client has one pair: set population.min_examples=2.'
    )
  result = []
  for i, pair in enumerate(own):
    first, other = pair.chosen, order[(i + 1) % len(order)].chosen
    cut = int(np.argmax(first.loss_mask))
    reply = other.tokens[int(np.argmax(other.loss_mask)) :]
    tokens = np.concatenate([first.tokens[:cut], reply])[:width]
    learned = np.arange(len(tokens)) >= cut
    text = Example(tokens, learned)
    result.append(pair._replace(mismatched=text, reference_mismatched=0.0))
  return tuple(result)


def with_mismatched(
  loaded: LoadedModel, population: Population, *, start: Params | None = None
) -> Population:
  """Adds mismatched replies to pairs, and the references of all replies.

  Raises:
    Error: a client has a single pair in all.
  """
  people = population
  parts = (people.train, people.heldout, people.new)
  width = max(
    batching.length(pair) for part in parts for own in part for pair in own
  )
  none = [()] * len(people.new)
  train, heldout, new = (
    tuple(mismatched(own, width, others) for own, others in zip(*sides))
    for sides in (
      (people.train, people.heldout),
      (people.heldout, people.train),
      (people.new, none),
    )
  )
  population = people._replace(train=train, heldout=heldout, new=new)
  return tasks.with_references(loaded, population, start=start)


def _task(term: Term) -> tasks.Task:
  """Returns the task of a preference loss."""

  def check(loaded: LoadedModel) -> None:
    tasks.of_texts(loaded)
    if not loaded.config.causal:
      raise Error(
        f'{loaded.name} is an encoder ({loaded.config.family}): preferences '
        'are between replies, which only a causal network writes.'
      )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.preference(loaded.model, term, per_row=per_row)

  def example(length: int, vocab_size: int) -> Any:
    tokens = (np.arange(length) * 7919 % vocab_size).astype(np.int32)
    text = Example(tokens, np.arange(length) > 0)
    pair = Pair(text, text)
    return mismatched([pair] * 2, length)[0] if term.mismatched else pair

  prepare = with_mismatched if term.mismatched else tasks.with_references
  return tasks.Task(
    loss,
    encode=encode,
    collate=pairs,
    check=check,
    metrics=tasks.Measures('pair', accuracies=True),
    prepare=prepare if term.referenced else None,
    example=example,
    writes=True,
  )
