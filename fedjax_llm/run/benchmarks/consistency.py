"""The evaluator of votes over the questions of several clients."""

from typing import Any

import jax

from fedjax_llm import data
from fedjax_llm.evals import answers, intervals
from fedjax_llm.run.benchmarks import wordings
from fedjax_llm.run.benchmarks.replies import writer
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  room,
  served_model,
  summary,
)
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


def consistent(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  path: str,
  group_key: str = 'group',
  prompt_key: str = 'prompt',
  response_key: str = 'response',
  client_key: str | None = None,
  pattern: str = 'number',
  hint: str = '',
  num_samples: int = 1,
  temperature: float = 0.0,
  title: str = 'consistent',
  max_new_tokens: int = 128,
  batch_size: int = 32,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of one vote a question over many clients' wordings.

  Several clients ask the same question in their own words; each wording is
  answered `num_samples` times, and all get the most frequent answer (Fed-SP-SC,
  Liu et al. 2023, arXiv 2304.13911, with the vote of Wang et al. 2022, arXiv
  2203.11171). Nothing is trained. It reports, over wordings, 'voted', the share
  that gets the right answer by the vote, 'alone', the share of right answers
  among a wording's own, and 'agreement', the share of answers that the vote's
  winner has.

  Args:
    path: a file of wordings, one JSON object a line.
    group_key: the field, a text or a whole number, that all wordings of a
      question share.
    prompt_key: the field of the wording.
    response_key: the field of the right answer, read by `pattern` as well.
    client_key: the field of the client that asks.
    pattern: of answers, as in `generated` with score=exact_match.
    hint: is added to each wording after a blank line, such as "Let's think step
      by step." for a chain of thought.
    num_samples: answers to each wording.
    temperature: of sampling; 0 with one sample.
    title: the name of its metrics.
    max_new_tokens: the length at which a reply is cut.
    batch_size: prompts at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: a file, field or number that does not fit; a network that writes
      nothing; a right answer that the pattern does not find, or right answers
      that differ within a group.
  """
  check(title, num_resamples, num_samples=num_samples, batch_size=batch_size)
  check_writes(built, 'consistent')
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
  more = f'\n\n{hint}' if hint else ''
  records = [data.Record(prompt=x.text + more, response='') for x in asked]
  prompts = [
    data.prompt(record, built.tokenizer, template, most) for record in records
  ]
  write = writer(
    built,
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    temperature=temperature,
  )

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store
    base, served = served_model(built, algorithm, base, params)
    new = write(
      base,
      served,
      [prompt for prompt in prompts for _ in range(num_samples)],
      key=jax.random.key(0) if key is None else key,
    )
    said = [
      answers.extracted(built.tokenizer.decode(reply), pattern_of)
      for reply in new
    ]
    own = [
      said[i * num_samples : (i + 1) * num_samples] for i in range(len(asked))
    ]
    votes = wordings.votes(asked, own)
    alone = [
      wordings.hits(some, one.answer)
      for some, one in zip(own, asked, strict=True)
    ]
    voted = [wordings.hits([votes[x.group][0]], x.answer) for x in asked]
    scores = intervals.joined(
      [
        intervals.means('voted', voted),
        intervals.means('alone', alone),
        intervals.means('agreement', [votes[x.group][1] for x in asked]),
      ]
    )
    clients = [one.client for one in asked]
    return summary(built, title, scores, clients, num_resamples)

  return evaluate
