"""NumPy float64 forms of the nodes that are computed from other parameters."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def normed(x, scale, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def _lstm(x, inputs, hidden, bias):
  """One direction over the places of x [P, D], gates i, f, g, o."""
  size = hidden.shape[0]
  h, c, states = np.zeros(size), np.zeros(size), []
  for row in x:
    gates = row @ inputs + h @ hidden + bias
    i, f, g, o = (gates[n * size : (n + 1) * size] for n in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    states.append(h)
  return np.stack(states)


def encoded(rows, mlp, lstm):
  """P-tuning's prompt."""
  x = rows
  for ahead, back in lstm:
    x = np.concatenate([_lstm(x, *ahead), _lstm(x[::-1], *back)[::-1]], -1)
  for number, (kernel, bias) in enumerate(mlp):
    x = x @ kernel + bias
    if number < len(mlp) - 1:
      x = np.maximum(x, 0)
  return x


def projected(rows, inner, last):
  """Keys and values [L, P, F] of a prefix that two layers compute."""
  hidden = np.tanh(rows @ inner[0] + inner[1])
  both = [hidden @ kernel + bias for kernel, bias in zip(*last)]
  half = both[0].shape[-1] // 2
  return (
    np.stack([x[:, :half] for x in both]),
    np.stack([x[:, half:] for x in both]),
  )


def attended(
  queries, query, key, value, out, inner, last, norms, context, client
):
  """FedTPG's prompt."""
  q = normed(queries, *norms[0])
  c = normed(np.concatenate([context, client]), *norms[1])
  heads = []
  for wq, wk, wv in zip(query, key, value):
    scores = (q @ wq) @ (c @ wk).T / math.sqrt(wq.shape[-1])
    heads.append(softmax(scores) @ (c @ wv))
  x = np.concatenate(heads, -1) @ out[0] + out[1]
  both = normed(x, *norms[2]) @ inner[0] + inner[1]
  a, b = np.split(both, 2, -1)
  gelu = b * (1 + _erf(b / math.sqrt(2))) / 2
  return x + (a * gelu) @ last[0] + last[1]


def kronecker(rule, s, t):
  """sum_i A_i (x) (s_i t_i) of one layer."""
  return sum(np.kron(a, si @ ti) for a, si, ti in zip(rule, s, t))


def gated(y, inner, last):
  return y * softmax(np.tanh(y @ inner[0] + inner[1]) @ last[0] + last[1])


def nearest(tokens, keys, top):
  """Indices and cosines of the `top` keys nearest to the mean token."""
  query = tokens.mean(0)
  alike = (keys @ query) / (
    np.linalg.norm(keys, axis=1) * np.linalg.norm(query)
  )
  index = np.argsort(-alike, kind='stable')[:top]
  return index.tolist(), alike[index]


def customised(
  lower, higher, bias, layer, classes, text, down_bias, up_bias, labels,
  y, real, transposed=False,
):  # fmt: skip
  """C2A's bottleneck of one layer [E] on texts y [B, T, F], a loop over texts.

  A neighbour takes the transpose of `down` for `up`.
  """
  size, rank, width = len(layer), len(down_bias), y.shape[-1]
  h = (lower @ higher).reshape(size, -1) + bias
  units = []
  for text_states, here in zip(y, real):
    if here.any():
      mean = text_states[here].mean(0)
      units.append(mean / np.linalg.norm(mean))
  z = np.mean(units, axis=0)
  code = labels @ classes[0] + classes[1] + layer + z @ text[0] + text[1]
  w = code @ np.stack([row / np.linalg.norm(row) for row in h])
  down, up = w.reshape(width, rank), w.reshape(rank, width)
  inner = y @ down + down_bias
  inner = inner * (1 + _erf(inner / math.sqrt(2))) / 2
  return y + inner @ (down.T if transposed else up) + up_bias
