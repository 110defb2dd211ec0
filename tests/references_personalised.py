"""Personalised methods in NumPy float64, as their papers write them.

Linear regression with squared errors; W + s a b in the orientation of this code
base. Clients are loops, a round is a loop, and every function returns what the
server and the clients hold at the end of `rounds` rounds.
"""

from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
  """One client's data, a tuple of arrays [S, B, ...]."""

  x: Any
  y: Any
  mask: Any


def clients(rows: Any) -> list[Rows]:
  """[K, S, B, ...] to a list of clients in float64."""
  x, y = (np.asarray(part, np.float64) for part in rows[:2])
  return [Rows(x[k], y[k], np.asarray(rows.mask[k])) for k in range(len(x))]


def slope(weights, row: Rows, t: int):
  """dL/dW of the token mean at step t; None for a step of padding."""
  m = row.mask[t]
  if not m.any():
    return None
  error = row.x[t] @ weights - row.y[t]
  return row.x[t].T @ (error * m[:, None]) / m.sum()


def descend(weights_of, grads_of, params, row, rate, steps) -> Any:
  """SGD on a list of arrays: grads_of(params, dL/dW) gives their gradients."""
  params = [np.float64(p) for p in params]
  for t in steps:
    g = slope(weights_of(params), row, t)
    if g is not None:
      moved = grads_of(params, g)
      params = [p - rate * d for p, d in zip(params, moved)]
  return params


def factors(base, s, row, rate, steps, a, b, only='ab', fixed=0.0):
  """SGD on W + s a b + fixed; returns a, b."""

  def grads(p, g):
    d_a = s * g @ p[1].T if 'a' in only else 0.0
    d_b = s * p[0].T @ g if 'b' in only else 0.0
    return d_a, d_b

  weights = lambda p: base + s * p[0] @ p[1] + fixed
  return descend(weights, grads, (a, b), row, rate, steps)


def mean(stack, weight) -> Any:
  w = np.asarray(weight, np.float64)
  w = w / w.sum()
  return sum(w_k * x for w_k, x in zip(w, stack))


def fed_rep(base, a, b, s, rows, weight, rate, rounds, first=None):
  num = len(rows[0].x)
  head, body = range(num), range(num)
  if first is not None:
    head, body = range(first), range(first, num)
  own = [np.float64(b)] * len(rows)
  for _ in range(rounds):
    bodies = []
    for k, row in enumerate(rows):
      _, own[k] = factors(base, s, row, rate, head, a, own[k], 'b')
      bodies.append(factors(base, s, row, rate, body, a, own[k], 'a')[0])
    a = mean(bodies, weight)
  return a, own


def ditto(base, a, b, s, rows, weight, rate, rounds, strength):
  steps = range(len(rows[0].x))
  own = [(a, b)] * len(rows)
  for _ in range(rounds):
    sent = []
    for k, row in enumerate(rows):

      def grads(p, g, a=a, b=b):
        return (
          s * g @ p[1].T + strength * (p[0] - a),
          s * p[0].T @ g + strength * (p[1] - b),
        )

      weights = lambda p: base + s * p[0] @ p[1]
      own[k] = descend(weights, grads, own[k], row, rate, steps)
      sent.append(factors(base, s, row, rate, steps, a, b))
    a, b = (mean([x[i] for x in sent], weight) for i in (0, 1))
  return (a, b), own


def fed_dpa_t(base, a, b, own_a, s, rows, weight, rate, rounds, share):
  """y = W x + share local x + (1 - share) global x, then global alone."""
  steps = range(len(rows[0].x))
  own = [(own_a, np.zeros_like(b))] * len(rows)
  for t in range(rounds):
    sent = []
    for k, row in enumerate(rows):
      if t > 0:
        still = (1 - share) * s * a @ b
        own[k] = factors(
          base, share * s, row, rate, steps, *own[k], fixed=still
        )
      sent.append(factors(base, s, row, rate, steps, a, b))
    a, b = (mean([x[i] for x in sent], weight) for i in (0, 1))
  return (a, b), own


def fed_dpa_f(base, a, b, s, rows, weight, rate, rounds, federated):
  steps = range(len(rows[0].x))
  own = [(a, b)] * len(rows)
  for t in range(rounds):
    if t < federated:
      sent = [factors(base, s, row, rate, steps, a, b) for row in rows]
      a, b = (mean([x[i] for x in sent], weight) for i in (0, 1))
    else:
      if t == federated:
        own = [(a, b)] * len(rows)
      own = [
        factors(base, s, row, rate, steps, *own[k])
        for k, row in enumerate(rows)
      ]
  return (a, b), own


def fed_lora(base, a, b, s, rows, weight, rate, rounds):
  """Whole matrices theta are shared; a_k and b_k are not."""
  steps = range(len(rows[0].x))
  theta, own = np.float64(base), [(a, b)] * len(rows)
  for _ in range(rounds):
    sent = []
    for k, row in enumerate(rows):
      own[k] = factors(theta, s, row, rate, steps, *own[k])
      still = s * own[k][0] @ own[k][1]
      (mine,) = descend(
        lambda p, still=still: p[0] + still,
        lambda p, g: (g,),
        (theta,),
        row,
        rate,
        steps,
      )
      sent.append(mine)
    theta = mean(sent, weight)
  return theta, own


def fd_lora(base, a, b, s, rows, rate, rounds, every, outer, momentum):
  """Stage one is round 0; then DiLoCo's Nesterov step on theta_s."""
  steps = range(len(rows[0].x))
  one = [1.0] * len(rows)
  own, shared, speed = [(a, b)] * len(rows), (a, b), (0.0, 0.0)
  for t in range(rounds):
    ends = [factors(base, s, row, rate, steps, *shared) for row in rows]
    if t % every == 0:
      own = [tuple(end) for end in ends]
    found = [mean([end[i] for end in ends], one) for i in (0, 1)]
    if t == 0:
      shared = tuple(found)
      continue
    delta = [old - new for old, new in zip(shared, found)]
    speed = [momentum * v + d for v, d in zip(speed, delta)]
    shared = tuple(
      old - outer * (d + momentum * v)
      for old, d, v in zip(shared, delta, speed)
    )
  return shared, own


def perfit(base, a, b, s, rows, weight, rate, rounds, density):
  """Patterns from one pass over the batches; then masked training."""
  steps = range(len(rows[0].x))
  weights = lambda p: base + s * p[0] @ p[1]
  full = lambda p, g: (s * g @ p[1].T, s * p[0].T @ g)
  patterns = []
  for row in rows:
    p = descend(weights, full, (a, b), row, rate, steps)
    count = [row.mask[t].sum() for t in steps]
    found = [slope(weights(p), row, t) for t in steps]
    total = sum(n * g for n, g in zip(count, found) if g is not None)
    grads = full(p, total / sum(count))
    score = np.concatenate([np.abs(x * g).ravel() for x, g in zip(p, grads)])
    keep = np.argsort(-score)[: round(density * score.size)]
    m = np.isin(np.arange(score.size), keep)
    patterns.append(
      (m[: a.size].reshape(a.shape), m[a.size :].reshape(b.shape))
    )
  for _ in range(rounds):
    sent = []
    for row, m in zip(rows, patterns):

      def masked(p, g, m=m):
        return [d * keep for d, keep in zip(full(p, g), m)]

      begin = [x * keep for x, keep in zip((a, b), m)]
      sent.append(descend(weights, masked, begin, row, rate, steps))
    new = []
    for i, old in enumerate((a, b)):
      above = sum(w * m[i] * x[i] for w, m, x in zip(weight, patterns, sent))
      below = sum(
        w * m[i] for w, m in zip(np.asarray(weight, np.float64), patterns)
      )
      mean_of = above / np.where(below > 0, below, 1)
      new.append(np.where(below > 0, mean_of, old))
    a, b = new
  return (a, b), patterns


def cosine(x, y):
  return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def instance_weight(state, others, strength):
  """FedDPA's weight of one text (arXiv 2403.19211)."""
  return strength * np.mean([cosine(state, other) for other in others])


def recall(state, keys, values, p_model, neighbours, weight, temperature):
  """p(y | x) of a model with a memory, [V] (arXiv 1911.00172)."""
  away = np.array([np.sum((state - key) ** 2) for key in keys])
  near = np.argsort(away)[:neighbours]
  share = np.exp(-(away[near] - away[near].min()) / temperature)
  p = np.zeros_like(p_model)
  for i, w in zip(near, share / share.sum()):
    p[values[i]] += w
  return weight * p + (1 - weight) * p_model
