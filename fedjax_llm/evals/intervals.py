"""Means, bootstrap intervals and client values of scores by example.

Each example has a row of statistics whose sums determine the metrics: a mean, a
confusion matrix, the n-gram counts of BLEU. `summarised` computes the metrics
from sums over all examples, over those of each client, and over resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.evals.likelihood import worst_mean

_ROWS = 2**22  # entries of one matrix of resampling weights


class Scores(NamedTuple):
  """Statistics of n examples, and the metrics that their sums determine.

  `combine(sums [..., m]) -> {metric: [...]}`; the first metric is that of
  clients.

  >>> scores = means('accuracy', np.array([1.0, 0.0]))
  >>> float(scores.combine(scores.statistics.sum(0))['accuracy'])
  0.5
  """

  statistics: np.ndarray  # [n, m] float64
  combine: Callable[[np.ndarray], Mapping[str, Any]]


def means(name: str, values: Sequence[float] | np.ndarray) -> Scores:
  """Returns the scores whose only metric is the mean of the values.

  >>> means('hits', [1, 0, 1]).statistics.shape
  (3, 2)
  """
  values = np.asarray(values, np.float64)

  def combine(sums: np.ndarray) -> dict[str, Any]:
    return {name: sums[..., 0] / np.maximum(sums[..., 1], 1)}

  return Scores(np.stack([values, np.ones(len(values))], -1), combine)


def joined(parts: Sequence[Scores]) -> Scores:
  """Returns the scores of the same examples with the metrics of all parts.

  >>> both = joined([means('a', [1]), means('b', [3])])
  >>> {k: float(v) for k, v in both.combine(both.statistics.sum(0)).items()}
  {'a': 1.0, 'b': 3.0}
  """
  ends = np.cumsum([part.statistics.shape[1] for part in parts])[:-1]

  def combine(sums: np.ndarray) -> dict[str, Any]:
    pieces = np.split(sums, ends, axis=-1)
    metrics: dict[str, Any] = {}
    for part, piece in zip(parts, pieces, strict=True):
      metrics |= part.combine(piece)
    return metrics

  return Scores(np.concatenate([p.statistics for p in parts], 1), combine)


def intervals(
  scores: Scores,
  *,
  num_resamples: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> dict[str, tuple[float, float]]:
  """Returns the percentile bootstrap interval of each metric.

  Examples are drawn with replacement, n of n, `num_resamples` times (Efron and
  Tibshirani 1993, chapter 13); the bounds are the (1 - level) / 2 quantiles
  from both ends. Examples are taken as independent, clients as fixed.

  >>> intervals(means('accuracy', np.ones(5)))
  {'accuracy': (1.0, 1.0)}
  """
  num = len(scores.statistics)
  rng = np.random.default_rng(seed)
  shares, sums = np.full(num, 1 / num), []
  step = max(1, _ROWS // num)
  for first in range(0, num_resamples, step):
    size = min(step, num_resamples - first)
    sums.append(rng.multinomial(num, shares, size=size) @ scores.statistics)
  tail = (1 - level) / 2
  values = scores.combine(np.concatenate(sums))
  return {
    name: tuple(float(q) for q in np.quantile(x, [tail, 1 - tail]))
    for name, x in values.items()
  }  # pyright: ignore[reportReturnType]


def summarised(
  title: str,
  scores: Scores,
  owners: np.ndarray,
  names: Sequence[str],
  *,
  num_resamples: int = 1000,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns the metrics 'evals/{title}/...' of scored examples.

  Each metric has its interval, '{metric}_low' and '{metric}_high' (95 %).
  'clients' has the first metric of each client by name, 'client_mean' their
  mean and 'client_worst_10' the mean of the lowest tenth; 'num_examples' counts
  the examples. Examples of nobody have the owner -1.

  >>> summarised(
  ...   'quiz', means('hits', [1, 1, 0]), np.array([0, 0, 1]), ['ann', 'bob']
  ... )['evals/quiz/clients']
  {'ann': 1.0, 'bob': 0.0}
  """
  if not len(scores.statistics):
    return {}
  whole = scores.combine(scores.statistics.sum(0))
  bounds = intervals(scores, num_resamples=num_resamples, seed=seed)
  metrics: dict[str, Any] = {}
  for name, value in whole.items():
    low, high = bounds[name]
    metrics |= {name: float(value), f'{name}_low': low, f'{name}_high': high}
  metrics['num_examples'] = len(scores.statistics)
  ids = np.unique(owners[owners >= 0])
  if len(ids):
    sums = np.stack([scores.statistics[owners == i].sum(0) for i in ids])
    first = next(iter(whole))
    each = np.asarray(scores.combine(sums)[first], np.float64)
    metrics['clients'] = {
      names[i]: float(x) for i, x in zip(ids, each, strict=True)
    }
    metrics['client_mean'] = float(np.mean(each))
    metrics['client_worst_10'] = 0.0 - worst_mean(-each)
  return {f'evals/{title}/{name}': value for name, value in metrics.items()}
