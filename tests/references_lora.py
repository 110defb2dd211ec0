"""Rules on low-rank factors in NumPy float64, as the papers write them.

Clients are loops, products are full matrices, and W + s B A is kept in the
orientation of this code base: W + s a b, a of [D, R], b of [R, F].
"""

from typing import Any

import numpy as np


def f64(*xs):
  return [np.asarray(x, np.float64) for x in xs]


def shares(weight):
  (w,) = f64(weight)
  return w / w.sum()


def mean_product(a, b, scale, weight) -> Any:
  """sum_k w_k s_k a_k b_k: what the clients computed."""
  w = shares(weight)
  a, b, scale = f64(a, b, scale)
  return sum(w[k] * scale[k] * a[k] @ b[k] for k in range(len(a)))


def mean_factors(a, b, weight) -> Any:
  w = shares(weight)
  a, b = f64(a, b)
  one = sum(w[k] * a[k] for k in range(len(a)))
  two = sum(w[k] * b[k] for k in range(len(b)))
  return one, two


def fedex(a, b, scale, weight):
  """Mean factors and the residual of the base (arXiv 2410.09432)."""
  mean_a, mean_b = mean_factors(a, b, weight)
  residual = mean_product(a, b, scale, weight) - scale[0] * mean_a @ mean_b
  return mean_a, mean_b, residual


def flexlora(a, b, scale, weight, rank):
  """The best product of that rank, as a matrix (arXiv 2402.11505)."""
  u, s, v = np.linalg.svd(mean_product(a, b, scale, weight))
  return (u[:, :rank] * s[:rank]) @ v[:rank]


def lora_fair(a, b, weight, penalty):
  """b + c by least squares: rows stacked with sqrt(penalty) I."""
  mean_a, mean_b = mean_factors(a, b, weight)
  ones = np.ones(len(a))
  missed = mean_product(a, b, ones, weight) - mean_a @ mean_b
  rank = mean_a.shape[1]
  left = np.concatenate([mean_a, np.sqrt(penalty) * np.eye(rank)])
  right = np.concatenate([missed, np.zeros((rank, missed.shape[1]))])
  return mean_a, mean_b + np.linalg.lstsq(left, right, rcond=None)[0]


def het_lora(a, b, scale):
  """Means weighted by the norms of the products (arXiv 2401.06432)."""
  a, b, scale = f64(a, b, scale)
  norms = [np.linalg.norm(scale[k] * a[k] @ b[k]) for k in range(len(a))]
  return mean_factors(a, b, norms)


def rbla(a, b, ranks, weight, old_a, old_b):
  """Rank by rank over the holders (arXiv 2408.08699)."""
  a, b, new_a, new_b = f64(a, b, old_a, old_b)
  new_a, new_b = new_a.copy(), new_b.copy()
  for i in range(a.shape[-1]):
    holders = [k for k in range(len(a)) if ranks[k] > i]
    total = sum(weight[k] for k in holders)
    if total:
      new_a[:, i] = sum(weight[k] * a[k][:, i] for k in holders) / total
      new_b[i] = sum(weight[k] * b[k][i] for k in holders) / total
  return new_a, new_b


def replication(a, b, ranks, weight, old_a, old_b):
  """Missing ranks from the largest clients (arXiv 2406.17477)."""
  a, b, old_a, old_b = f64(a, b, old_a, old_b)
  top = [k for k in range(len(a)) if ranks[k] == max(ranks)]
  total = sum(weight[k] for k in top)
  copy_a: Any = sum(weight[k] * a[k] for k in top) / total
  copy_b: Any = sum(weight[k] * b[k] for k in top) / total
  full_a, full_b = a.copy(), b.copy()
  for k in range(len(a)):
    for i in range(ranks[k], a.shape[-1]):
      seen = i < max(ranks)
      full_a[k][:, i] = copy_a[:, i] if seen else old_a[:, i]
      full_b[k][i] = copy_b[i] if seen else old_b[i]
  return mean_factors(full_a, full_b, weight)


def effective_rank(product):
  s = np.linalg.svd(product, compute_uv=False)
  return (s**2).sum() ** 2 / (s**4).sum() if s.any() else 0.0


def fedsvd(a, b, scale, weight):
  """Orthonormal a and the rest, for the product of the means (2505.12805)."""
  mean_a, mean_b = mean_factors(a, b, weight)
  product = scale[0] * mean_a @ mean_b
  u, s, v = np.linalg.svd(product, full_matrices=False)
  rank = mean_a.shape[1]
  return u[:, :rank], s[:rank, None] * v[:rank] / scale[0]


def nearest_rotation(m):
  u, _, v = np.linalg.svd(m)
  if np.linalg.det(u @ v) < 0:
    v[-1] *= -1
  return u @ v


def fedrot(a, b, weight, old_a, old_b, aligned, strength):
  """Clients turned onto the server's factor, then the means (2602.23638)."""
  a, b, old_a, old_b = f64(a, b, old_a, old_b)
  turned_a, turned_b = [], []
  for k in range(len(a)):
    m = a[k].T @ old_a if aligned == 'a' else b[k] @ old_b.T
    turn = nearest_rotation(m)
    if strength < 1:
      same = np.eye(len(turn))
      turn = nearest_rotation((1 - strength) * same + strength * turn)
    turned_a.append(a[k] @ turn)
    turned_b.append(turn.T @ b[k])
  return mean_factors(turned_a, turned_b, weight)


def units(start_a, start_b, change_a, change_b, budget):
  """The units of LoRA-A2 over layers [L, ...]: booleans [L, R]."""
  score = np.array(
    [
      [
        np.linalg.norm(change_a[i][:, r]) * np.linalg.norm(start_b[i][r])
        + np.linalg.norm(start_a[i][:, r]) * np.linalg.norm(change_b[i][r])
        for r in range(start_a.shape[-1])
      ]
      for i in range(len(start_a))
    ]
  )
  bound = np.sort(score.ravel())[-budget * len(start_a)]
  return score >= bound
