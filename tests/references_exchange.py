"""Exchange of predictions in NumPy float64, and alignment by brute force."""

import functools

import numpy as np


@functools.cache
def distance(a, b):
  """The least number of insertions, deletions and replacements."""
  if not a or not b:
    return len(a) + len(b)
  if a[0] == b[0]:
    return distance(a[1:], b[1:])
  return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


def paths(n, m):
  """All monotone paths from (0, 0) to (n - 1, m - 1)."""
  if n == m == 1:
    return [[(0, 0)]]
  result = []
  for i, j in ((n - 1, m - 1), (n - 1, m), (n, m - 1)):
    if i and j:
      result += [[*path, (n - 1, m - 1)] for path in paths(i, j)]
  return result


def nearest(word, words):
  """The place of the nearest word, of several the first in order of bytes."""
  least = min(distance(word, x) for x in words)
  return words.index(min(x for x in words if distance(word, x) == least))


def log_softmax(logits):
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def text_loss(logits, tokens, counted):
  """Mean nats of one text: logits [T, V] at t predict token t + 1."""
  terms = [
    -log_softmax(logits[t - 1].astype(float))[tokens[t]]
    for t in range(1, len(tokens))
    if counted[t]
  ]
  return np.mean(terms)


def targets(logits, places, table, tokens, num, size):
  """Teacher's distributions on the receiver's vocabulary, [T, V].

  logits [T', V'] of the sender; row t is that of the receiver's token t.
  """
  result = np.zeros((len(tokens), size))
  for t in range(1, len(tokens)):
    if places[t] < 1:
      result[t, tokens[t]] = 1
      continue
    row = logits[places[t] - 1].astype(float)
    some = {}
    for sent in np.argsort(-row, kind='stable')[:num]:
      some.setdefault(int(table[sent]), row[sent])
    top = np.exp(log_softmax(np.array(list(some.values()))))
    result[t, list(some)] = top
  return result


def distillation(logits, teacher, tokens, counted, selected, weight):
  """lambda L_FT + (1 - lambda) L_KD of texts [B, ...], token means."""
  hard, soft = [], []
  for b in range(len(tokens)):
    for t in range(1, len(tokens[b])):
      if counted[b][t]:
        log_p = log_softmax(logits[b, t - 1].astype(float))
        hard.append(-log_p[tokens[b][t]])
        if selected[b]:
          soft.append(-np.sum(teacher[b][t] * log_p))
  return weight * np.mean(hard) + (1 - weight) * (np.mean(soft) if soft else 0)
