"""FedAMoLE in NumPy float64: its layer, its assignment, its rounds.

Slopes are central differences of the loss, so that no derivative is written
twice. A layer is a dictionary: a, b (the shared expert), pool_a, pool_b
[E, ...], router; a client's experts are booleans `held` [L, E].
"""

import functools
import itertools

import numpy as np

FIELDS = ('a', 'b', 'pool_a', 'pool_b', 'router')


def layer(x, w, s, p, held):
  """y [B, F], probabilities [B, E], and which experts a token uses [B, E]."""
  num, _, rank = p['pool_a'].shape
  y = x @ w + s * (x @ p['a']) @ p['b']
  probs, chosen = np.zeros((len(x), num)), np.zeros((len(x), num))
  mine = np.flatnonzero(held)
  if not len(mine):
    return y, probs, chosen
  inner = x @ p['pool_a'][mine]  # [held, B, R]
  alike = np.sum(inner * (x @ p['router']), -1).T / np.sqrt(rank)
  probs[:, mine] = softmax(alike)
  for t in range(len(x)):
    best = mine[np.argsort(-alike[t])[:2]]
    chosen[t, best] = 1
  gates = (probs * chosen) / (probs * chosen).sum(1, keepdims=True)
  parts = s * inner @ p['pool_b'][mine]  # [held, B, F]
  return y + np.sum(gates[:, mine].T[..., None] * parts, 0), probs, chosen


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def balance(probs, chosen, real, held):
  mean = lambda z: z[real].mean(0)
  return held.sum() * mean(probs) @ mean(chosen) / 2


def objective(x, y, w, s, layers, held, strength):
  """The token mean of the loss and of what the balance adds to it."""
  out, term = np.zeros(y.shape), 0.0
  for i, p in enumerate(layers):
    part, probs, chosen = layer(x, w[i], s, p, held[i])
    out += part
    term += balance(probs, chosen, np.ones(len(x), bool), held[i])
  return 0.5 * np.sum((out - y) ** 2) / len(x) + strength * term


def slopes(f, layers, held, h=1e-5):
  """Central differences of f(layers), in the shape of the layers."""
  found = [{n: np.zeros_like(p[n]) for n in FIELDS} for p in layers]
  for p, g, mine in zip(layers, found, held):
    for name in FIELDS:
      for at in np.ndindex(p[name].shape):
        if name.startswith('pool') and not mine[at[0]]:
          continue
        was = p[name][at]
        ends = []
        for value in (was + h, was - h):
          p[name][at] = value
          ends.append(f(layers))
        p[name][at] = was
        g[name][at] = (ends[0] - ends[1]) / (2 * h)
  return found


def embeddings(layers, rows, held):
  """Of a client: means of x A_e [L, E, R], zero where not held, and of x P."""
  x = np.concatenate(rows)
  experts = [
    held[i][:, None] * np.einsum('bd,edr->er', x, p['pool_a']) / len(x)
    for i, p in enumerate(layers)
  ]
  return np.array(experts), np.array(
    [(x @ p['router']).mean(0) for p in layers]
  )


def assignment(score, per_expert, least, most):
  """The best of all ways in which experts choose clients, and its worth."""
  num, clients = score.shape
  best, worth = None, -np.inf
  subsets = list(itertools.combinations(range(clients), per_expert))
  for choice in itertools.product(subsets, repeat=num):
    z = np.zeros((num, clients), bool)
    for e, who in enumerate(choice):
      z[e, list(who)] = True
    sizes = z.sum(0)
    fits = sizes.min() >= least and sizes.max() <= most
    if fits and (score * z).sum() > worth + 1e-12:
      best, worth = z, (score * z).sum()
  return best, worth


def score(experts, tokens, held):
  """Softmax over clients, [L, E, N]: of what N clients reported."""
  rank = tokens.shape[-1]
  out = []
  for i in range(tokens.shape[1]):
    rows = []
    for e in range(held.shape[2]):
      who = np.flatnonzero(held[:, i, e])
      mean = experts[who, i, e].mean(0) if len(who) else np.zeros(rank)
      rows.append(softmax(tokens[:, i] @ mean / np.sqrt(rank)))
    out.append(rows)
  return np.array(out)


def fed_amole(w, s, layers, clients, rate, strength, plan, bounds, num_rounds):
  """Layers of the server, and every round's plan [N, L, E] and reports.

  `clients` are lists of steps (x, y); y' = sum over layers. All take part.
  """
  plans, told = [np.array(plan)], []
  for _ in range(num_rounds):
    plan = plans[-1]
    ends, reports = [], []
    for k, steps in enumerate(clients):
      mine = [{n: p[n].copy() for n in FIELDS} for p in layers]
      for p, held in zip(mine, plan[k]):
        p['pool_a'][~held], p['pool_b'][~held] = 0, 0
      for x, y in steps:
        f = functools.partial(
          objective, x, y, w, s, held=plan[k], strength=strength
        )
        for p, g in zip(mine, slopes(f, mine, plan[k])):
          for name in FIELDS:
            p[name] -= rate * g[name]
      ends.append(mine)
      reports.append(embeddings(mine, [x for x, _ in steps], plan[k]))
    new = []
    for i, p in enumerate(layers):
      q = {
        n: np.mean([end[i][n] for end in ends], 0) for n in ('a', 'b', 'router')
      }
      for name in ('pool_a', 'pool_b'):
        q[name] = p[name].copy()
        for e in range(len(p[name])):
          who = [k for k in range(len(ends)) if plan[k][i][e]]
          if who:
            q[name][e] = np.mean([ends[k][i][name][e] for k in who], 0)
      new.append(q)
    layers = new
    experts, tokens = (np.array(x) for x in zip(*reports))
    told.append((experts, tokens))
    scores = score(experts, tokens, plan)
    best = [assignment(one, *bounds)[0] for one in scores]
    plans.append(np.moveaxis(np.array(best), -1, 0))
  return layers, plans, told
