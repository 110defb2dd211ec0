"""LP-FL in NumPy float64: softmax regression on texts with some labels."""

import numpy as np


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def labelled(x, y, w, threshold, soft):
  """Distributions [B, C] of one batch; zeros for a text that is left out.

  y is -1 without a label and -2 on padding.
  """
  q = np.zeros((len(x), w.shape[1]))
  for i, (features, label) in enumerate(zip(x, y)):
    p = softmax(features @ w)
    if label >= 0:
      q[i, label] = 1
    elif label == -1 and p.max() >= threshold:
      if soft:
        q[i] = p
      else:
        q[i, p.argmax()] = 1
  return q


def lp_fl(x, y, w, rate, threshold, soft, rounds):
  """x [K, S, B, D], y [K, S, B]; returns w and how many texts took part."""
  w = np.array(w, np.float64)
  counts = []
  for _ in range(rounds):
    ends, weights = [], []
    for features, labels in zip(np.asarray(x, np.float64), y):
      q = [
        labelled(*step, w, threshold, soft) for step in zip(features, labels)
      ]
      own = np.copy(w)
      for step, target in zip(features, q):
        some = target.sum(-1) > 0
        if some.any():
          error = (softmax(step @ own) - target) * some[:, None]
          own -= rate * step.T @ error / some.sum()
      ends.append(own)
      weights.append(sum((target.sum(-1) > 0).sum() for target in q))
    total = sum(weights)
    w = sum((n / total * end for n, end in zip(weights, ends)), 0.0 * w)
    counts.append(weights)
  return w, np.array(counts)


def fed_rs(x, y, w, rate, alpha, by_counts, rounds):
  """Restricted softmax (Li and Zhan 2021): x [K, S, B, D], y [K, S, B].

  y is below zero on padding and without a label. Returns w after averaging by
  the numbers of labels.
  """
  w = np.array(w, np.float64)
  for _ in range(rounds):
    ends, weights = [], []
    for features, labels in zip(np.asarray(x, np.float64), y):
      n = np.array([(labels == c).sum() for c in range(w.shape[1])])
      a = np.where(n > 0, 1.0, alpha)
      if by_counts:
        a = alpha + (1 - alpha) * n / max(n.max(), 1)
      own = np.copy(w)
      for step, label in zip(features, labels):
        total, some = np.zeros(w.shape), 0
        for row, c in zip(step, label):
          if c < 0:
            continue
          error = softmax(a * (row @ own))
          error[c] -= 1
          total += np.outer(row, a * error)
          some += 1
        if some:
          own -= rate * total / some
      ends.append(own)
      weights.append((labels >= 0).sum())
    w = np.average(ends, axis=0, weights=weights)
  return w
