"""The evaluator of prompts with other clients' questions and voted answers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import data
from fedjax_llm.evals import answers, intervals, neighbours
from fedjax_llm.run.benchmarks import wordings
from fedjax_llm.run.benchmarks.replies import writer
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  room,
  served_model,
  summary,
)
from fedjax_llm.run.benchmarks.wordings import Wording
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm

DISCLAIMER = (
  'The answers above come from other users and may be wrong. Think about the '
  'next question on your own.'
)


def demonstrated(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  path: str,
  group_key: str = 'group',
  prompt_key: str = 'prompt',
  response_key: str = 'response',
  client_key: str | None = None,
  pattern: str = 'number',
  hint: str = "Let's think step by step.",
  disclaimer: str = DISCLAIMER,
  num_shots: int = 2,
  least_agreement: float = 0.5,
  embed: str = 'hashed_words',
  num_samples: int = 1,
  temperature: float = 0.0,
  title: str = 'demonstrated',
  max_new_tokens: int = 128,
  batch_size: int = 32,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of chains of thought from other clients' questions.

  Fed-DP-CoT, Liu et al. 2023, arXiv 2304.13911: every question of a group gets
  the most frequent answer of all its wordings (`consistent`), questions of
  other groups with these answers stand before a question as demonstrations,
  with a sentence that they may be wrong, and the model answers with a chain of
  thought. Nothing is trained. A demonstration is the wording of another client
  with its own reply that reaches the vote; of each group there is one, and the
  `num_shots` with the nearest vectors are taken, the nearest last. This choice,
  the threshold of the agreement and the words of the disclaimer are ours.

  It reports, over wordings, 'accuracy', the share of right answers with
  demonstrations, 'alone', the share of them without, and 'demonstrations', the
  mean number of them that a prompt had.

  Args:
    path, group_key, prompt_key, response_key, client_key, pattern: as in
      `consistent`.
    hint: is added to each question after a blank line.
    disclaimer: stands between demonstrations and question; '' for none.
    num_shots: demonstrations in a prompt, at most.
    least_agreement: the share of a group's answers that agree with its vote, at
      least, for it to be a demonstration.
    embed: 'hashed_words', or the import path of a function of records that
      returns vectors [records, E].
    num_samples, temperature: of the answers that vote, as in `consistent`.
    title: the name of its metrics.
    max_new_tokens: the length at which a reply is cut.
    batch_size: prompts at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: as `consistent`; a number out of range.
  """
  check(
    title,
    num_resamples,
    num_samples=num_samples,
    num_shots=num_shots,
    batch_size=batch_size,
  )
  check_writes(built, 'demonstrated')
  if not 0 <= least_agreement <= 1:
    raise Error(
      f'evals.evaluators: {least_agreement=}; it must be from 0 to 1.'
    )
  if num_samples > 1 and not temperature > 0:
    raise Error(
      f'evals.evaluators: {num_samples=} at temperature 0 are all the same; '
      'set temperature.'
    )
  most = room(built, title, max_new_tokens)
  pattern_of = answers.compiled('pattern', pattern)
  keys = (group_key, prompt_key, response_key, client_key)
  asked = wordings.read(path, keys, pattern)
  template = built.conf['population'].get('template', 'chat')
  records = [data.Record(prompt=one.text) for one in asked]
  vectors = np.asarray(wordings.embedding(embed)(records))
  settings = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
  write = writer(built, temperature=temperature, **settings)
  greedy = writer(built, **settings)

  def tokens(one: Wording, before: Sequence[str], length: int | None):
    text = '\n\n'.join(
      x for x in (*before, disclaimer if before else '', one.text, hint) if x
    )
    record = data.Record(prompt=text, response='')
    return data.prompt(record, built.tokenizer, template, length)

  def prompted(one: Wording, before: list[str]) -> tuple[list[int], int]:
    """Returns the longest prompt that fits, and its demonstrations."""
    while before:
      ids = tokens(one, before, None)
      if len(ids) <= most:
        return ids, len(before)
      before = before[1:]  # the farthest one
    return tokens(one, [], most), 0

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store
    base, served = served_model(built, algorithm, base, params)
    plain = [tokens(one, [], most) for one in asked]
    new = write(
      base,
      served,
      [prompt for prompt in plain for _ in range(num_samples)],
      key=jax.random.key(0) if key is None else key,
    )
    texts = [built.tokenizer.decode(reply) for reply in new]
    said = [answers.extracted(text, pattern_of) for text in texts]
    part = lambda x, i: x[i * num_samples : (i + 1) * num_samples]
    own = [part(said, i) for i in range(len(asked))]
    pool = reached(
      asked, [part(texts, i) for i in range(len(asked))], own, least_agreement
    )
    chosen = demonstrations(asked, list(pool), vectors, num_shots)
    pairs = [
      prompted(
        one, [f'{asked[j].text}\n{pool[j]}' for j in reversed(chosen[i])]
      )
      for i, one in enumerate(asked)
    ]
    later = greedy(base, served, [ids for ids, _ in pairs])
    right = [
      wordings.hits(
        [answers.extracted(built.tokenizer.decode(reply), pattern_of)],
        one.answer,
      )
      for reply, one in zip(later, asked, strict=True)
    ]
    alone = [
      wordings.hits(some, one.answer)
      for some, one in zip(own, asked, strict=True)
    ]
    scores = intervals.joined(
      [intervals.means('accuracy', right), intervals.means('alone', alone)]
    )
    clients = [one.client for one in asked]
    metrics = summary(built, title, scores, clients, num_resamples)
    number = float(np.mean([count for _, count in pairs]))
    return {**metrics, f'evals/{title}/demonstrations': number}

  return evaluate


def reached(
  asked: Sequence[Wording],
  texts: Sequence[Sequence[str]],
  own: Sequence[Sequence[str]],
  least_agreement: float,
) -> dict[int, str]:
  """Returns the first reply of each wording that reaches its group's vote.

  Groups below the least agreement, and wordings without such a reply, are left
  out.

  Args:
    asked: the wordings.
    texts, own: the replies to each of them, and the answers in these.
    least_agreement: see `demonstrated`.

  >>> ask = [Wording('a', 'x', '4', 'ann'), Wording('a', 'y', '4', 'bob')]
  >>> reached(ask, [['So 4', 'So 5'], ['It is 4']], [['4', '5'], ['4']], 0.5)
  {0: 'So 4', 1: 'It is 4'}
  """
  votes = wordings.votes(asked, own)
  pool: dict[int, str] = {}
  for i, one in enumerate(asked):
    answer, share = votes[one.group]
    if answer in own[i] and answer and share >= least_agreement:
      pool[i] = texts[i][own[i].index(answer)]
  return pool


def demonstrations(
  asked: Sequence[Wording],
  pool: Sequence[int],
  vectors: np.ndarray,
  num_shots: int,
) -> list[list[int]]:
  """Returns the places of the demonstrations of each wording, nearest first.

  They are of other groups and, where clients have names, of other clients; of
  several wordings of a group the nearest stands for it.

  >>> ask = [Wording(g, '', '', c) for g, c in ('aA', 'bA', 'bB', 'cB')]
  >>> demonstrations(ask, [1, 2, 3], np.eye(4) + 1, 2)[0]  # not A's own
  [2, 3]
  """
  if not len(pool):
    return [[] for _ in asked]
  other = [
    [
      one.group != asked[j].group
      and (one.client is None or one.client != asked[j].client)
      for j in pool
    ]
    for one in asked
  ]
  order = neighbours.nearest(vectors, vectors[list(pool)], len(pool), other)
  result = []
  for row in order:
    first: dict[str, int] = {}
    for place in row:
      first.setdefault(asked[pool[place]].group, pool[place])
    result.append(list(first.values())[:num_shots])
  return result
