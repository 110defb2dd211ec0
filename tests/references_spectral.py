"""Rules of 2025 and 2026 on low-rank factors, in NumPy float64.

As the papers write them: clients are loops, products are full matrices. Papers
write W + s B A with B of [outputs, R]; here W + s a b with a of [inputs, R], so
a is their A transposed and b their B.
"""

from typing import Any

import numpy as np
from references_lora import f64, mean_product, shares

TAPS = np.array([1, 4, 6, 4, 1]) / 16


def best(matrix, rank):
  u, s, v = np.linalg.svd(matrix, full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ v[:rank]


def raflora(a, b, scale, ranks, levels, weight, rank) -> Any:
  """Parts between the ranks of the federation (2602.13486, algorithm 1)."""
  a, b = f64(a, b)
  total: Any = 0.0
  for low, high in zip([0, *levels], levels):
    here = [k for k in range(len(a)) if ranks[k] >= high]
    size = sum(weight[k] for k in here)
    for k in here:
      part = a[k][:, low:high] @ b[k][low:high]
      total = total + weight[k] / size * scale[k] * part
  return best(total, rank)


def florist(a, b, scale, weight, energy):
  """The core between two SVDs, cut by energy (2506.09199): p, a, b."""
  w = shares(weight)
  a, b = f64(a, b)
  down = np.concatenate([b[k].T for k in range(len(b))], 1)  # B, [outputs, K R]
  up = np.concatenate([w[k] * scale[k] * a[k].T for k in range(len(a))])
  u_b, s_b, v_b = np.linalg.svd(down, full_matrices=False)
  u_a, s_a, v_a = np.linalg.svd(up, full_matrices=False)
  core = (s_b[:, None] * v_b) @ (u_a * s_a)
  u, s, v = np.linalg.svd(core)
  share = np.cumsum(s**2) / np.sum(s**2)
  p = 1 + int(np.argmax(share >= energy - 1e-12))
  return p, (s[:p, None] * v[:p] @ v_a).T, (u_b @ u[:, :p]).T


def fedmomentum(a, b, scale, weight, rank, energy):
  """The product kept, and the change of the base."""
  u, s, v = np.linalg.svd(mean_product(a, b, scale, weight), False)
  share = np.cumsum(s**2) / np.sum(s**2)
  p = 1 + int(np.argmax(share >= energy - 1e-12))
  part = lambda i, j: (u[:, i:j] * s[i:j]) @ v[i:j]
  return part(0, rank), part(rank, max(p, rank))


def ilora(a, b, scale, weight, rank):
  """Q and T of the mean product by plain QR, cut (2511.16069), as product."""
  q, t = np.linalg.qr(mean_product(a, b, scale, weight).T)
  return (q[:, :rank] @ t[:rank]).T


def fedask(a, b, scale, weight, drawn, rank):
  """Two passes of every client (2507.09990)."""
  w = shares(weight)
  a, b, drawn = f64(a, b, drawn)
  clients = range(len(a))
  first: Any = sum(w[k] * scale[k] * b[k].T @ (a[k].T @ drawn) for k in clients)
  q, _ = np.linalg.qr(first)
  second: Any = sum(w[k] * scale[k] * a[k] @ (b[k] @ q) for k in clients)
  u, s, v = np.linalg.svd(second.T, full_matrices=False)
  left = q @ u[:, :rank] * np.sqrt(s[:rank])  # B
  right = np.sqrt(s[:rank])[:, None] * v[:rank]  # A
  return (left @ right).T


def glora(a, b, scale, weight, frame, rank):
  """The mean in the leading vectors of the mean projector (2605.06733)."""
  w = shares(weight)
  a, b = f64(a, b)
  project: Any = 0.0
  for k in range(len(b)):
    u, s, _ = np.linalg.svd(b[k].T, full_matrices=False)
    u = u[:, s > 1e-9]
    project = project + u @ u.T / len(b)
  _, vectors = np.linalg.eigh(project)
  u = vectors[:, ::-1][:, :frame]
  inside: Any = sum(
    w[k] * scale[k] * (u.T @ b[k].T) @ a[k].T for k in range(len(a))
  )
  return best((u @ inside).T, rank)


def flora_na(a, b, weight, sweeps):
  """Alternating least squares over vec of full matrices (2509.26399)."""
  w = shares(weight)
  a, b = f64(a, b)
  goal = mean_product(a, b, np.ones(len(a)), weight).ravel()
  here = np.flatnonzero(w)
  p, q = w.copy(), w.copy()
  for _ in range(sweeps):
    mean_a = np.tensordot(q, a, 1)
    columns = np.stack([(mean_a @ b[k]).ravel() for k in here], 1)
    p[here] = np.linalg.lstsq(columns, goal, rcond=None)[0]
    mean_b = np.tensordot(p, b, 1)
    columns = np.stack([(a[k] @ mean_b).ravel() for k in here], 1)
    q[here] = np.linalg.lstsq(columns, goal, rcond=None)[0]
  return np.tensordot(q, a, 1), np.tensordot(p, b, 1)


def pursuit(d, steps=30):
  """L of D = L + S, by the inexact augmented Lagrangian of robust PCA."""
  strength = 1 / np.sqrt(max(d.shape))
  norm = np.linalg.norm(d, 2)
  y = d / max(norm, np.abs(d).max() / strength)
  low, sparse, mu = np.zeros_like(d), np.zeros_like(d), 1.25 / norm
  for _ in range(steps):
    u, s, v = np.linalg.svd(d - sparse + y / mu, full_matrices=False)
    low = (u * np.maximum(s - 1 / mu, 0)) @ v
    x = d - low + y / mu
    sparse = np.sign(x) * np.maximum(np.abs(x) - strength / mu, 0)
    y, mu = y + mu * (d - low - sparse), 1.5 * mu
  return low


def fedrpca(update, weight, beta):
  """The mean of L and beta times that of S, of one matrix (2506.01194)."""
  (u,) = f64(update)
  d = u.reshape(len(u), -1).T
  low = pursuit(d)
  return ((low + beta * (d - low)) @ shares(weight)).reshape(u.shape[1:])


def florg(each, old, weight):
  """The mean Gram matrix, cut to R, and turned onto the old factor."""
  w = shares(weight)
  each, old = f64(each, old)
  gram: Any = sum(w[k] * g.T @ g for k, g in enumerate(each))
  values, vectors = np.linalg.eigh(gram)
  rank = old.shape[0]
  values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
  new = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
  u, _, v = np.linalg.svd(old @ new.T)
  return u @ v @ new


# ------------------------------------------------------- rounds of clients --


def gradient(w, s, a, b, x, y, m):
  """Gradients of both factors in `toy`'s regression, of the token mean."""
  x, y, m = f64(x, y, m)
  error = x @ (w + s * a @ b) - y
  g = x.T @ (error * m[:, None]) / m.sum()
  return s * g @ b.T, s * a.T @ g


def smoothed(g):
  """Rows of g convolved with the five taps, borders mirrored."""
  wide = np.pad(g, [(0, 0), (2, 2)], mode='symmetric')
  return np.stack([np.convolve(row, TAPS, 'valid') for row in wide])


def la_lora(w, s, a, b, batches, rate, smooth):
  """One client: b in steps 1, 3, ..., a in steps 2, 4, ... (2602.19926)."""
  a, b = f64(a, b)
  for i, (x, y, m) in enumerate(b_ for b_ in batches if b_[2].any()):
    g_a, g_b = gradient(w, s, a, b, x, y, m)
    if i % 2 == 0:
      b = b - rate * (smoothed(g_b) if smooth else g_b)
    else:
      a = a - rate * (smoothed(g_a.T).T if smooth else g_a)
  return a, b


def sketched(w, s, a, b, batches, rate, chosen, factor):
  """One client of FSLoRA or Fed-PLoRA: the changes of its columns.

  `factor` is R / r of a sketch; None: the other columns stay in the forward.
  """
  a, b = f64(a, b)
  start = a.copy(), b.copy()
  keep = np.diag(chosen.astype(float))
  inside = np.eye(len(keep)) if factor is None else keep
  size = s if factor is None else s * factor
  for x, y, m in batches:
    if m.any():
      g_a, g_b = gradient(w, size, a @ inside, inside @ b, x, y, m)
      a, b = a - rate * g_a @ keep, b - rate * keep @ g_b
  return a - start[0], b - start[1]


# ----------------------------------------------------------------- experts --


def leased(x, a, b, scale, router, cluster, used):
  """FedLEASE's output for one token: the top M of 2 M - 1 router outputs."""
  x, a, b, router = f64(x, a, b, router)
  num = len(a)  # the places of experts; the first `used` are in use
  outputs = [*range(used), *range(num, num + used - 1)]
  score = np.array([x @ router[:, o] for o in outputs])
  p = np.exp(score - score.max())
  p = p / p.sum()
  top = np.argsort(-p)[:used]
  y: Any = 0.0
  for i in top:
    expert = outputs[i] if outputs[i] < num else cluster
    y = y + p[i] / p[top].sum() * scale * x @ a[expert] @ b[expert]
  return y


def silhouette(apart, labels):
  scores = []
  for i in range(len(labels)):
    inside = [
      j for j in range(len(labels)) if labels[j] == labels[i] and j != i
    ]
    if not inside:
      scores.append(0.0)
      continue
    a = np.mean([apart[i, j] for j in inside])
    b = min(
      np.mean([apart[i, j] for j in range(len(labels)) if labels[j] == other])
      for other in set(labels) - {labels[i]}
    )
    scores.append((b - a) / max(a, b))
  return np.mean(scores)
