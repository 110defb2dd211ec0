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


# A bigram model: the logits after token a are w[a], [V, V].


def softmax(x):
  return np.exp(log_softmax(x))


def slope(w, texts, targets_of):
  """Mean gradient of -sum q log p over the tokens that have a target."""
  total, number = np.zeros_like(w), 0
  for tokens, counted, q in zip(*texts, targets_of, strict=True):
    for t in range(1, len(tokens)):
      if counted[t] and q is not None:
        total[tokens[t - 1]] += softmax(w[tokens[t - 1]]) - q[t]
        number += 1
  return total / max(number, 1)


def own_targets(texts, size):
  return [np.eye(size)[tokens] for tokens in texts[0]]


def knowledge(w, texts):
  """Losses [B] and logits [B, T, V], where row t predicts token t + 1."""
  logits = [w[tokens] for tokens in texts[0]]
  each = zip(logits, *texts, strict=True)
  return np.array([text_loss(*one) for one in each]), logits


def teach(w, batches, losses, own, teachers, hard, rate):
  """Steps on public batches; teachers are targets [M][B][T, V]."""
  for m, texts in enumerate(batches):
    size = w.shape[1]
    soft = [
      q if losses[m][b] < own[m][b] else None for b, q in enumerate(teachers[m])
    ]
    step = hard * slope(w, texts, own_targets(texts, size))
    step = step + (1 - hard) * slope(w, texts, soft)
    w = w - rate * step
  return w


def round(server, clients, publics, groups, private, ways, num, hard, rate):
  """One round of FedMKT on bigram models: (server, clients).

  publics: of the server, then of each group: [M] of (tokens, counted) [B, T];
  groups [K]; private [K][S] of (tokens, counted); ways[g] = (up, down), each
  (places [M][B][T], table).
  """
  M = len(publics[0])
  trained, told = [], []
  for w, g, steps in zip(clients, groups, private, strict=True):
    for texts in steps:
      w = w - rate * slope(w, texts, own_targets(texts, w.shape[1]))
    trained.append(w)
    told.append([knowledge(w, texts) for texts in publics[1 + g]])
  losses = np.array([[loss for loss, _ in one] for one in told])  # [K, M, B]
  best = losses.argmin(0)
  own = np.array([knowledge(server, texts)[0] for texts in publics[0]])
  size = server.shape[1]
  teachers = []
  for m in range(M):
    rows = []
    for b, k in enumerate(best[m]):
      places, table = ways[groups[k]][0]
      tokens = publics[0][m][0][b]
      rows.append(
        targets(told[k][m][1][b], places[m][b], table, tokens, num, size)
      )
    teachers.append(rows)
  server = teach(server, publics[0], losses.min(0), own, teachers, hard, rate)
  answer = [knowledge(server, texts) for texts in publics[0]]
  final = []
  for k, (w, g) in enumerate(zip(trained, groups, strict=True)):
    places, table = ways[g][1]
    teachers = [
      [
        targets(
          answer[m][1][b], places[m][b], table, publics[1 + g][m][0][b], num,
          w.shape[1],
        )
        for b in range(len(publics[1 + g][m][0]))
      ]
      for m in range(M)
    ]  # fmt: skip
    losses_of = [loss for loss, _ in answer]
    final.append(
      teach(w, publics[1 + g], losses_of, losses[k], teachers, hard, rate)
    )
  return server, final
