"""A federation of image classifiers by names, checked by hand.

    t_c = unit(tanh(name_c + sum_p a_p row_p) W)        a_p = 1, 1/2, 1/3, ...
    v_m = tanh(pixel_m A + sum_p a_p row_p B),    f = mean_m v_m + v_0
    logits = 4 cos(f, t_c)

Float64 references need only these lines: their gradients are differences.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prompted import IDS, KEY, WEIGHT, f64, log_softmax, slope, watched

from fedjax_llm import local, tree
from fedjax_llm.local import class_names
from fedjax_llm.nodes import Pictures, Towers
from fedjax_llm.nodes.scores import unit
from fedjax_llm.types import Cohort, Images

C, D, E, V, P, M, N = 4, 4, 3, 5, 2, 6, 6
K, S, B = 3, 2, 4
SCALE = 4.0


@functools.cache
def base(num_classes=C, features=E):
  draw = np.random.default_rng(1).normal
  array = lambda *s: jnp.asarray(draw(size=s), jnp.float32)
  sides = {'mix': D, 'eye': 3, 'front': V}
  parts = {name: array(side, features) for name, side in sides.items()}
  return {**parts, 'names': array(C + 3, D)[:num_classes]}


def _sum(rows, where):
  weights = 1.0 / (1 + np.arange(rows.shape[-2]))
  return where.einsum('...pd,p->...d', rows, weights.astype(rows.dtype))


def seen(base, params, batch):
  del params

  def texts(rows):
    inner = base['names']
    if rows is not None:
      inner = inner + _sum(rows, jnp)
    return unit(jnp.tanh(inner) @ base['mix'])

  def images(rows=None):
    inner = jnp.reshape(batch.pixels, (-1, M, 3)) @ base['eye']
    if rows is not None:
      change = _sum(rows, jnp) @ base['front']  # [E], or [B, E]
      inner = inner + jnp.expand_dims(change, -2)
    patches = jnp.tanh(inner)
    return Pictures(patches.mean(1) + patches[:, 0], patches)

  return Towers(texts, images, jnp.float32(SCALE))


LOSS = class_names.by_names(seen)


def batches(*lead, seed=4, labels=C):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, labels, (*lead, B)).astype(np.int32)
  label[..., -1] = np.where(rng.random(lead) < 0.5, -1, label[..., -1])
  pixels = rng.normal(size=(*lead, B, M, 1, 3)).astype(np.float32)
  return Images(pixels, label, label >= 0)


def cohort(labels=C, seed=4):
  return Cohort(
    ids=np.asarray(IDS, np.int32),
    batches=batches(K, S, labels=labels, seed=seed),
    weight=WEIGHT,
    valid=np.ones(K, bool),
  )


def sgd(rate=0.5):
  return local.optimizer('sgd', rate)


def run(build, params, rounds=2, of=None, **settings):
  """Every (state, client states, info) of a recipe, the first before any."""
  algorithm = build(LOSS, sgd(), upload=watched(), **settings)
  state = jax.jit(algorithm.init)(KEY, params)
  states = tree.broadcast(algorithm.init_client(state.params), K)
  history: list[Any] = [(state, states, None)]
  step = jax.jit(algorithm.round)
  for _ in range(rounds):
    of = cohort() if of is None else of
    state, states, info = step(state, of._replace(states=states), base())
    history.append((state, states, info))
  return algorithm, history


# --------------------------------------------------------- float64, by hand --


@functools.cache
def _weights(names=C):
  return {name: f64(x) for name, x in base(names).items()}


def length(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True))


def texts(rows=None, names=C):
  w = _weights(names)
  inner = w['names'] if rows is None else w['names'] + _sum(f64(rows), np)
  return length(np.tanh(inner) @ w['mix'])


def patches(pixels, rows=None):
  w = _weights()
  inner = f64(pixels).reshape(-1, M, 3) @ w['eye']
  if rows is not None:
    inner = inner + np.expand_dims(_sum(f64(rows), np) @ w['front'], -2)
  return np.tanh(inner)


def pooled(pixels, rows=None):
  v = patches(pixels, rows)
  return v.mean(1) + v[:, 0]


def logits(pixels, names):
  return SCALE * length(pooled(pixels)) @ names.T


def step_of(batch, k, s):
  """The real rows of client k's step s: (pixels, labels)."""
  real = batch.label[k, s] >= 0
  return batch.pixels[k, s][real], batch.label[k, s][real]


def stepped(loss, now, rate=0.5):
  """One step of SGD on all arrays of a list, for `loss(arrays)`."""
  now = [f64(x) for x in now]

  def of(i):
    return lambda x: loss([*now[:i], x, *now[i + 1 :]])

  return [x - rate * slope(of(i), x) for i, x in enumerate(now)]


def trained(loss, k, now):
  """The ends of client k's steps, for `loss(pixels, labels, arrays)`."""
  data = cohort().batches
  for s in range(S):
    now = stepped(functools.partial(loss, *step_of(data, k, s)), now)
  return now


def nll(scores, label):
  return -log_softmax(scores)[np.arange(len(label)), label].mean()
