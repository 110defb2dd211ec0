"""Rules as loops over clients in NumPy float64, written from their papers.

Stacks are arrays [K, ...]; nothing here imports jax.
"""

from decimal import Decimal

import numpy as np


def mean(update, weight):
  """sum_k w_k u_k / sum_k w_k (arXiv 1602.05629, algorithm 1)."""
  total = np.zeros(update.shape[1:])
  for u, w in zip(update, weight):
    total = total + np.float64(w) * np.float64(u)
  size = np.sum(np.float64(weight))
  return total / size if size > 0 else np.zeros_like(total)


def masked_mean(update, mask, weight, denominator):
  """Each entry over the clients that trained it (arXiv 2408.08699)."""
  total = np.zeros(update.shape[1:])
  seen = np.zeros(update.shape[1:])
  for u, m, w in zip(update, mask, weight):
    m = np.broadcast_to(m, u.shape)
    total += np.float64(w) * np.where(m, np.float64(u), 0)
    seen += np.float64(w) * (m if denominator == 'mask' else 1.0)
  return np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)


def control_variate(control, change, valid, num_clients):
  """c + 1/N sum over the clients that took part (arXiv 1910.06378, line 17)."""
  new = np.float64(control)
  for d, v in zip(change, valid):
    if v:
      new = new + np.float64(d) / num_clients
  return new


def median(update, valid):
  """Coordinate by coordinate (arXiv 1803.01498, definition 1)."""
  rows = np.asarray(update, np.float64)[np.asarray(valid)]
  flat = rows.reshape(len(rows), int(np.prod(update.shape[1:])))
  out = np.zeros(flat.shape[1])
  for i in range(flat.shape[1]):
    values = sorted(flat[:, i])
    n = len(values)
    if n:
      out[i] = (values[(n - 1) // 2] + values[n // 2]) / 2
  return out.reshape(update.shape[1:])


def trimmed_mean(update, valid, trim_fraction):
  """Without the extremes on both sides (arXiv 1803.01498, definition 2)."""
  rows = np.asarray(update, np.float64)[np.asarray(valid)]
  flat = rows.reshape(len(rows), int(np.prod(update.shape[1:])))
  out = np.zeros(flat.shape[1])
  cut = int(Decimal(str(trim_fraction)) * len(rows))
  for i in range(flat.shape[1]):
    values = sorted(flat[:, i])
    kept = values[cut : len(values) - cut]
    if kept:
      out[i] = sum(kept) / len(kept)
  return out.reshape(update.shape[1:])


def krum(flat, valid, num_byzantine, num_selected=1):
  """The chosen rows of [K, P], best first (arXiv 1703.02757, section 4).

  Ties by the distance to all clients. Also returns the smallest difference
  between two scores, so that a test can leave out what rounding decides.
  """
  rows = [k for k in range(len(flat)) if valid[k]]
  n = len(rows)
  num_nearest = max(n - num_byzantine - 2, 1)
  keys = {}
  for k in rows:
    distance = sorted(
      float(np.sum((np.float64(flat[k]) - np.float64(flat[j])) ** 2))
      for j in rows
      if j != k
    )
    keys[k] = (round(sum(distance[:num_nearest]), 9), sum(distance), k)
  best = sorted(rows, key=lambda k: keys[k])
  scores = sorted({keys[k][0] for k in rows})
  gap = min(np.diff(scores), default=np.inf)
  return best[: min(num_selected, max(n - num_byzantine, 1))], gap


def fed_avgm(x, m, delta, learning_rate, momentum):
  """Server momentum (arXiv 1909.06335)."""
  m = momentum * m + delta
  return x + learning_rate * m, m


def fed_adaptive(kind, x, m, v, delta, learning_rate, b1, b2, tau):
  """One round of algorithm 2 of arXiv 2003.00295, entry by entry."""
  x, m, v = (np.array(z, np.float64) for z in (x, m, v))
  for i in np.ndindex(x.shape):
    d = float(delta[i])
    m[i] = b1 * m[i] + (1 - b1) * d
    if kind == 'fed_adagrad':
      v[i] = v[i] + d**2
    elif kind == 'fed_yogi':
      v[i] = v[i] - (1 - b2) * d**2 * np.sign(v[i] - d**2)
    elif kind == 'fed_adam':
      v[i] = b2 * v[i] + (1 - b2) * d**2
    else:
      raise ValueError(kind)
    x[i] = x[i] + learning_rate * m[i] / (np.sqrt(v[i]) + tau)
  return x, m, v
