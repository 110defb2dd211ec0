"""HePCo: a float64 loop of its server, and what clients train and send."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import named_images as toy
import numpy as np
import pytest
import references_images as ref
from named_images import C, E, K, P, V
from prompted import apart, close, f64, log_softmax, mean, slope

from fedjax_llm import aggregators, recipes
from fedjax_llm.nodes import VisualPool
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.recipes.images import hepco
from fedjax_llm.types import Error

N, FEW, STEPS = 2, 6, 2
SETTINGS: dict[str, Any] = dict(
  generator_steps=STEPS, generator_rate=0.05, noise=2, hidden=(3, 3),
  steps=STEPS, rate=0.05, batch_size=FEW, replay=0.5, divergence=0.5,
  difference=0.1, rounds_per_task=1,
)  # fmt: skip
SEEN = np.array([True, True, False, True])  # one class that nobody has


def pool(seed=0, spread=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(spread * rng.normal(size=s), jnp.float32)
  return VisualPool(draw(N, P, V), draw(N, E), Affine(draw(E, C), draw(C)))


def head_of(z, node):
  logits = np.where(SEEN, z @ node[2] + node[3], -1e9)
  return log_softmax(logits)


def distance(z, y, server, teachers, weights):
  mine = ref.weighed(z, *server[:2])
  far = [((ref.weighed(z, *t[:2]) - mine) ** 2).sum((1, 2)) for t in teachers]
  return sum((w[y] * x).sum() for w, x in zip(weights, far))


def generator_loss(g, y, e, server, teachers, weights):
  z = ref.features(g, y, e)
  own, total = head_of(z, server), 0.0
  for teacher, w in zip(teachers, weights):
    log = head_of(z, teacher)
    far = (np.exp(log) * (log - own))[:, SEEN].sum(1)
    total += (w[y] * (-log[np.arange(len(y)), y] - 0.5 * far)).sum()
  return total - 0.1 * distance(z, y, server, teachers, weights)


def slopes(loss, now):
  """The gradients of `loss(arrays)` in each array."""
  of = lambda j: lambda x: loss([*now[:j], x, *now[j + 1 :]])
  return [slope(of(j), x) for j, x in enumerate(now)]


def descended(loss_at, now, key):
  """Steps of Adam; `loss_at(key)` is the loss of one step's draws."""
  adam = ref.Adam(0.05)
  for i in range(STEPS):
    loss = loss_at(jax.random.fold_in(key, i + 1))
    now = adam.step(now, slopes(loss, now))
  return now


def drawn(key, labels, number):
  """The labels and the noise of `hepco.featured`, by the same keys."""
  names = jax.random.split(key)
  logits = np.where(labels > 0, np.log(np.maximum(labels, 1e-9)), -1e9)
  y = jax.random.categorical(names[0], jnp.asarray(logits), shape=(number,))
  return np.asarray(y), f64(jax.random.normal(names[1], (number, 2)))


def served_by_hand(key, clients, counts, past=None, before=None):
  """The server's node after one round: the rule, line by line."""
  keys = jax.random.split(key, 4)
  server = [mean(x, np.ones(K)) for x in zip(*clients)]
  sides = [
    (clients, counts / np.maximum(counts.sum(0), 1).sum(), counts.sum(0))
  ]
  if past is not None and before is not None:
    sides.append(([past], (before > 0)[None].astype(float), before))
  made = []
  for name, (teachers, weights, labels) in zip(keys, sides):
    start = hepco.generator(name, pool(), 2, (3, 3))

    def of(key, teachers=teachers, weights=weights, labels=labels):
      y, e = drawn(key, labels, FEW)
      return lambda g: generator_loss(g, y, e, server, teachers, weights)

    made.append(descended(of, [f64(x) for x in jax.tree.leaves(start)], name))

  def batch(key):
    both = []
    sizes = (FEW, FEW // 2)
    for name, g, side, size in zip(jax.random.split(key), made, sides, sizes):
      y, e = drawn(name, side[2], size)
      both.append((ref.features(g, y, e), y))
    return both

  def of_prompts(key):
    both = batch(key)
    return lambda a: sum(
      distance(z, y, [*a, *server[2:]], side[0], side[1])
      for (z, y), side in zip(both, sides)
    )

  def of_heads(key):
    z, y = (np.concatenate(x) for x in zip(*batch(key)))
    return lambda a: -head_of(z, [*server[:2], *a])[np.arange(len(y)), y].mean()

  return [
    *descended(of_prompts, server[:2], keys[2]),
    *descended(of_heads, server[2:], keys[3]),
  ]


def test_hepco_equals_a_float64_loop_over_two_tasks():
  one = hepco.distilled(**SETTINGS)
  step = jax.jit(one.aggregate)
  params, ends = {'scores': pool()}, [pool(seed, 1.2) for seed in (1, 2, 3)]
  uploads = aggregators.received(params, [{'scores': end} for end in ends])
  counts = np.array([[4.0, 0, 0, 1], [0, 3.0, 0, 0], [1.0, 1, 0, 2]])
  clients = [[f64(x) for x in jax.tree.leaves(end)] for end in ends]
  memory = one.init(params, jax.random.key(0))
  uploads = uploads._replace(reports=jnp.asarray(counts, jnp.float32))
  key = jax.random.key(8)
  result, memory = step(uploads, memory, params, key)
  got = jax.tree.leaves(
    jax.tree.map(jnp.add, params['scores'], result.delta['scores'])
  )
  want = served_by_hand(key, clients, counts)
  for x, y in zip(got, want, strict=True):
    close(x, y, atol=2e-3)
  # Neighbour: federated averaging of pools.
  apart(got[0], mean([c[0] for c in clients], np.ones(K)), by=0.02)
  apart(got[2], mean([c[2] for c in clients], np.ones(K)), by=0.02)
  # The next task: the server of before teaches as well.
  params = {'scores': jax.tree.unflatten(jax.tree.structure(pool()), got)}
  uploads = aggregators.received(params, [{'scores': end} for end in ends])
  later = counts[::-1]
  uploads = uploads._replace(reports=jnp.asarray(later, jnp.float32))
  result, memory = step(uploads, memory, params, key)
  again = jax.tree.leaves(
    jax.tree.map(jnp.add, params['scores'], result.delta['scores'])
  )
  past = [f64(x) for x in got]
  want = served_by_hand(key, clients, later, past, counts.sum(0))
  for x, y in zip(again, want, strict=True):
    close(x, y, atol=2e-3)
  apart(again[0], served_by_hand(key, clients, later)[0], by=1e-3)
  close(memory.before, counts.sum(0))
  assert memory.round == 2


@functools.cache
def trained():
  settings = {**SETTINGS, 'generator_steps': 0, 'steps': 0}
  return toy.run(recipes.hepco, {'scores': pool()}, 1, **settings)


def test_clients_train_the_pool_and_the_head_and_report_their_labels():
  _, seen = trained()

  def loss(x, y, a):
    rows = ref.weighed(toy.pooled(x), *a[:2])
    return toy.nll(toy.pooled(x, rows) @ a[2] + a[3], y)

  start = [f64(x) for x in jax.tree.leaves(pool())]
  ends = [toy.trained(loss, k, start) for k in range(K)]
  state, _, info = seen[-1]
  got = jax.tree.leaves(state.params['scores'])
  for x, each in zip(got, zip(*ends), strict=True):
    close(x, mean(each, np.ones(K)), atol=1e-4)  # no distillation: the mean
  label = toy.cohort().batches.label
  want = np.bincount(label[label >= 0], minlength=C)
  close(state.aggregator.counts, want)
  size = 4 * (N * (P * V + E) + C * (E + 1))
  assert info.bytes_up.sum(1).tolist() == [size + 4 * C] * K  # and the report


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(steps=-1), 'algorithm.steps is -1; it must be at least 0'),
    (dict(noise=0), 'algorithm.noise is 0; it must be at least 1'),
    (dict(aggregator=aggregators.mean()), 'hepco brings its own aggregator'),
  ],
)
def test_wrong_settings_are_refused(settings, text):
  with pytest.raises(Error, match=text):
    recipes.hepco(toy.LOSS, toy.sgd(), **settings)
