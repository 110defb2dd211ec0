"""The evaluator of a classifier."""

from typing import Any

import jax
import numpy as np

from fedjax_llm import local
from fedjax_llm.evals import agreement, intervals
from fedjax_llm.run.benchmarks.sharing import check, served_model, summary
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm


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
  check(title, num_resamples, num_bins=num_bins)
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
    base, served = served_model(built, algorithm, base, params)
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
    return summary(built, title, scores, clients, num_resamples)

  return evaluate
