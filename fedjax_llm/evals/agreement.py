"""Agreement of predicted and true classes: accuracy, F1, MCC, calibration."""

from typing import Any

import numpy as np

from fedjax_llm.evals.intervals import Scores


def classes(predicted: np.ndarray, true: np.ndarray, num: int) -> Scores:
  """Returns accuracy, macro and micro F1, and Matthews' correlation.

      F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c),
      MCC = (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)),

  with c right ones of s, and p_k and t_k predictions and examples of class k
  (Gorodkin 2004). The macro mean is over classes that are predicted or true;
  the F1 of classes without either is not defined. Micro F1 equals accuracy.

  Args:
    predicted: [n] numbers of classes.
    true: [n] numbers of classes.
    num: the number of classes.

  >>> scores = classes(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)
  >>> metrics = scores.combine(scores.statistics.sum(0))
  >>> {name: round(float(x), 3) for name, x in metrics.items()}
  {'accuracy': 0.667, 'macro_f1': 0.667, 'micro_f1': 0.667, 'mcc': 0.5}
  """
  index = np.asarray(true) * num + np.asarray(predicted)
  statistics = np.zeros((len(index), num * num))
  statistics[np.arange(len(index)), index] = 1

  def combine(sums: np.ndarray) -> dict[str, Any]:
    table = sums.reshape(*sums.shape[:-1], num, num)  # [..., true, predicted]
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    of, said = table.sum(-1), table.sum(-2)
    size, right = of.sum(-1), hits.sum(-1)
    some = (of + said) > 0
    f1 = np.where(some, 2 * hits / np.where(some, of + said, 1), 0.0)
    spread = lambda x: np.square(size) - np.square(x).sum(-1)
    below = np.sqrt(spread(of) * spread(said))
    above = right * size - (of * said).sum(-1)
    accuracy = right / np.maximum(size, 1)
    return {
      'accuracy': accuracy,
      'macro_f1': f1.sum(-1) / np.maximum(some.sum(-1), 1),
      'micro_f1': accuracy,
      'mcc': np.where(below > 0, above / np.where(below > 0, below, 1), 0.0),
    }

  return Scores(statistics, combine)


def calibration(
  confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15
) -> Scores:
  """Returns the expected calibration error.

      ECE = sum_b (n_b / n) |mean correct_b - mean confidence_b|

  over `num_bins` bins of equal width, open on the left (Guo et al. 2017, arXiv
  1706.04599, equation 3).

  Args:
    confidence: [n] probabilities of the predictions.
    correct: [n], 1 for right predictions.
    num_bins: the number of bins.

  >>> scores = calibration(np.array([0.8, 0.8]), np.array([1, 0]), 10)
  >>> round(float(scores.combine(scores.statistics.sum(0))['ece']), 3)
  0.3
  """
  confidence = np.asarray(confidence, np.float64)
  place = np.ceil(confidence * num_bins).astype(int) - 1
  place = np.clip(place, 0, num_bins - 1)
  statistics = np.zeros((len(confidence), 2, num_bins))
  rows = np.arange(len(confidence))
  statistics[rows, 0, place] = np.asarray(correct, np.float64) - confidence
  statistics[rows, 1, place] = 1

  def combine(sums: np.ndarray) -> dict[str, Any]:
    gaps, counts = np.split(sums, 2, axis=-1)
    total = np.maximum(counts.sum(-1), 1)
    return {'ece': np.abs(gaps).sum(-1) / total}

  return Scores(statistics.reshape(len(rows), -1), combine)
