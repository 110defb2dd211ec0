"""Evaluators of tasks: choices, generated replies, classes and programs.

Each is named in `evals.evaluators` of a config and reports 'evals/{title}/...'
with bootstrap intervals over examples and values of clients
(`evals.intervals`). Examples are the run's held-out ones, of clients that train
('seen') and of new clients ('unseen'), or those of a file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import data, local, models, tree
from fedjax_llm.data import collate
from fedjax_llm.evals import (
  agreement,
  answers,
  choosing,
  intervals,
  overlap,
  programs,
)
from fedjax_llm.run.ends import ends
from fedjax_llm.types import Error, Evaluator, Example, FederatedAlgorithm

__all__ = ['choices', 'classes', 'code', 'generated']


class Asked(NamedTuple):
  """A prompt in tokens, the reply of its record, and its client."""

  prompt: list[int]
  reference: str
  client: str | None


def _served(
  built: Any, algorithm: FederatedAlgorithm, base: Any, params: Any
) -> tuple[Any, Any]:
  """Returns the base and parameters that are served, with changes folded in."""
  return built.adapter.fold(base, algorithm.personal(params, None))


def _own(
  built: Any, algorithm: FederatedAlgorithm, base: Any, params: Any, store: Any
) -> Mapping[str, Callable[[], tuple[Any, Any]]]:
  """Returns builders of the models of clients that have trained, by name."""

  def model(place: int) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
      state = tree.take(store.gather([place]), 0)
      state = jax.tree.map(jnp.asarray, state)
      return built.adapter.fold(base, algorithm.personal(params, state))

    return make

  return {built.population.names[i]: model(i) for i in store.seen()}


def _groups(built: Any, clients: Sequence[str | None]) -> dict[str, np.ndarray]:
  """Returns the places of examples by group: seen, unseen, or all together."""
  people = built.population
  fresh = np.array([c is not None and c in people.new_names for c in clients])
  known = np.array([c is not None and c in people.names for c in clients])
  if not fresh.any():
    return {'': np.arange(len(clients))}
  groups = {'seen/': known, 'unseen/': fresh, 'others/': ~(fresh | known)}
  return {k: np.flatnonzero(x) for k, x in groups.items() if x.any()}


def _told(
  built: Any,
  title: str,
  scores: intervals.Scores,
  clients: Sequence[str | None],
  num_resamples: int,
) -> dict[str, Any]:
  """Returns the metrics of each group of examples."""
  people = built.population
  names, owners = choosing.owners(clients, people.names, people.new_names)
  metrics: dict[str, Any] = {}
  for group, places in _groups(built, clients).items():
    part = scores._replace(statistics=scores.statistics[places])
    metrics |= intervals.summarised(
      f'{title}/{group}'.rstrip('/'),
      part,
      owners[places],
      names,
      num_resamples=num_resamples,
      seed=built.settings.seed,
    )
  return metrics


def _check(title: str, num_resamples: int, **least: int | None) -> None:
  if not title or '/' in title:
    raise Error(f'evals.evaluators: title is {title!r}; it must be a word.')
  for name, value in {'num_resamples': num_resamples, **least}.items():
    if value is not None and value < 1:
      raise Error(f'evals.evaluators: {name} is {value}; it must be above 0.')


def _writes(built: Any, name: str) -> None:
  if not built.task.writes or not built.loaded.config.writes:
    raise Error(
      f'evals.evaluators: {name} needs a task with a causal network that '
      f'writes replies; {built.loaded.name} of this config does not.'
    )


# ----------------------------------------------------------------- choices --


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
  _check(title, num_resamples, limit=limit, batch_size=batch_size)
  _writes(built, 'choices')
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
  score = _likelihoods(built, [x for row in rows for x in row], batch_size)
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
    whole = scores(everything, *_served(built, algorithm, base, params))
    metrics = _told(built, title, whole, clients, num_resamples)
    if private:
      own = _own(built, algorithm, base, params, store)
      metrics |= _personal(built, title, own, clients, scores, num_resamples)
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


def _likelihoods(
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


def _personal(
  built: Any,
  title: str,
  own: Mapping[str, Callable[[], tuple[Any, Any]]],
  clients: Sequence[str | None],
  scores: Callable[..., intervals.Scores],
  num_resamples: int,
) -> dict[str, Any]:
  """Returns the metrics of clients' own models on their own examples."""
  parts, whose = [], []
  for name, model in own.items():
    places = [i for i, client in enumerate(clients) if client == name]
    if places:
      parts.append(scores(places, *model()))
      whose += [name] * len(places)
  if not parts:
    return {}
  together = parts[0]._replace(
    statistics=np.concatenate([part.statistics for part in parts])
  )
  return _told(built, f'{title}/personal', together, whose, num_resamples)


# --------------------------------------------------------------- generated --

SCORES = ('exact_match', 'word_f1', 'rouge_l', 'bleu', 'chrf', 'refusal')


def _scorer(
  score: str, pattern: str | None, reference_pattern: str | None
) -> answers.Scorer:
  if score == 'exact_match':
    return answers.exact_match(pattern, reference_pattern)
  if pattern is not None or reference_pattern is not None:
    raise Error(
      f'evals.evaluators: pattern is of score=exact_match, not of {score}.'
    )
  known = {
    'word_f1': answers.word_f1,
    'rouge_l': overlap.rouge_l,
    'bleu': overlap.bleu,
    'chrf': overlap.chrf,
    'refusal': answers.refusal,
  }
  return known[score]()


def generated(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  score: Literal[
    'exact_match', 'word_f1', 'rouge_l', 'bleu', 'chrf', 'refusal'
  ] = 'exact_match',
  title: str = 'generated',
  path: str | None = None,
  prompt_key: str = 'prompt',
  response_key: str = 'response',
  client_key: str | None = None,
  pattern: str | None = None,
  reference_pattern: str | None = None,
  max_new_tokens: int = 64,
  per_client: int | None = None,
  limit: int | None = None,
  batch_size: int = 32,
  private: bool = False,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of greedy replies, compared with recorded ones.

  It reports the score with its interval, 'tokens_per_second' of the generation
  and 'reply_tokens', the mean length of a reply.

  Args:
    score: the measure: `evals.answers` and `evals.overlap`.
    title: the name of its metrics.
    path: a file of prompts and replies, with the fields `*_key`; None: the
      held-out examples of the run.
    pattern: of answers in replies, for exact_match: `evals.answers`.
    reference_pattern: of answers in references.
    max_new_tokens: the length at which a reply is cut.
    per_client: held-out examples of each client; None: all.
    limit: the first examples only.
    batch_size: prompts at a time.
    private: filled in by the program, as in `choices`.
    num_resamples: of the bootstrap.

  Raises:
    Error: a file or field that does not fit; a network that writes nothing.
  """
  _check(
    title,
    num_resamples,
    limit=limit,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    per_client=per_client,
  )
  _writes(built, 'generated')
  rate = _scorer(score, pattern, reference_pattern)
  room = built.loaded.config.max_positions - max_new_tokens
  if path is None:
    asked = _heldout(built, per_client, room)
  else:
    records = data.jsonl(path, client_key, prompt_key, response_key)
    asked = _asked(built, records, room)
  asked = asked[:limit]
  if not asked:
    raise Error(
      f'evals.evaluators: {title} has no example: no client has held-out texts.'
    )
  write = writer(built, max_new_tokens=max_new_tokens, batch_size=batch_size)
  clients = [one.client for one in asked]
  tokens = {'seconds': 0.0, 'new': 0}

  def scores(places: Sequence[int], base: Any, params: Any) -> intervals.Scores:
    began = time.monotonic()
    new = write(base, params, [asked[i].prompt for i in places])
    tokens['seconds'] += time.monotonic() - began
    tokens['new'] += sum(map(len, new))
    texts = [built.tokenizer.decode(reply) for reply in new]
    return rate(texts, [asked[i].reference for i in places])

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del key
    tokens.update(seconds=0.0, new=0)
    everything = range(len(asked))
    whole = scores(everything, *_served(built, algorithm, base, params))
    metrics = _told(built, title, whole, clients, num_resamples)
    speed = tokens['new'] / max(tokens['seconds'], 1e-9)
    metrics[f'evals/{title}/tokens_per_second'] = speed
    metrics[f'evals/{title}/reply_tokens'] = tokens['new'] / len(asked)
    if private:
      own = _own(built, algorithm, base, params, store)
      metrics |= _personal(built, title, own, clients, scores, num_resamples)
    return metrics

  return evaluate


def writer(
  built: Any, *, batch_size: int = 32, **settings: Any
) -> Callable[..., list[list[int]]]:
  """Returns `write(base, params, prompts, **more) -> replies`, all in tokens.

  Prompts of like lengths share a batch; `settings` are those of
  `models.generate`.
  """
  template = built.conf['population'].get('template', 'chat')
  stops = ends(built.loaded, built.tokenizer, template)

  def write(
    base: Any, params: Any, prompts: Sequence[list[int]], **more: Any
  ) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    done = models.generate(
      built.loaded,
      base,
      params,
      [prompts[i] for i in order],
      eos_id=stops,
      batch_size=batch_size,
      **settings,
      **more,
    )
    for i, reply in zip(order, done, strict=True):
      replies[i] = reply
    return replies

  return write


def _heldout(built: Any, per_client: int | None, room: int) -> list[Asked]:
  """Returns the prompts of held-out texts, up to their first learned token."""
  people, result = built.population, []
  for names, parts in (
    (people.names, people.heldout),
    (people.new_names, people.new),
  ):
    for name, own in zip(names, parts, strict=True):
      for example in own[:per_client]:
        example = getattr(example, 'chosen', example)
        mask = np.asarray(example.loss_mask)
        start = int(np.argmax(mask))
        stop = start + int(np.argmin([*mask[start:], False]))
        if start < 1:
          continue
        tokens = [int(t) for t in example.tokens]
        reference = built.tokenizer.decode(tokens[start:stop])
        result.append(Asked(tokens[:start][-room:], reference, name))
  return result


def _asked(built: Any, records: Sequence[Any], room: int) -> list[Asked]:
  """Returns the prompts of records in the form of the run's training."""
  template = built.conf['population'].get('template', 'chat')
  return [
    Asked(
      data.prompt(record, built.tokenizer, template, room),
      record.response or '',
      record.client,
    )
    for record in records
  ]


# ----------------------------------------------------------------- classes --


def classes(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  title: str = 'classes',
  num_bins: int = 15,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of a classifier on the held-out texts.

  It reports accuracy, macro_f1, micro_f1, mcc and ece (`evals.agreement`) of
  what all clients are served.

  Raises:
    Error: the task of the config has no classes.
  """
  _check(title, num_resamples, num_bins=num_bins)
  if not built.labels:
    raise Error(
      'evals.evaluators: classes needs task.name=classification; the task of '
      'this config has no classes.'
    )
  logits = jax.jit(local.class_logits(built.loaded.model))
  people = built.population
  parts = [(people.names, people.heldout), (people.new_names, people.new)]
  pairs = [
    (example, name)
    for names, part in parts
    for name, own in zip(names, part, strict=True)
    for example in own
    if example.label is not None and example.label >= 0
  ]
  examples, clients = [x for x, _ in pairs], [name for _, name in pairs]
  true = np.array([example.label for example in examples], int)
  build = built.task.collate(examples, built.width, built.tokenizer.pad_id)
  size = built.test.batch_size

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store, key
    if not examples:
      return {}
    base, served = _served(built, algorithm, base, params)
    rows = []
    for first in range(0, len(examples), size):
      some = [[example] for example in examples[first : first + size]]
      batch = build(some + [[]] * (size - len(some)))
      values = np.asarray(logits(base, served, batch), np.float64)
      rows.append(values[: len(some)])
    values = np.concatenate(rows)
    values = np.exp(values - values.max(1, keepdims=True))
    shares = values / values.sum(1, keepdims=True)
    said = shares.argmax(1)
    scores = intervals.joined(
      [
        agreement.classes(said, true, len(built.labels)),
        agreement.calibration(shares.max(1), said == true, num_bins),
      ]
    )
    return _told(built, title, scores, clients, num_resamples)

  return evaluate


# -------------------------------------------------------------------- code --


def code(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  path: str,
  execute: bool = False,
  title: str = 'code',
  client_key: str | None = None,
  k: Sequence[int] = (1,),
  num_samples: int = 1,
  temperature: float = 0.0,
  template: str | None = None,
  max_new_tokens: int = 256,
  timeout: float = 5.0,
  memory_mb: int = 512,
  limit: int | None = None,
  batch_size: int = 32,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of programs: pass@k of problems in HumanEval's form.

  A problem has `prompt`, `test` and `entry_point`. Of `num_samples` programs
  those that pass the test count (`evals.answers.pass_at_k`). It also reports
  'timed_out', the share of programs that were stopped.

  Args:
    path: a file of problems, one JSON object a line.
    execute: must be True: it runs what a model has written, with limits of time
      and memory and no further protection (`evals.sandbox`).
    title: the name of its metrics.
    client_key: the field with a problem's client.
    k: the numbers of tries.
    num_samples: programs a problem, at least the largest k.
    temperature: of sampling; 0 with one sample.
    template: the form of prompts; None: the program goes on from the prompt.
    max_new_tokens: the length at which a program is cut.
    timeout: seconds of a program.
    memory_mb: the memory of a program in units of 2^20 bytes.
    limit: the first problems only.
    batch_size: programs written at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: `execute` is False; a file, field or number that does not fit.
  """
  _check(title, num_resamples, limit=limit, num_samples=num_samples)
  _writes(built, 'code')
  if not execute:
    raise Error(
      'evals.evaluators: code runs programs that a model has written, with '
      'limits of time and memory only; set execute=True to allow it.'
    )
  if not k or min(k) < 1 or max(k) > num_samples:
    raise Error(
      f'evals.evaluators: k is {tuple(k)}; each must be from 1 to '
      f'{num_samples=}.'
    )
  if num_samples > 1 and not temperature > 0:
    raise Error(
      f'evals.evaluators: {num_samples=} at temperature 0 are all the same; '
      'set temperature.'
    )
  problems = programs.read(path, client_key)[:limit]
  tokenizer, begin = built.tokenizer, data.tokenizers.start(built.tokenizer)
  room = built.loaded.config.max_positions - max_new_tokens

  def start(prompt: str) -> list[int]:
    if template is None:
      return [*begin, *tokenizer.encode(prompt)][-room:]
    record = data.Record(prompt=prompt, response='')
    return data.prompt(record, tokenizer, template, room)

  prompts = [start(one.prompt) for one in problems for _ in range(num_samples)]
  write = writer(
    built,
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    temperature=temperature,
  )
  clients = [problem.client for problem in problems]

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store
    base, served = _served(built, algorithm, base, params)
    new = write(base, served, prompts, key=key)
    texts = [tokenizer.decode(reply) for reply in new]
    scores = programs.scores(
      problems, texts, k=tuple(k), timeout=timeout, memory_mb=memory_mb
    )
    return _told(built, title, scores, clients, num_resamples)

  return evaluate
