"""The evaluator of replies with a client's nearest texts in the prompt."""

from typing import Any, Literal

import numpy as np

from fedjax_llm import data
from fedjax_llm.evals import intervals, neighbours
from fedjax_llm.run.benchmarks import replies, wordings
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  room,
  served_model,
  summary,
)
from fedjax_llm.types import Evaluator, FederatedAlgorithm


def retrieved(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  num_texts: int = 2,
  embed: str = 'hashed_words',
  score: Literal[
    'exact_match', 'word_f1', 'rouge_l', 'bleu', 'chrf', 'math'
  ] = 'word_f1',
  pattern: str | None = None,
  reference_pattern: str | None = None,
  title: str = 'retrieved',
  max_new_tokens: int = 64,
  per_client: int | None = None,
  limit: int | None = None,
  batch_size: int = 32,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of a memory of texts at test time.

  Before the prompt of each held-out text stand the client's own training texts
  whose prompts have the nearest vectors, the nearest last; the parameters are
  those that all clients are served, and a client's texts stay with it. Clients
  that train nothing have no texts, and their prompts stay as they are. Texts
  that do not fit before a prompt are left out, the farthest first.

  It reports the score of these replies, 'alone', that of replies without texts,
  and 'texts', the mean number of texts in a prompt.

  Args:
    num_texts: texts in a prompt, at most.
    embed: 'hashed_words', or the import path of a function of records that
      returns vectors [records, E]. It gets the prompts of a client's training
      texts and held-out texts together.
    score, pattern, reference_pattern: as in `generated`.
    title: the name of its metrics.
    max_new_tokens: the length at which a reply is cut.
    per_client: held-out examples of each client; None: all.
    limit: the first examples only.
    batch_size: prompts at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: a field that does not fit; a network that writes nothing.
  """
  check(
    title,
    num_resamples,
    num_texts=num_texts,
    limit=limit,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    per_client=per_client,
  )
  check_writes(built, 'retrieved')
  rate = replies.scorer(score, pattern, reference_pattern)
  asked = replies.asked_of(
    *(built, title, None, ('prompt', 'response', None)),
    *(per_client, limit, max_new_tokens),
  )
  most = room(built, title, max_new_tokens)
  prompts, counts = remembered(built, asked, most, num_texts, embed)
  settings = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
  write = replies.writer(built, **settings)
  references = [one.reference for one in asked]
  clients = [one.client for one in asked]

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store, key
    base, served = served_model(built, algorithm, base, params)
    metrics: dict[str, Any] = {}
    for name, some in (
      (title, prompts),
      (f'{title}/alone', [one.prompt for one in asked]),
    ):
      new = [built.tokenizer.decode(x) for x in write(base, served, some)]
      scores: intervals.Scores = rate(new, references)
      metrics |= summary(built, name, scores, clients, num_resamples)
    metrics[f'evals/{title}/texts'] = float(np.mean(counts))
    return metrics

  return evaluate


def remembered(
  built: Any, asked: Any, room: int, num_texts: int, embed: str
) -> tuple[list[list[int]], list[int]]:
  """Returns each prompt behind its client's nearest texts, and their number.

  Args:
    built: an `experiment.Experiment`.
    asked: `replies.Asked` of held-out texts.
    room: the most tokens of a prompt.
    num_texts, embed: see `retrieved`.
  """
  people, tokenizer = built.population, built.tokenizer
  vectors_of = wordings.embedding(embed)
  start = list(data.tokenizers.start(tokenizer))
  own = dict(zip(people.names, people.train, strict=True))
  prompts = [list(one.prompt) for one in asked]
  counts = [0] * len(asked)
  for name in dict.fromkeys(one.client for one in asked):
    pool = [getattr(x, 'chosen', x) for x in own.get(name, ())]
    pool = [x for x in pool if np.argmax(x.loss_mask) > 0]
    if not pool:
      continue
    mine = [i for i, one in enumerate(asked) if one.client == name]
    heads = [x.tokens[: int(np.argmax(x.loss_mask))] for x in pool]
    heads += [asked[i].prompt for i in mine]
    texts = [tokenizer.decode([int(t) for t in head]) for head in heads]
    vectors = np.asarray(vectors_of([data.Record(text=text) for text in texts]))
    near = neighbours.nearest(
      vectors[len(pool) :], vectors[: len(pool)], num_texts
    )
    for i, places in zip(mine, near, strict=True):
      before = [[int(t) for t in pool[j].tokens] for j in reversed(places)]
      prompts[i], counts[i] = neighbours.joined(before, prompts[i], start, room)
  return prompts, counts
