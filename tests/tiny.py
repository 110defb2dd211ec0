"""A federation on the real transformer, small enough to check by hand."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, models, recipes, tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, ClientState, Cohort

K, S, B, T, V, D, R = 3, 2, 2, 6, 29, 16, 2
KEY = jax.random.key(5)
IDS = np.array([7, 2, 4], np.int32)  # no client stands at its own place


@functools.cache
def loaded(num_layers=1):
  return models.random(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=D,
    num_layers=num_layers,
    num_heads=2,
    num_kv_heads=1,
  )


def base():
  return loaded().base


def loss(base, params, batch, key):
  return local.causal_lm(loaded().model)(base, params, batch, key)


def lora(*targets, seed=1):
  """Factors that are not zero, at matrices of the only layer or the head."""
  params = {}
  rng = np.random.default_rng(seed)
  normal = lambda *s: jnp.asarray(rng.normal(size=s) * 0.2, jnp.float32)
  for target in targets or ('self_attn/q_proj', 'mlp/up_proj'):
    path = target.split('/')
    path = path if target == 'lm_head' else ['layers', *path]
    weight = functools.reduce(lambda t, k: t[k], path, base())['kernel']
    *lead, rows, columns = weight.shape
    node = LowRank(
      normal(*lead, rows, R), normal(*lead, R, columns), jnp.full(lead, 2.0)
    )
    place = params
    for name in path:
      place = place.setdefault(name, {})
    place['kernel'] = node
  return params


def texts(*shape, seed=0, tokens: Any = (1, 20), length=T):
  """Texts of random tokens: the first row whole, the others of any length."""
  rng = np.random.default_rng(seed)
  ends = rng.integers(3, length + 1, (*shape, 1))
  ends[..., 0, :] = length
  here = np.arange(length) < ends
  low, high = tokens
  draw = rng.integers(low, high, (*shape, length)).astype(np.int32)
  return Batch(
    tokens=np.where(here, draw, 0),
    loss_mask=here & (np.arange(length) > 0),
    segments=here.astype(np.int32),
    positions=np.where(here, np.arange(length), 0).astype(np.int32),
  )


def cohort(steps=S, batches=None, ids: Any = IDS, weight=(3.0, 1.0, 2.0)):
  return Cohort(
    ids=np.asarray(ids),
    batches=texts(len(ids), steps, B) if batches is None else batches,
    weight=np.asarray(weight, np.float32)[: len(ids)],
    valid=np.ones(len(ids), bool),
  )


def sgd(learning_rate=0.5):
  return local.optimizer('sgd', learning_rate)


def fresh(algorithm, state, num=K):
  return tree.broadcast(algorithm.init_client(state.params), num)


_jitted = functools.cache(jax.jit)


def run(algorithm, params, cohort, *, state=None, data=None):
  """One compiled round: (state, states, info)."""
  state = algorithm.init(KEY, params) if state is None else state
  if cohort.states == ClientState():
    new = fresh(algorithm, state, len(cohort.ids))
    cohort = cohort._replace(states=new)
  return _jitted(algorithm.round)(state, cohort, base(), data)


def received(algorithm, params, cohort):
  """The first half: (state, what the server receives, info)."""
  state = algorithm.init(KEY, params)
  new = fresh(algorithm, state, len(cohort.ids))
  uploads, _, info = jax.jit(algorithm.train)(
    state, cohort._replace(states=new), base()
  )
  return state, uploads, info


def draw(key, like):
  """Normal numbers for every leaf; a leaf's depend on its path alone."""

  def leaf(path, x):
    name = zlib.crc32(jax.tree_util.keystr(path).encode())
    key_of_leaf = jax.random.fold_in(key, name)
    return jax.random.normal(key_of_leaf, x.shape, jnp.float32)

  return jax.tree.map_with_path(leaf, like)


def client_key(ids, round=0, station=2):
  """The keys of local training (station 2), from (seed, round, client)."""
  clients, _ = jax.random.split(jax.random.fold_in(KEY, round))
  one = lambda k: jax.random.split(jax.random.fold_in(clients, k), 4)[station]
  return jax.vmap(one)(jnp.asarray(ids))


def rule_key(round=0):
  return jax.random.split(jax.random.fold_in(KEY, round))[1]


@functools.partial(jax.jit, static_argnums=0)
def _gradients(loss, base, params, trained, batches):
  def one(batch):
    of = lambda trained: mean_loss(loss, base, trained, params, batch, KEY)[0]
    return jax.grad(of)(trained)

  return jax.vmap(one)(batches)


def gradients(params, trained, batches, loss=loss):
  """Gradients of the token mean by backpropagation, of [K] batches [B, T]."""
  return _gradients(loss, base(), params, trained, batches)


def floats(params):
  """Leaves that are trained: all but the scales of factors."""
  node = lambda x: x._replace(scale=None) if isinstance(x, LowRank) else x
  return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, LowRank))


def mean(stack, weight):
  """The weighted mean over the first axis in NumPy float64."""
  weight = np.asarray(weight, np.float64)
  one = lambda x: np.tensordot(weight, np.asarray(x, np.float64), 1)
  return jax.tree.map(lambda x: one(x) / weight.sum(), stack)


def moved(end, start):
  """Trained leaves: what a round added to them."""
  sub = lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64)
  return jax.tree.map(sub, floats(end), floats(start))


def close(x, y, rtol=1e-4, atol=1e-6):
  """Equal structure and leaves, up to rtol of the largest entry of a leaf."""
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    scale = np.abs(np.asarray(b)).max(initial=0)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol + rtol * scale)


def updates(params, cohort, rate, loss=loss):
  """What one step of SGD on a first batch changes, [K, ...], by backprop."""
  first = jax.tree.map(lambda x: x[:, 0], cohort.batches)
  return tree.scale(gradients(params, floats(params), first, loss), -rate)


def differs(x, y, by=1e-3):
  """At least one leaf differs by more than rounding."""
  gap = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max())
  return max(jax.tree.leaves(jax.tree.map(gap, x, y))) > by


# --------------------------------------------------- sketches of one round --

RATE = 0.5


def averaged(**parts):
  """Returns federated averaging with plain steps of RATE."""
  parts.setdefault('measure', None)  # of factors: another program to compile
  return recipes.fed_avg(loss, sgd(RATE), **parts)


def one_step():
  """Returns parameters, a cohort of one step, and the updates of plain SGD."""
  params, one = lora(), cohort(steps=1)
  return params, one, updates(params, one, RATE)
