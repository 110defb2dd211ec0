"""The evaluator of multiple choice by log-likelihood."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import data, local
from fedjax_llm.data import collate
from fedjax_llm.evals import choosing, intervals
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  own_models,
  personal,
  served_model,
  summary,
)
from fedjax_llm.types import Error, Evaluator, Example, FederatedAlgorithm


def choices(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  path: str,
  title: str = 'choices',
  question_key: str = 'question',
  choices_key: str = 'choices',
  answer_key: str = 'answer',
  client_key: str | None = None,
  template: str | None = None,
  joint: str = ' ',
  limit: int | None = None,
  batch_size: int = 16,
  private: bool = False,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of multiple choice by log-likelihood.

  It reports accuracy, accuracy_norm and ece: see `evals.choosing`.

  Args:
    path: a file of items (`evals.choosing.read`), with the fields `*_key`.
    title: the name of its metrics.
    template: the form of questions, as in `population`; None: as they are.
    joint: the text between a question and a choice.
    limit: the first items only.
    batch_size: texts computed at a time.
    private: filled in by the program: whether clients have models of their own,
      which are then evaluated on their own items, 'evals/{title}/personal/...'.
    num_resamples: of the bootstrap.

  Raises:
    Error: a file or field that does not fit; a network that is not causal.
  """
  check(title, num_resamples, limit=limit, batch_size=batch_size)
  check_writes(built, 'choices')
  items = choosing.read(
    path,
    question_key=question_key,
    choices_key=choices_key,
    answer_key=answer_key,
    client_key=client_key,
  )[:limit]
  tokenizer = built.tokenizer
  most = min(built.loaded.config.max_positions, 4096)
  rows: list[list[Example]] = []
  for item in items:
    if template is None:
      begin = data.tokenizers.start(tokenizer)
      rows.append(
        choosing.texts(
          *(item, tokenizer.encode),
          start=begin,
          joint=joint,
          max_length=most,
        )
      )
    else:
      rows.append(_in_form(item, tokenizer, template, most))
  score = likelihoods(built, [x for row in rows for x in row], batch_size)
  clients = [item.client for item in items]

  def scores(places: Sequence[int], base: Any, params: Any) -> intervals.Scores:
    flat = [example for i in places for example in rows[i]]
    values, split = score(flat, base, params), []
    for i in places:
      split.append(values[: len(rows[i])])
      values = values[len(rows[i]) :]
    return choosing.chosen([items[i] for i in places], split)

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del key
    everything = range(len(items))
    whole = scores(everything, *served_model(built, algorithm, base, params))
    metrics = summary(built, title, whole, clients, num_resamples)
    if private:
      own = own_models(built, algorithm, base, params, store)
      metrics |= personal(built, title, own, clients, scores, num_resamples)
    return metrics

  return evaluate


def _in_form(
  item: choosing.Item, tokenizer: Any, template: str, most: int
) -> list[Example]:
  """Returns the texts of an item in a template, a reply a choice."""
  result = []
  for choice in item.choices:
    record = data.Record(prompt=item.question, response=choice)
    examples = data.encode(record, tokenizer, template, most)
    if not examples:
      raise Error(f'the choice {choice[:40]!r} is longer than {most} tokens.')
    result.append(examples[0])
  return result


def likelihoods(
  built: Any, everything: Sequence[Example], batch_size: int
) -> Callable[..., np.ndarray]:
  """Returns a function of the log-likelihood of each text, [n] float64."""
  nats = jax.jit(local.causal_lm(built.loaded.model, per_row=True))
  build = lambda width: collate.texts(everything, width, built.tokenizer.pad_id)

  def score(examples: Sequence[Example], base: Any, params: Any) -> np.ndarray:
    order = np.argsort([len(x.tokens) for x in examples], kind='stable')
    values = np.zeros(len(examples))
    for first in range(0, len(order), batch_size):
      places = order[first : first + batch_size]
      longest = len(examples[places[-1]].tokens)
      width = 8 * 2 ** max(0, int(np.ceil(np.log2(longest / 8))))
      batch = [[examples[i]] for i in places]
      batch += [[]] * (batch_size - len(batch))
      key = jax.random.key(0)  # no dropout
      sums = nats(base, params, build(width)(batch), key)
      values[places] = -np.asarray(sums.total, np.float64)[: len(places)]
    return values

  return score
