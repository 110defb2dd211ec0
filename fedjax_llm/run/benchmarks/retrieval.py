"""The evaluator of a fact in a long text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm import data
from fedjax_llm.evals import haystack, intervals
from fedjax_llm.run.benchmarks.replies import writer
from fedjax_llm.run.benchmarks.sharing import (
  check,
  check_writes,
  room,
  served_model,
  summary,
)
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


def needle(
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  lengths: Sequence[int] = (256, 1024),
  depths: Sequence[float] = (0.0, 0.5, 1.0),
  per_cell: int = 4,
  title: str = 'needle',
  max_new_tokens: int = 8,
  batch_size: int = 8,
  num_resamples: int = 1000,
) -> Evaluator:
  """Returns the evaluator of retrieval from long texts.

  Each text is made of a few sentences, repeated, with the number of a house in
  one of them, and asks for this number (`evals.haystack`). It reports
  'accuracy', the share of greedy replies that begin with the number, over all
  texts, and 'length_{n}/accuracy' and 'depth_{d}/accuracy'. What is measured is
  what all clients are served.

  Args:
    lengths: of the texts in tokens; a text is as long as fits.
    depths: places of the number, from 0 (start) to 1 (end).
    per_cell: texts of each length and depth.
    title: the name of its metrics.
    max_new_tokens: the length at which a reply is cut.
    batch_size: texts at a time.
    num_resamples: of the bootstrap.

  Raises:
    Error: a length that the network's positions or the question do not allow, a
      depth out of range; a network that writes nothing.
  """
  check(
    title,
    num_resamples,
    per_cell=per_cell,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
  )
  check_writes(built, 'needle')
  most = room(built, title, max_new_tokens)
  for depth in depths:
    if not 0 <= depth <= 1:
      raise Error(
        f'evals.evaluators: {title}: depths has {depth}; it must be from 0 to '
        '1.'
      )
  for length in lengths:
    if length > most:
      raise Error(
        f'evals.evaluators: {title}: lengths has {length}; with '
        f'{max_new_tokens=} it must be at most {most}.'
      )
  tokenizer = built.tokenizer
  begin = list(data.tokenizers.start(tokenizer))

  def tokens(num: int, depth: float, seed: int) -> tuple[list[int], str]:
    one = haystack.needle(num, depth, seed)
    return [*begin, *tokenizer.encode(one.prompt)], one.answer

  def longest(length: int, depth: float, seed: int) -> tuple[list[int], str]:
    """Returns the text of most sentences within `length` tokens."""
    low, high = 0, length
    if len(tokens(0, depth, seed)[0]) > length:
      raise Error(
        f'evals.evaluators: {title}: lengths has {length}, too short for the '
        f'question, of {len(tokens(0, depth, seed)[0])} tokens.'
      )
    while low < high:
      middle = (low + high + 1) // 2
      fits = len(tokens(middle, depth, seed)[0]) <= length
      low, high = (middle, high) if fits else (low, middle - 1)
    return tokens(low, depth, seed)

  cells = [(n, d, i) for n in lengths for d in depths for i in range(per_cell)]
  texts = [longest(*cell) for cell in cells]
  write = writer(built, max_new_tokens=max_new_tokens, batch_size=batch_size)

  def evaluate(base: Any, params: Any, store: Any, key: Any) -> dict[str, Any]:
    del store, key
    base, served = served_model(built, algorithm, base, params)
    new = write(base, served, [prompt for prompt, _ in texts])
    hits = np.array(
      [
        haystack.is_hit(tokenizer.decode(reply), answer)
        for reply, (_, answer) in zip(new, texts, strict=True)
      ],
      float,
    )
    scores = intervals.means('accuracy', hits)
    clients = [None] * len(hits)
    metrics = summary(built, title, scores, clients, num_resamples)
    for name, values, place in (('length', lengths, 0), ('depth', depths, 1)):
      for value in values:
        own = [cell[place] == value for cell in cells]
        field = f'evals/{title}/{name}_{value:g}/accuracy'
        metrics[field] = float(hits[own].mean())
    return metrics

  return evaluate
