"""Plans for clients in NumPy float64: knapsacks by trying everything."""

import itertools

import numpy as np


def knapsack(value, size, most, budget):
  """The best counts, and what they are worth, of all that fit."""
  best, worth = np.zeros(len(size), int), -np.inf
  for counts in itertools.product(*(range(n + 1) for n in most)):
    if np.dot(size, counts) <= budget and np.dot(value, counts) > worth + 1e-12:
      best, worth = np.array(counts), np.dot(value, counts)
  return best, worth


def fed_pipe(w, s, a, b, clients, weight, rate, budgets, drawn, num_rounds):
  """The server's factors, and the plan of every round: [T, K, L].

  w [L, D, F], a [L, D, R], b [L, R, F]; y = x sum_l (w + s a b)_l; `clients`
  are lists of steps (x, y); `drawn` [K, L] stands for the first reports.
  """
  server = [np.asarray(x, np.float64) for x in (a, b)]
  num, _, rank = a.shape
  size = np.full(num, a.shape[1] + b.shape[2])
  scores, plans = np.asarray(drawn, np.float64), []

  def slopes(p, x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    g = x.T @ (x @ (w + s * p[0] @ p[1]).sum(0) - y) / len(x)
    t = lambda z: np.swapaxes(z, -1, -2)
    return s * g @ t(p[1]), s * t(p[0]) @ g

  for _ in range(num_rounds):
    plan = np.stack(
      [
        knapsack(v, size, np.full(num, rank), m)[0]
        for v, m in zip(scores, budgets)
      ]
    )
    plans.append(plan)
    above = [np.zeros_like(x) for x in server]
    below = [np.zeros_like(x) for x in server]
    scores = np.zeros_like(scores)
    for k, steps in enumerate(clients):
      columns = np.arange(rank) < plan[k][:, None]  # [L, R]
      masks = (columns[:, None, :], columns[:, :, None])
      p = [x.copy() for x in server]
      for step in steps:
        moved = slopes(p, *step)
        p = [x - rate * m * d for x, m, d in zip(p, masks, moved)]
      each = [slopes(p, *step) for step in steps]
      mean = [np.mean([one[i] for one in each], 0) for i in (0, 1)]
      of_a, of_b = (np.abs(x * g) for x, g in zip(p, mean))
      scores[k] = (of_a.mean(1) + of_b.mean(2)).mean(1)
      for i in (0, 1):
        above[i] += weight[k] * masks[i] * (p[i] - server[i])
        below[i] += weight[k] * masks[i]
    server = [
      x + np.divide(n, d, out=np.zeros_like(n), where=d > 0)
      for x, n, d in zip(server, above, below)
    ]
  return server, np.array(plans)
