"""Overlap of generated texts with references: ROUGE-L, BLEU and chrF.

ROUGE-L and BLEU are computed by rouge-score and sacrebleu (extra `metrics`).
"""

import collections
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm.evals.answers import Scorer
from fedjax_llm.evals.intervals import Scores, means
from fedjax_llm.types import Error


def _package(module: str, name: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise Error(
      f"this score is computed by {name}: pip install 'fedjax_llm[metrics]'."
    ) from error


def rouge_l(stem: bool = True) -> Scorer:
  """Returns the scorer of ROUGE-L's F-measure, from 0 to 1, by rouge-score.

  Lin 2004, section 3; the mean over examples. `stem` is Porter's stemmer.

  Raises:
    Error: from the scorer, rouge-score is not installed.

  >>> scorer = rouge_l(stem=False)  # then scorer(replies, references)
  """

  def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
    package = _package('rouge_score.rouge_scorer', 'rouge-score')
    scorer = package.RougeScorer(['rougeL'], use_stemmer=stem)
    return means(
      'rouge_l',
      [
        scorer.score(reference, reply)['rougeL'].fmeasure
        for reply, reference in zip(replies, references, strict=True)
      ],
    )

  return score


def bleu() -> Scorer:
  """Returns the scorer of corpus BLEU, from 0 to 100, by sacrebleu.

  Papineni et al. 2002, with sacrebleu's default tokenizer and smoothing.

  Raises:
    Error: from the scorer, sacrebleu is not installed.

  >>> scorer = bleu()  # then scorer(replies, references)
  """

  def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
    package = _package('sacrebleu.metrics', 'sacrebleu')
    metric = package.BLEU(effective_order=True)
    rows = []
    for reply, reference in zip(replies, references, strict=True):
      one = metric.sentence_score(reply, [reference])
      rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])

    def combine(sums: np.ndarray) -> dict[str, Any]:
      flat = np.rint(sums).astype(int).reshape(-1, 10)
      values = [
        package.BLEU.compute_bleu(
          [*map(int, row[:4])], [*map(int, row[4:8])], int(row[8]), int(row[9])
        ).score
        for row in flat
      ]
      return {'bleu': np.reshape(values, sums.shape[:-1])}

    return Scores(np.array(rows, np.float64).reshape(-1, 10), combine)

  return score


def chrf(order: int = 6, beta: float = 2.0) -> Scorer:
  """Returns the scorer of corpus chrF, from 0 to 100.

      chrF = 100 (1 + beta^2) P R / (beta^2 P + R),

  with the means P and R, over the lengths 1 to `order` that occur, of the
  precision and the recall of character n-grams without spaces (Popovic 2015).

  >>> scores = chrf()(['abc'], ['abd'])
  >>> round(float(scores.combine(scores.statistics.sum(0))['chrf']), 2)
  38.89
  """

  def grams(text: str, size: int) -> collections.Counter:
    text = ''.join(text.split())
    return collections.Counter(
      text[i : i + size] for i in range(len(text) - size + 1)
    )

  def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
    rows = []
    for reply, reference in zip(replies, references, strict=True):
      row = []
      for size in range(1, order + 1):
        mine, other = grams(reply, size), grams(reference, size)
        row += [sum((mine & other).values()), mine.total(), other.total()]
      rows.append(row)

    def combine(sums: np.ndarray) -> dict[str, Any]:
      table = sums.reshape(*sums.shape[:-1], order, 3)
      hits, mine, other = np.moveaxis(table, -1, 0)
      some = (mine > 0) & (other > 0)
      count = np.maximum(some.sum(-1), 1)
      share = lambda x: np.where(some, hits / np.where(some, x, 1), 0.0)
      p, r = (share(x).sum(-1) / count for x in (mine, other))
      below = beta**2 * p + r
      value = (1 + beta**2) * p * r / np.where(below > 0, below, 1)
      return {'chrf': 100 * value}

    return Scores(np.array(rows, np.float64).reshape(-1, 3 * order), combine)

  return score
