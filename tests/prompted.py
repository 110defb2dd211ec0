"""A federation of classifiers with a prompt and factors, checked by hand.

    h = tanh(E[token] + mean prompt row) (M + s a b),   logits = h[first] H

Float64 references need only these lines: their gradients are differences.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, tree, uploads
from fedjax_llm.nodes import LowRank, Prompt
from fedjax_llm.types import Batch, Codec, Cohort, Model

V, D, C, P, R, T = 9, 4, 3, 2, 2, 3
K, S, B = 3, 2, 4
KEY = jax.random.key(5)
IDS = np.array([4, 0, 2], np.int32)
N = 6
WEIGHT = np.array([3.0, 1.0, 2.0], np.float32)


def base():
  draw = np.random.default_rng(1).normal
  array = lambda *s: jnp.asarray(draw(size=s), jnp.float32)
  return {'embed': array(V, D), 'mix': array(D, D), 'head': array(D, C)}


def prompt():
  rows = np.random.default_rng(2).normal(size=(P, D)) * 0.5
  return {'inputs': Prompt(jnp.asarray(rows, jnp.float32))}


def factors(seed=3):
  rng = np.random.default_rng(seed)
  array = lambda *s: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32)
  return {'q': LowRank(array(D, R), array(R, D), jnp.float32(0.5))}


def stacked(layers=2, rank=4):
  """Factors of several layers, whose products add up."""
  rng = np.random.default_rng(8)
  draw = lambda *s: jnp.asarray(rng.normal(size=s) * 0.4, jnp.float32)
  node = LowRank(draw(layers, D, rank), draw(layers, rank, D), jnp.ones(layers))
  return {'layers': {'q': node}}


def deep_loss(base, params, batch, key):
  """The loss for `stacked` factors."""
  q = params['layers']['q']
  mix = base['mix'] + jnp.sum(q.a @ q.b, 0)
  return LOSS({**base, 'mix': mix}, {}, batch, key)


def _hidden(base, params, batch):
  e = base['embed'][batch.tokens]
  if 'inputs' in params:
    e = e + jnp.mean(params['inputs'].rows, 0)
  mix = base['mix']
  h = jnp.tanh(e) @ mix
  if 'q' in params:
    q = params['q']
    h = h + q.scale * jnp.tanh(e) @ q.a @ q.b
  if 'out' in params:
    h = h + params['out']['bias']
  return h


MODEL = Model(_hidden, lambda base, params, h: h @ base['head'])
LOSS = local.classification(MODEL)


def batches(*lead, seed=4):
  rng = np.random.default_rng(seed)
  shape = (*lead, B, T)
  tokens = rng.integers(0, V, shape).astype(np.int32)
  label = rng.integers(0, C, shape[:-1]).astype(np.int32)
  label[..., -1] = np.where(rng.random(lead) < 0.5, -1, label[..., -1])
  ones = np.ones(shape, np.int32)
  ones[label < 0] = 0  # rows of padding
  where = np.broadcast_to(np.arange(T, dtype=np.int32), shape)
  return Batch(tokens, np.zeros(shape, bool), ones, where.copy(), label)


def cohort(ids=IDS, steps=S, seed=4):
  return Cohort(
    ids=np.asarray(ids, np.int32),
    batches=batches(len(ids), steps, seed=seed),
    weight=WEIGHT[: len(ids)],
    valid=np.ones(len(ids), bool),
  )


def sgd(rate=0.5, **more):
  return local.optimizer('sgd', rate, **more)


def run(algorithm, params, rounds=2, cohorts=None, jit=jax.jit):
  """Every (state, client states, info), the first before any round."""
  state = algorithm.init(KEY, params)
  states = tree.broadcast(algorithm.init_client(state.params), K)
  history: list[Any] = [(state, states, None)]
  step = jit(algorithm.round)
  for number in range(rounds):
    of = cohort() if cohorts is None else cohorts[number]
    state, states, info = step(state, of._replace(states=states), base())
    history.append((state, states, info))
  return history


def client_key(client, round):
  """The key of local training of a client in a round."""
  clients, _ = jax.random.split(jax.random.fold_in(KEY, round))
  return jax.random.split(jax.random.fold_in(clients, int(client)), 4)[2]


def watched(codec=None):
  """The codec, which leaves message and masks in the client's state."""
  codec = codec or uploads.identity()

  def init(update):
    blank = jax.tree.map(lambda u: jnp.zeros(u.shape, bool), update)
    return tree.zeros_like(update), blank

  def encode(update, masks, state, context):
    message, _ = codec.encode(update, masks, (), context)
    wide = lambda u, m: jnp.broadcast_to(m, u.shape)
    return message, (message, tree.map_present(wide, update, masks.trained))

  return Codec(init, encode, codec.decode, codec.num_bytes)


def wire(states, k):
  """The bytes of client k's message."""
  message, sent = states.upload
  pairs = zip(jax.tree.leaves(message), jax.tree.leaves(sent))
  return b''.join(
    np.asarray(x)[k][np.asarray(m)[k]].tobytes() for x, m in pairs
  )


# --------------------------------------------------------- float64, by hand --


def f64(x) -> Any:
  return np.asarray(x, np.float64)


def hidden(tokens, rows=None, *changes):
  """[B, T, D]; changes are matrices [D, D] beside M."""
  w = {name: f64(x) for name, x in base().items()}
  e = w['embed'][tokens]
  if rows is not None:
    e = e + f64(rows).mean(0)
  return np.tanh(e) @ (w['mix'] + sum(changes, np.zeros((D, D))))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits(h):
  return h[:, 0] @ f64(base()['head'])


def rows_of(batch, k, s):
  """The real rows of client k's step s: (tokens, labels)."""
  label = batch.label[k, s]
  return batch.tokens[k, s][label >= 0], label[label >= 0]


def nll(scores, label):
  return -log_softmax(scores)[np.arange(len(label)), label].mean()


def deep_nll(data, a, b):
  """The loss of `deep_loss` on rows (tokens, labels)."""
  tokens, label = data
  return nll(logits(hidden(tokens, None, (a @ b).sum(0))), label)


def deep_step(data, a, b, rate, mask: Any = 1.0):
  """One step of SGD on both factors; mask is [L] or a number."""
  m = np.reshape(mask, (-1, 1, 1))
  g = slope(lambda x: deep_nll(data, x, b), a)
  h = slope(lambda x: deep_nll(data, a, x), b)
  return a - rate * m * g, b - rate * m * h


def slope(of, at, step=1e-5) -> Any:
  """The gradient of a function of one array, by central differences."""
  at = f64(at)
  out = np.zeros_like(at)
  for i in np.ndindex(at.shape):
    up, down = at.copy(), at.copy()
    up[i] += step
    down[i] -= step
    out[i] = (of(up) - of(down)) / (2 * step)
  return out


def mean(stack, weight: Any = WEIGHT) -> Any:
  w = f64(weight) / np.sum(f64(weight))
  return sum(x * y for x, y in zip(w, stack))


def close(x, y, atol=2e-5):
  np.testing.assert_allclose(np.asarray(x), y, atol=atol, rtol=1e-4)


def apart(x, y, by=1e-3):
  assert np.abs(np.asarray(x) - np.asarray(y)).max() > by
