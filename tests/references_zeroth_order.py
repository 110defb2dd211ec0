"""Methods along random directions as loops in NumPy float64.

The loss of a client's step is L(w) = (w - x)' H (w - x) / 2. Directions come as
arrays: their numbers are data here.
"""

import numpy as np


def value(w, x, hessian):
  gap = np.float64(w) - x
  return gap @ hessian @ gap / 2


def central(w, z, x, hessian, mu):
  above, below = (value(w + s * mu * z, x, hessian) for s in (1, -1))
  return (above - below) / (2 * mu)


def forward(w, z, x, hessian, mu):
  return (value(w + mu * z, x, hessian) - value(w, x, hessian)) / mu


def scalars(w, xs, zs, hessian, mu, rate, slope):
  """One client of DeComFL: slopes [S, P] (arXiv 2405.15861, algorithm 2)."""
  w, rows = np.float64(w), []
  for x, directions in zip(xs, zs):
    row = [slope(w, z, x, hessian, mu) for z in directions]
    for g, z in zip(row, directions):
      w = w - rate / len(row) * g * z
    rows.append(row)
  return np.array(rows)


def stepped(w, slopes, zs, rate):
  """w - rate sum_s 1/P sum_p g_sp z_sp."""
  w = np.float64(w)
  for row, directions in zip(slopes, zs):
    for g, z in zip(row, directions):
      w = w - rate / len(row) * g * z
  return w


def trimmed(slopes, number):
  """Per scalar: the mean without the extremes (arXiv 2406.14362)."""
  ordered = np.sort(slopes, axis=0)
  return ordered[number : len(slopes) - number].mean(0)


def histogram(a, places, xs, pool, w_0, hessian, eps, rate):
  """One client of FedKSeed: (h, slopes) (arXiv 2312.06353, algorithm 1)."""
  w = np.float64(w_0)
  for j, c in enumerate(a):
    w = w + c * pool[j]
  h, slopes = np.zeros(len(a)), []
  for j, x in zip(places, xs):
    g = central(w, pool[j], x, hessian, eps)
    w = w - rate * g * pool[j]
    h[j] -= rate * g
    slopes.append(g)
  return h, np.array(slopes)


def chances(places, slopes, num, clip):
  """softmax(minmax(mean |clip(g)|)) (arXiv 2312.06353, section 4.3)."""
  of = [[] for _ in range(num)]
  for j, g in zip(places, slopes):
    of[j].append(min(abs(g), clip))
  means = [np.mean(x) if x else None for x in of]
  typical = np.mean([m for m in means if m is not None])
  m = np.array([typical if x is None else x for x in means])
  e = np.exp((m - m.min()) / (m.max() - m.min()))
  return e / e.sum()


def forward_gradient(w, xs, candidates, last, hessian, h, number):
  """One client of FwdLLM: the mean of its batches' forward gradients."""
  total = np.zeros(len(w))
  for x, drawn in zip(xs, candidates):
    size = np.linalg.norm(last)
    cosine = [v @ last / np.linalg.norm(v) / (size or 1) for v in drawn]
    best = np.argsort(-np.array(cosine), kind='stable')[:number]
    for i in best:
      slope = central(w, drawn[i], x, hessian, h)
      total += slope * drawn[i] / number
  return total / len(xs)
