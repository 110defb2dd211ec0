"""The evaluator of generated replies, and the writer of replies."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedjax_llm import data, models
from fedjax_llm.evals import answers, formulas, intervals, overlap
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  own_models,
  personal,
  room,
  served_model,
  summary,
)
from fedjax_llm.run.ends import ends
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


class Asked(NamedTuple):
  """A prompt in tokens, the reply of its record, and its client."""

  prompt: list[int]
  reference: str
  client: str | None


def scorer(
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
    'math': formulas.mathematics,
  }
  return known[score]()


def generated(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  score: Literal[
    'exact_match', 'word_f1', 'rouge_l', 'bleu', 'chrf', 'refusal', 'math'
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
  check(
    title,
    num_resamples,
    limit=limit,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    per_client=per_client,
  )
  check_writes(built, 'generated')
  rate = scorer(score, pattern, reference_pattern)
  keys = (prompt_key, response_key, client_key)
  asked = asked_of(built, title, path, keys, per_client, limit, max_new_tokens)
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
    whole = scores(everything, *served_model(built, algorithm, base, params))
    metrics = summary(built, title, whole, clients, num_resamples)
    speed = tokens['new'] / max(tokens['seconds'], 1e-9)
    metrics[f'evals/{title}/tokens_per_second'] = speed
    metrics[f'evals/{title}/reply_tokens'] = tokens['new'] / len(asked)
    if private:
      own = own_models(built, algorithm, base, params, store)
      metrics |= personal(built, title, own, clients, scores, num_resamples)
    return metrics

  return evaluate


def writer(
  built: Any, *, batch_size: int = 32, **settings: Any
) -> Callable[..., list[list[int]]]:
  """Returns `write(base, params, prompts, **more) -> replies`, all in tokens.

  `settings` are those of `models.generate`.
  """
  template = built.conf['population'].get('template', 'chat')
  stops = ends(built.loaded, built.tokenizer, template)

  def write(
    base: Any, params: Any, prompts: Sequence[list[int]], **more: Any
  ) -> list[list[int]]:
    return models.generate(
      built.loaded,
      base,
      params,
      prompts,
      eos_id=stops,
      batch_size=batch_size,
      **settings,
      **more,
    )

  return write


def asked_of(
  built: Any,
  title: str,
  path: str | None,
  keys: tuple[str, str, str | None],
  per_client: int | None,
  limit: int | None,
  max_new_tokens: int,
) -> list[Asked]:
  """Returns the prompts of a file, or of the held-out texts without one.

  `keys` are the fields of the prompt, the reply and the client.

  Raises:
    Error: a file or field that does not fit; there is no prompt.
  """
  most = room(built, title, max_new_tokens)
  if path is None:
    asked = heldout(built, per_client, most)
  else:
    prompt_key, response_key, client_key = keys
    records = data.jsonl(path, client_key, prompt_key, response_key)
    asked = from_records(built, records, most)
  if not asked[:limit]:
    raise Error(
      f'evals.evaluators: {title} has no example: no client has held-out texts.'
    )
  return asked[:limit]


def heldout(built: Any, per_client: int | None, room: int) -> list[Asked]:
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


def from_records(built: Any, records: Sequence[Any], room: int) -> list[Asked]:
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
