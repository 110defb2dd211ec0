"""Split learning in NumPy float64, as loops over steps and clients.

The network is h = tanh(x c), prediction h v, with the loss (h v - y)^2 / 2 for
every row; c is on the clients, v on the server. What crosses the cut is passed
as in a deployment: h and y up, the gradient of h down.
"""

import numpy as np


def below(c, x):
  return np.tanh(x @ c)


def above(v, h, y):
  """The server's half of a step: (gradient of v, gradient of h, loss sum)."""
  error = h @ v - y  # [B, O]
  return h.T @ error, error @ v.T, 0.5 * np.sum(error**2)


def back(x, h, answer):
  """The client's half: the gradient of c from that of its states."""
  return x.T @ (answer * (1 - h**2))


def round(c, v, x, y, *, rate, order, average, weight):
  """One round: clients' parts c [K, D, H] and v after S steps.

  x is [K, S, B, D] and y [K, S, B, O].
  """
  c, v = np.array(c, np.float64), np.array(v, np.float64)
  num, steps, rows = x.shape[:3]
  for s in range(steps):
    slopes_c, slopes_v = [], []
    for k in range(num):
      h = below(c[k], x[k, s])
      to_v, answer, _ = above(v, h, y[k, s])
      slopes_c.append(back(x[k, s], h, answer / rows))
      if order == 'sequential':
        v = v - rate * to_v / rows
      slopes_v.append(to_v)
    if order == 'parallel':
      v = v - rate * sum(slopes_v) / (num * rows)
    c = c - rate * np.array(slopes_c)
  if average:
    c = np.broadcast_to(np.average(c, 0, weight), c.shape)
  return c, v
