"""The evaluator of replies compared with others, by a judge or as a file."""

import json
import os
import pathlib
from typing import Any, Literal

from fedjax_llm.evals import intervals, judging
from fedjax_llm.run import workdir
from fedjax_llm.run.benchmarks.replies import asked_of, writer
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  served_model,
  summary,
)
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


def judged(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  out: str,
  against: Literal['reference', 'base'] = 'base',
  url: str | None = None,
  judge: str = '',
  key_variable: str = '',
  timeout: float = 60.0,
  title: str = 'judged',
  path: str | None = None,
  prompt_key: str = 'prompt',
  response_key: str = 'response',
  client_key: str | None = None,
  max_new_tokens: int = 128,
  per_client: int | None = None,
  limit: int | None = None,
  batch_size: int = 32,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of greedy replies against others, by a judge.

  It writes every pair to the file `out`, one JSON object a line, for any judge,
  and with `url` asks a language model (`evals.judging`). It reports 'pairs',
  'judged', how many of them have a verdict, and 'win_rate', the mean of 1 for a
  better reply, 0 for a worse one and 0.5 for a tie. Where the judge does not
  reply, the pairs and the verdicts so far stay in the file, with the reason,
  and the run goes on.

  Args:
    out: the file of pairs; each evaluation replaces it.
    against: 'base', the reply of the base without an adapter, or 'reference',
      the recorded reply.
    url: of an API in the OpenAI form; None: no judge is asked.
    judge: the name of the model there.
    key_variable: the environment variable with the API's key; '': none.
    timeout: seconds of one request.
    title: the name of its metrics.
    path: a file of prompts and replies, as in `generated`.
    max_new_tokens: the length at which a reply is cut.
    per_client: held-out examples of each client; None: all.
    limit: the first examples only.
    batch_size: prompts at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: a file, field or number that does not fit; a url without a judge; a
      network that writes nothing.
  """
  check(
    title,
    num_resamples,
    limit=limit,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    per_client=per_client,
  )
  check_writes(built, 'judged')
  ask = None
  if url is not None:
    if not judge:
      raise Error(
        f'evals.evaluators: {title}: url is {url!r}, but judge is empty; name '
        'the model there.'
      )
    if key_variable and not os.environ.get(key_variable):
      raise Error(
        f'evals.evaluators: {title}: key_variable is {key_variable!r}, but '
        'there is no such environment variable.'
      )
    key = os.environ[key_variable] if key_variable else ''
    ask = judging.endpoint(url, judge, key=key, timeout=timeout)
  keys = (prompt_key, response_key, client_key)
  asked = asked_of(built, title, path, keys, per_client, limit, max_new_tokens)
  write = writer(built, max_new_tokens=max_new_tokens, batch_size=batch_size)
  decode = built.tokenizer.decode

  def save(rows: list[dict[str, Any]]) -> None:
    file = pathlib.Path(out).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    workdir.replace(file, text)

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store, key
    prompts = [one.prompt for one in asked]
    base, served = served_model(built, algorithm, base, params)
    mine = [decode(reply) for reply in write(base, served, prompts)]
    other = [one.reference for one in asked]
    if against == 'base':
      other = [decode(x) for x in write(built.loaded.base, {}, prompts)]
    rows: list[dict[str, Any]] = [
      {
        'client': one.client,
        'prompt': decode(one.prompt),
        'reply': reply,
        'other': second,
        'against': against,
      }
      for one, reply, second in zip(asked, mine, other, strict=True)
    ]
    save(rows)
    for row in rows:
      if ask is None:
        break
      try:
        row['score'] = judging.compared(
          ask, row['prompt'], row['reply'], row['other']
        )
      except Error as error:
        row['error'] = str(error)
        break
    done = [i for i, row in enumerate(rows) if row.get('score') is not None]
    field = f'evals/{title}'
    metrics: dict[str, Any] = {
      f'{field}/pairs': len(rows),
      f'{field}/judged': len(done),
    }
    if ask is not None:
      save(rows)
    if done:
      scores = intervals.means('win_rate', [rows[i]['score'] for i in done])
      clients = [asked[i].client for i in done]
      metrics |= summary(built, title, scores, clients, num_resamples)
    return metrics

  return evaluate
