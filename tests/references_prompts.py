"""Prompt and adapter methods in NumPy float64, as their papers write them."""

import numpy as np
import prompted as toy

# ------------------------------------------------------------------ CMA-ES --


def root(matrix, power):
  values, vectors = np.linalg.eigh(matrix)
  return vectors @ np.diag(values**power) @ vectors.T


def weights(raw, n):
  """Table 1 of arXiv 1604.00772, for raw weights from the best on."""
  raw = toy.f64(raw)
  good, bad = raw[raw > 0], raw[raw < 0]
  mu_eff = good.sum() ** 2 / (good**2).sum()
  c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
  c_mu = min(
    1 - c_1, 2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff)
  )
  w = np.where(raw > 0, raw / good.sum(), 0.0)
  if bad.size:
    mu_bad = bad.sum() ** 2 / (bad**2).sum()
    least = min(
      1 + c_1 / c_mu,
      1 + 2 * mu_bad / (mu_eff + 2),
      (1 - c_1 - c_mu) / (n * c_mu),
    )
    w = w + np.where(raw < 0, least * raw / np.abs(bad).sum(), 0.0)
  return w, mu_eff, c_1, c_mu


class CMA:
  """One strategy; `tell` is a generation."""

  def __init__(self, mean, sigma, C=None):
    n = len(mean)
    self.m, self.sigma = toy.f64(mean), float(sigma)
    self.C = np.eye(n) if C is None else toy.f64(C)
    self.ps, self.pc, self.g = np.zeros(n), np.zeros(n), 0

  def tell(self, xs, values, raw):
    n = len(self.m)
    w, mu_eff, c_1, c_mu = weights(raw, n)
    c_s = (mu_eff + 2) / (n + mu_eff + 5)
    d_s = 1 + 2 * max(0, np.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_s
    c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    ys = [(xs[i] - self.m) / self.sigma for i in np.argsort(values)]
    step = sum(max(a, 0) * y for a, y in zip(w, ys))
    inverse = root(self.C, -0.5)
    self.ps = (1 - c_s) * self.ps + np.sqrt(
      c_s * (2 - c_s) * mu_eff
    ) * inverse @ step
    length = np.linalg.norm(self.ps)
    bound = (1.4 + 2 / (n + 1)) * chi
    calm = float(length / np.sqrt(1 - (1 - c_s) ** (2 * (self.g + 1))) < bound)
    self.pc = (1 - c_c) * self.pc + calm * np.sqrt(
      c_c * (2 - c_c) * mu_eff
    ) * step
    new = (
      1 + c_1 * (1 - calm) * c_c * (2 - c_c) - c_1 - c_mu * w.sum()
    ) * self.C + c_1 * np.outer(self.pc, self.pc)
    for a, y in zip(w, ys):
      if a < 0:
        a *= n / np.linalg.norm(inverse @ y) ** 2
      new = new + c_mu * a * np.outer(y, y)
    self.m = self.m + self.sigma * step
    self.sigma *= np.exp(c_s / d_s * (length / chi - 1))
    self.C, self.g = new, self.g + 1


def fed_bpt(value, normals, dimension, sigma, rounds, clients, mu):
  """`value(k, z)`; `normals[t][k]` are arrays [I, P, D]."""
  server = CMA(np.zeros(dimension), sigma)
  sigma_c = sigma
  population = normals[0][0].shape[1]
  raw = np.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
  for t in range(rounds):
    means, values, squares = [], [], 0.0
    for k in range(clients):
      own = CMA(server.m, sigma_c, server.C)
      for z in normals[t][k]:
        xs = own.m + own.sigma * z @ root(own.C, 0.5)
        own.tell(xs, [value(k, x) for x in xs], raw)
        squares += own.sigma**2
      means.append(own.m)
      values.append(value(k, own.m))
    before = np.sqrt(squares / (clients * mu))
    server.sigma = before
    server.tell(
      np.array(means),
      values,
      np.log(clients + 0.5) - np.log(np.arange(1, clients + 1)),
    )
    sigma_c *= server.sigma / before
  return server, sigma_c


# ----------------------------------------------------------------- prompts --


def loss_of(batch, k, s, rows):
  tokens, label = toy.rows_of(batch, k, s)
  return toy.nll(toy.logits(toy.hidden(tokens, rows)), label)


def local_prompt(batch, k, rows, rate, steps):
  for s in range(steps):
    rows = rows - rate * toy.slope(lambda x, s=s: loss_of(batch, k, s, x), rows)
  return rows


def fed_prompt(batch, rows, rate, rounds, clients, steps):
  for _ in range(rounds):
    ends = [
      local_prompt(batch, k, toy.f64(rows), rate, steps) for k in range(clients)
    ]
    rows = toy.mean(ends)
  return rows


def generate(phi, client, heads):
  """pFedPG's prompt of a client; phi holds d, P and four matrices."""
  d, common, query, key, value, out = phi
  head = d.shape[1] // heads
  seen = []
  for h in range(heads):
    cut = slice(h * head, (h + 1) * head)
    q, k = d[client] @ query[:, cut], common @ key[:, cut]
    score = k @ q / np.sqrt(head)
    share = np.exp(score - score.max())
    seen.append(share / share.sum() @ (common @ value[:, cut]))
  return common + np.concatenate(seen) @ out


def p_fed_pg(phi, batch, ids, rate, server_rate, rounds, steps, heads):
  phi = [toy.f64(x) for x in phi]
  for _ in range(rounds):
    changes = []
    for k, client in enumerate(ids):
      rows = generate(phi, client, heads)
      changes.append(local_prompt(batch, k, rows, rate, steps) - rows)
    new = []
    for i, x in enumerate(phi):

      def along(x, i=i, phi=phi, changes=changes):
        at = [*phi[:i], x, *phi[i + 1 :]]
        each = [
          (generate(at, c, heads) * change).sum()
          for c, change in zip(ids, changes)
        ]
        return toy.mean(each)

      new.append(x + server_rate * toy.slope(along, x))
    phi = new
  return phi


def cosine(x, y):
  return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(
    y, axis=-1
  )  # fmt: skip


def swapped(arrays, i, x):
  """The arrays with x in place i."""
  return [*arrays[:i], x, *arrays[i + 1 :]]


def fed_pgp_loss(data, arrays, mu, t):
  (tokens, label), (sigma, u, v) = data, arrays
  own = sigma + u @ v
  nats = toy.nll(toy.logits(toy.hidden(tokens, own)), label)
  f = [toy.hidden(tokens, rows).mean(1) for rows in (None, sigma, own)]
  near, far = cosine(f[0], f[1]) / t, cosine(f[1], f[2]) / t
  return nats + mu * np.mean(np.log(np.exp(near) + np.exp(far)) - near)


def fed_pgp(batch, sigma, u, v, rate, rounds, clients, steps, mu, t):
  sigma = toy.f64(sigma)
  own = [(toy.f64(u), toy.f64(v))] * clients
  for _ in range(rounds):
    ends = []
    for k in range(clients):
      p = [sigma, *own[k]]
      for s in range(steps):
        data = toy.rows_of(batch, k, s)
        grads = [
          toy.slope(
            lambda x, i=i, p=p, data=data: fed_pgp_loss(
              data, swapped(p, i, x), mu, t
            ),
            p[i],
          )
          for i in range(3)
        ]
        p = [x - rate * g for x, g in zip(p, grads)]
      ends.append(p[0])
      own[k] = tuple(p[1:])
    sigma = toy.mean(ends)
  return sigma, own


# ---------------------------------------------------------------- adapters --


def apart(teacher, student, t):
  """t^2 KL(teacher || student), mean over rows."""
  q, p = toy.log_softmax(teacher / t), toy.log_softmax(student / t)
  return t**2 * (np.exp(q) * (q - p)).sum(-1).mean()


def fed_dat(batch, s, c, scale, rate, rounds, clients, steps, gate, t):
  """s and c are pairs (a, b); returns s and every client's c."""
  s = [toy.f64(x) for x in s]
  own = [[toy.f64(x) for x in c] for _ in range(clients)]
  for _ in range(rounds):
    ends = []
    for k in range(clients):
      mine, theirs = [x.copy() for x in s], own[k]
      for step in range(steps):
        tokens, label = toy.rows_of(batch, k, step)
        see = lambda *changes, tokens=tokens: toy.logits(
          toy.hidden(tokens, None, *changes)
        )
        still = (1 - gate) * scale * s[0] @ s[1]
        student = lambda p, see=see: see(scale * p[0] @ p[1])
        teacher = lambda p, see=see, still=still: see(
          still, gate * scale * p[0] @ p[1]
        )
        z_s, z_t = student(mine), teacher(theirs)

        def of(view, p, fixed, i, x, label=label):
          z = view([*p[:i], x, *p[i + 1 :]])
          return 0.5 * (toy.nll(z, label) + apart(fixed, z, t))

        moved = []
        for view, p, fixed in ((student, mine, z_t), (teacher, theirs, z_s)):
          grads = [
            toy.slope(lambda x, i=i: of(view, p, fixed, i, x), p[i])  # noqa: B023
            for i in range(2)
          ]
          moved.append([x - rate * g for x, g in zip(p, grads)])
        mine, theirs = moved
      ends.append(mine)
      own[k] = theirs
    s = [toy.mean([e[i] for e in ends]) for i in range(2)]
  return s, own
