"""Robust rules and attacks in NumPy float64, written from their papers.

Updates are rows [K, P] of clients that all report; nothing here imports jax.
"""

import math
from statistics import NormalDist

import numpy as np


def geometric_median(u, iterations, smoothing):
  """Algorithm 2 of arXiv 1912.13445, from the coordinate-wise median."""
  v = np.median(u, axis=0)
  for _ in range(iterations):
    b = [1 / max(smoothing, np.linalg.norm(x - v)) for x in u]
    v = sum(w * x for w, x in zip(b, u)) / sum(b)
  return v


def norm_bounding(u, weight, bound):
  """Section 4 of arXiv 1911.07963."""
  total = np.zeros(u.shape[1])
  for x, w in zip(u, weight):
    total += w * x / max(1.0, np.linalg.norm(x) / bound)
  return total / np.sum(weight)


def centred_clipping(u, centre, radius, iterations):
  """Section 4 of arXiv 2012.10333."""
  v = centre
  for _ in range(iterations):
    steps = []
    for x in u:
      gap = np.linalg.norm(x - v)
      steps.append((x - v) * (min(1.0, radius / gap) if gap else 1.0))
    v = v + sum(steps) / len(steps)
  return v


def nearest_mixing(u, f):
  """Algorithm 2 of arXiv 2302.01772: the mixed vectors [K, P]."""
  mixed = []
  for x in u:
    order = sorted(range(len(u)), key=lambda j: np.linalg.norm(u[j] - x))
    mixed.append(np.mean([u[j] for j in order[: len(u) - f]], axis=0))
  return np.array(mixed)


def foolsgold(history, confidence):
  """The weights of algorithm 1 of arXiv 1808.04866 from sums of updates."""
  num = len(history)
  cosine = np.full((num, num), -np.inf)
  for i in range(num):
    for j in range(num):
      if i != j:
        size = np.linalg.norm(history[i]) * np.linalg.norm(history[j])
        cosine[i, j] = history[i] @ history[j] / size
  top = cosine.max(1)
  for i in range(num):
    for j in range(num):
      if i != j and top[j] > top[i] and top[j] > 0:
        cosine[i, j] *= top[i] / top[j]
  a = np.clip(1 - cosine.max(1), 0, 1)
  a = a / a.max()
  for i in range(num):
    if a[i] == 1:
      continue
    if a[i] > 0:
      a[i] = confidence * (math.log(a[i] / (1 - a[i])) + 0.5)
    a[i] = min(max(a[i], 0), 1)
  return a


def product_geometric_median(products, begin, iterations, smoothing):
  """RFA on dense products [K, D, F] from a mean of the rows `begin`."""
  v = np.mean([products[k] for k in begin], axis=0)
  for _ in range(iterations):
    b = [1 / max(smoothing, np.linalg.norm(x - v)) for x in products]
    v = sum(w * x for w, x in zip(b, products)) / sum(b)
  return v


def alie(u, malicious, z=None):
  """Algorithm 3 of arXiv 1902.06156, with minus, on honest statistics."""
  n, m = len(u), int(np.sum(malicious))
  if z is None:
    s = math.floor(n / 2 + 1) - m
    z = NormalDist().inv_cdf((n - m - s) / (n - m))
  honest = u[~malicious]
  return honest.mean(0) - z * honest.std(0)


def ipm(u, malicious, scale):
  """Section 3 of arXiv 1903.03936."""
  return -scale * u[~malicious].sum(0) / np.sum(~malicious)
