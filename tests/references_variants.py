"""Structured adapters and their methods in NumPy float64.

A federation on y = x sum_l W'_l: clients and steps are loops, changes are full
matrices, and gradients are written out by hand from G = x' (error) / B, the
gradient of every W'_l.
"""

import numpy as np


def f64(tree):
  return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def t(x):
  return np.swapaxes(x, -1, -2)


def federated(
  params,
  change,
  pull,
  clients,
  weight,
  rate,
  num_rounds,
  only=None,
  settle=None,
  begin=lambda p, k: p,
  finish=lambda p: p,
):
  """The server's parameters after a few rounds of local SGD and a mean.

  `change(p, t, k)` gives W' [L, D, F], `pull(p, g, t, k)` gradients by name,
  `only(t, k)` names what is trained, `settle(p)` what a client sends of it.
  """
  server, share = f64(params), np.asarray(weight, float) / np.sum(weight)
  for t_ in range(num_rounds):
    ends = []
    for k, steps in enumerate(clients):
      p = begin({name: x.copy() for name, x in server.items()}, k)
      for x, y in steps:
        x, y = np.asarray(x, float), np.asarray(y, float)
        g = x.T @ (x @ change(p, t_, k).sum(0) - y) / len(x)
        slopes = pull(p, g, t_, k)
        for name in slopes if only is None else only(t_, k):
          step = rate[name] if isinstance(rate, dict) else rate
          p[name] = p[name] - step * slopes[name]
      ends.append(p if settle is None else settle(p))
    server = {
      name: sum(share[k] * end[name] for k, end in enumerate(ends))
      for name in ends[0]
    }
    server = finish(server)
  return server


# ------------------------------------------------- W' and gradients by name --


def lora(w, s):
  def change(p, *_):
    return w + s * p['a'] @ p['b']

  def pull(p, g, *_):
    return {'a': s * g @ t(p['b']), 'b': s * t(p['a']) @ g}

  return change, pull


def dora(w, s):
  def parts(p):
    v = w + s * p['a'] @ p['b']
    return v, np.linalg.norm(v, axis=1)

  def change(p, *_):
    v, norm = parts(p)
    return v * (p['m'] / norm)[:, None]

  def pull(p, g, *_):
    v, norm = parts(p)
    turned = g * (p['m'] / norm)[:, None]  # the norm is a constant
    return {
      'a': s * turned @ t(p['b']),
      'b': s * t(p['a']) @ turned,
      'm': (g * v).sum(1) / norm,
    }

  return change, pull


def vera(w, p_, q_):
  def change(p, *_):
    return w + (p_ * p['d'][:, None]) @ q_ * p['b'][:, None]

  def pull(p, g, *_):
    left = (p_ * p['d'][:, None]) @ q_
    along = g @ t(q_ * p['b'][:, None])
    return {'b': (left * g).sum(1), 'd': (p_ * along).sum(1)}

  return change, pull


def heads(w, s, p_, q_):
  """p_ [L, H, D, R], q_ [L, H, R, F]; `g` are the gains."""

  def change(p, *_):
    gain = p['g'][..., None, None] if 'g' in p else 1.0
    return w + s * (p_ @ (gain * p['c']) @ q_).sum(1)

  def pull(p, g, *_):
    inner = s * t(p_) @ g @ t(q_)
    gain = p['g'][..., None, None] if 'g' in p else 1.0
    return {'c': gain * inner, 'g': (p['c'] * inner).sum((-1, -2))}

  return change, pull


def train(w, s, modes):
  """Two modes a side: cores 0 to 3."""

  def change(p, *_):
    full = np.einsum('laip,lpjq,lqkr,lrmb->lijkm', *(p[n] for n in '0123'))
    return w + s * full.reshape(w.shape)

  def pull(p, g, *_):
    c = [p[n] for n in '0123']
    g = s * np.broadcast_to(g, w.shape).reshape(len(w), *modes)
    return {
      '0': np.einsum('lijkm,lpjq,lqkr,lrmb->lip', g, *c[1:])[:, None],
      '1': np.einsum('lijkm,laip,lqkr,lrmb->lpjq', g, c[0], *c[2:]),
      '2': np.einsum('lijkm,laip,lpjq,lrmb->lqkr', g, *c[:2], c[3]),
      '3': np.einsum('lijkm,laip,lpjq,lqkr->lrm', g, *c[:3])[..., None],
    }

  return change, pull


def sparse(w, places):
  def dense(values):
    out = np.zeros((len(w), w[0].size))
    for layer, where in enumerate(places):
      out[layer, where] = values[layer]
    return out.reshape(w.shape)

  def change(p, *_):
    return w + dense(p['v'])

  def pull(p, g, *_):
    return {'v': np.stack([g.ravel()[where] for where in places])}

  return change, pull, dense


def largest(dense, rank, s):
  """a = U_r, b = S_r V_r' / s of every layer."""
  u, size, v = np.linalg.svd(dense, full_matrices=False)
  return u[..., :rank], size[:, :rank, None] * v[:, :rank] / s


def fed_ra(w, s, params, clients, held, rate):
  """Rounds of FedRA: held [T, K, L] says which layers a client has."""
  server = f64(params)
  change, pull = lora(w, s)
  for now in held:
    ends = []
    for mine, steps in zip(now, clients):
      p = {name: x.copy() for name, x in server.items()}
      for x, y in steps:
        x, y = np.asarray(x, float), np.asarray(y, float)
        seen = (change(p) * mine[:, None, None]).sum(0)
        g = x.T @ (x @ seen - y) / len(x)
        for name, slope in pull(p, g).items():
          p[name] = p[name] - rate * slope * mine[:, None, None]
      ends.append(p)
    for name, old in server.items():
      server[name] = np.stack(
        [
          np.mean([e[name][i] for e, m in zip(ends, now) if m[i]], axis=0)
          if now[:, i].any()
          else old[i]
          for i in range(len(old))
        ]
      )
  return server


def fed_hm(decay):
  """W' = a b, with the decay of the product."""

  def change(p, *_):
    return p['a'] @ p['b']

  def pull(p, g, *_):
    g = g + decay * p['a'] @ p['b']
    return {'a': g @ t(p['b']), 'b': t(p['a']) @ g}

  return change, pull


def hafl(w, s, a, b, ranks, clients, weight, rate, num_rounds, beta1, beta2):
  """The server's factors, and which units [T, K, L, R] were trained."""
  server, share = f64({'a': a, 'b': b}), np.asarray(weight, float)
  change, pull = lora(w, s)
  memory = [
    {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in server.items()}
    for _ in clients
  ]
  told = []
  for _ in range(num_rounds):
    top = {name: 0.0 for name in server}
    below, chosen = dict(top), []
    for k, steps in enumerate(clients):
      p = {name: x.copy() for name, x in server.items()}
      slope = {name: 0.0 for name in p}
      for x, y in steps:
        x, y = np.asarray(x, float), np.asarray(y, float)
        g = x.T @ (x @ change(p).sum(0) - y) / len(x)
        for name, part in pull(p, g).items():
          slope[name] = slope[name] + part / len(steps)
      score = {}
      for name in p:
        now = np.abs(p[name] * slope[name])
        old, unsure = memory[k][name]
        old = beta1 * old + (1 - beta1) * now
        unsure = beta2 * unsure + (1 - beta2) * np.abs(now - old)
        memory[k][name], score[name] = (old, unsure), old * unsure
      units = score['a'].mean(-2) + score['b'].mean(-1)
      order = np.argsort(-units, axis=-1, kind='stable')[:, : ranks[k]]
      mine = np.zeros_like(units)
      np.put_along_axis(mine, order, 1.0, axis=-1)
      chosen.append(mine)
      mask = {'a': mine[:, None, :], 'b': mine[:, :, None]}
      for x, y in steps:
        x, y = np.asarray(x, float), np.asarray(y, float)
        g = x.T @ (x @ change(p).sum(0) - y) / len(x)
        for name, part in pull(p, g).items():
          p[name] = p[name] - rate * mask[name] * part
      for name in p:
        top[name] = top[name] + share[k] * mask[name] * (p[name] - server[name])
        below[name] = below[name] + share[k] * mask[name]
    told.append(chosen)
    for name in server:
      some = np.where(below[name] > 0, below[name], 1.0)
      server[name] = server[name] + top[name] / some
  return server, np.array(told)
