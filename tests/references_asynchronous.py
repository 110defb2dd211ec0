"""NumPy float64 references of asynchronous methods, written from the papers."""

import numpy as np


def align_fed(update, late, count, gamma, epsilon, keep):
  """Equations 5, 7 and 8 of arXiv 2606.08197: updates [K, P] -> delta [P]."""
  update = np.asarray(update, np.float64)
  centred = []
  for k in range(len(update)):
    same = [j for j in range(len(update)) if late[j] == late[k]]
    centred.append(update[k] - sum(update[j] for j in same) / len(same))
    if keep and len(same) == 1:
      centred[k] = update[k]
  scores = [
    -gamma * late[k]
    - np.log(count[k] + 1) / 2
    - np.log(np.sqrt((centred[k] ** 2).sum()) + epsilon)
    for k in range(len(update))
  ]
  weight = np.exp(np.array(scores) - max(scores))
  weight /= weight.sum()
  return np.einsum('k,kp->p', weight, np.array(centred))


def anchored(x, w, start, pull):
  """The gradient of lambda / n sum_i ||x_i w - x_i start||^2, [D, F]."""
  x, w, start = (np.asarray(v, np.float64) for v in (x, w, start))
  total = np.zeros(w.shape)
  for row in x:
    total += np.outer(row, row @ (w - start))
  return 2 * pull * total / len(x)
