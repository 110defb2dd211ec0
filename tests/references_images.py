"""NumPy float64 references of the methods on dual encoders, from the papers."""

import numpy as np


def partial_plan(similarity, mass, temperature, steps=100):
  """FedOTP, equation 9: scaling iterations of the plan, [M, N]."""
  m, n = similarity.shape
  kernel = np.exp(-(1 - similarity) / temperature)
  v = np.ones(n)
  for _ in range(steps):
    u = np.minimum(1 / m / (kernel @ v), 1)
    v = mass / n / (kernel.T @ u)
  return u[:, None] * kernel * v


def reweighted(f, w1, b1, w2, b2):
  """FedCLIP: softmax(tanh(f W1 + b1) W2 + b2) * f, [B, E]."""
  x = np.tanh(f @ w1 + b1) @ w2 + b2
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True) * f


def symmetric(logits):
  """CLIP's loss of matched pairs, logits [B, B]: the mean over pairs."""

  def one(x):
    x = x - x.max(-1, keepdims=True)
    return -np.diag(x - np.log(np.exp(x).sum(-1, keepdims=True)))

  return (one(logits) + one(logits.T)).mean() / 2


def contrast(near, far, temperature):
  """FedPGP: cross-entropy of [near, far] / temperature with the target 0."""
  x = np.stack([near, far], -1) / temperature
  x = x - x.max(-1, keepdims=True)
  return -(x - np.log(np.exp(x).sum(-1, keepdims=True)))[..., 0].mean()


def cosine(x, y):
  size = lambda v: np.sqrt((v**2).sum(-1))
  return (x * y).sum(-1) / (size(x) * size(y))


def null_space(rows, kept):
  """FedPR: V2 V2' / ||V2 V2'|| of the last `kept` columns of V, [D, D]."""
  _, _, v = np.linalg.svd(rows.T @ rows)
  last = v[len(v) - kept :].T
  matrix = last @ last.T
  return matrix / np.linalg.norm(matrix)


def layer_norm(x, scale, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def shares(f, query, temperature):
  """FedAPT: softmax of standardised domain logits, [B, N]."""
  d = f @ query
  d = (d - d.mean(1, keepdims=True)) / d.std(1, ddof=1, keepdims=True)
  d = d / temperature
  e = np.exp(d - d.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def attention(q, experts, parts):
  """pFedMoAP's gate: heads one by one, q [B, d] and experts [X, C, d]."""
  wq, bq, wk, bk, wv, bv, wo, bo = parts
  out = np.zeros((len(q), experts.shape[1], wo.shape[-1])) + bo
  for h in range(wq.shape[1]):
    queries, keys = q @ wq[:, h] + bq[h], experts @ wk[:, h] + bk[h]
    near = 10 * np.einsum('bk,xck->bcx', queries, keys)
    share = np.exp(near - near.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    values = experts @ wv[:, h] + bv[h]
    out = out + np.einsum('bcx,xck->bck', share, values) @ wo[h]
  return out


def apart(features):
  """FedMGP: the mean L1 distance a feature over pairs, [G, B, E] -> [B]."""
  pairs = [(g, h) for h in range(len(features)) for g in range(h)]
  far = [np.abs(features[g] - features[h]).mean(-1) for g, h in pairs]
  return np.mean(far, axis=0)


def drawn(groups, common, temperature, noise, number):
  """FedMGP: groups one by one from the softmax of the rest, by noise.

  The arg max of logits plus Gumbel noise is a draw from their softmax, and of
  those that are left one from the softmax of these.
  """
  flat = lambda x: np.reshape(x, -1)
  near = [max(cosine(flat(g), flat(c)) for c in common) for g in groups]
  left, order = list(range(len(groups))), []
  for _ in range(number):
    best = max(left, key=lambda g: near[g] / temperature + noise[g])
    left.remove(best)
    order.append(best)
  return order


def mixed(prompts, parts, heads):
  """PLAN's aggregator: attention over clients at each place, [N, P, D]."""
  w, b, wo, bo, w1, b1, w2, b2, g1, s1, g2, s2 = parts
  width = prompts.shape[-1]
  each, out = width // heads, np.zeros_like(prompts)
  for p in range(prompts.shape[1]):
    x = prompts[:, p]  # [N, D]
    q, k, v = np.split(x @ w + b, 3, axis=-1)
    seen = []
    for h in range(heads):
      at = slice(h * each, (h + 1) * each)
      near = q[:, at] @ k[:, at].T / np.sqrt(each)
      share = np.exp(near - near.max(-1, keepdims=True))
      seen.append(share / share.sum(-1, keepdims=True) @ v[:, at])
    z = layer_norm(x + np.concatenate(seen, -1) @ wo + bo, g1, s1)
    ends = np.maximum(z @ w1 + b1, 0) @ w2 + b2
    out[:, p] = layer_norm(z + ends, g2, s2)
  return out


class Adam:
  """Adam on a list of arrays, from its paper."""

  def __init__(self, rate):
    self.rate, self.t, self.m, self.v = rate, 0, 0.0, 0.0

  def step(self, now, grads):
    self.t += 1
    flat = np.concatenate([np.ravel(g) for g in grads])
    self.m = 0.9 * self.m + 0.1 * flat
    self.v = 0.999 * self.v + 0.001 * flat**2
    m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
    change, at, out = self.rate * m / (np.sqrt(v) + 1e-8), 0, []
    for x in now:
      out.append(x - np.reshape(change[at : at + x.size], x.shape))
      at += x.size
    return out


def features(g, y, e):
  """HePCo's generator: arrays as `jax.tree.leaves` lists them."""
  classes, w1, b1, w2, b2, w3, b3, g1, s1, g2, s2 = g
  x = np.concatenate([e, classes[y]], 1)
  for w, b, scale, bias in ((w1, b1, g1, s1), (w2, b2, g2, s2)):
    x = x @ w + b
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * scale + bias, 0)
  return x @ w3 + b3


def weighed(z, rows, keys):
  """HePCo's prompt of each query, [B, Q, V]."""
  near = cosine(z[:, None], keys[None])
  return np.einsum('bn,nqv->bqv', near, rows)
