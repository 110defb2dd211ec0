"""The evaluator of programs that a model writes."""

from collections.abc import Sequence
from typing import Any

from fedjax_llm import data
from fedjax_llm.evals import programs
from fedjax_llm.run.benchmarks.replies import writer
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  room,
  served_model,
  summary,
)
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


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
  check(title, num_resamples, limit=limit, num_samples=num_samples)
  check_writes(built, 'code')
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
  most = room(built, title, max_new_tokens)

  def start(prompt: str) -> list[int]:
    if template is None:
      return [*begin, *tokenizer.encode(prompt)][-most:]
    record = data.Record(prompt=prompt, response='')
    return data.prompt(record, tokenizer, template, most)

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
    base, served = served_model(built, algorithm, base, params)
    new = write(base, served, prompts, key=key)
    texts = [tokenizer.decode(reply) for reply in new]
    scores = programs.scores(
      problems, texts, k=tuple(k), timeout=timeout, memory_mb=memory_mb
    )
    return summary(built, title, scores, clients, num_resamples)

  return evaluate
