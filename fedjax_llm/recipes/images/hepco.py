"""HePCo: the server distils prompts of clients with generated features.

Halbe et al. 2023, arXiv 2306.09970.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, tree
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.aggregators.weights import equal
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import VisualPool
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  RoundInfo,
)

# What the config of each method changes.
NEEDS = {
  'hepco': {
    **IMAGES,
    'adapter': dict(name='visual_pool', size=4, length=2, num_classes=4),
    'algorithm': dict(generator_steps=4, steps=4, rounds_per_task=2),
  },
}


class Generator(NamedTuple):
  """Features of a class: z = third(relu(bn(second(relu(bn(first(x)))))))."""

  classes: Any  # [C, d], x = [noise, row of the class]
  layers: Any  # three `Affine`
  norms: Any  # two `Affine`: scale and bias of a batch normalisation


class Memory(NamedTuple):
  """The rule's state: rounds, labels that clients had, the task before."""

  round: Any  # [] int32
  counts: Any  # [C], of all rounds
  before: Any  # [C], of the tasks before the present one
  previous: VisualPool  # the server's parameters at the end of those


def hepco(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  rounds_per_task: int = 20,
  generator_steps: int = 100,
  generator_rate: float = 1e-4,
  noise: int = 32,
  hidden: tuple[int, int] = (256, 1024),
  steps: int = 200,
  rate: float = 1e-4,
  batch_size: int = 64,
  replay: float = 0.125,
  divergence: float = 1.0,
  difference: float = 1.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """HePCo: averaged prompts, distilled from those of clients and of the past.

      s <- mean_k theta_k;   G <- Adam on sum_z sum_k w_k,y (CE(h_k(z), y)
           - divergence KL(h_k(z) || h_s(z)) - difference |P_k(z) - P_s(z)|^2),
      P_s <- Adam on sum_z sum_k w_k,y |P_s(z) - P_k(z)|^2,
      h_s <- Adam on mean_z CE(h_s(z), y),
      z = G(y, e),   e ~ N(0, 1),   y ~ n_y,   w_k,y = n_k,y / sum_c n_c

  Halbe et al. 2023, arXiv 2306.09970, as in the authors' program: theta are a
  pool of prompts with keys P and a head h (`nodes.VisualPool`), clients train
  them by cross-entropy and report how many images of each class they had, n_k.
  A second generator learns the server s' of the end of the task before in the
  same way (y by the labels until then, weight 1); once there is such a task,
  `replay` times as many of its features join both distillations. Tasks are
  `rounds_per_task` rounds, a stage of the section `stages`; 0: one task.
  Generators start anew in each round. The counts are not protected.

  Unlike there, both generators take the same steps (there 50 more a task), a
  batch's own statistics normalise it while distilling too, the distance of
  prompts has a gradient in z, which is detached there, clients do not mask the
  classes of earlier tasks, and prompts are in front of the first layer alone.
  Classes that no client has had get no probability.

  Args:
    rounds_per_task: in which somebody reported.
    generator_steps, generator_rate: of Adam on a generator.
    noise: d, the width of the noise and of a class's row.
    hidden: widths of the generator.
    steps, rate: of Adam in each of the two distillations.
    batch_size: features a step.
    replay: features of the past a feature of the present.
    divergence, difference: weights in the loss of a generator.

  Raises:
    Error: an aggregator in `parts`, a number out of range; from `init`, an
      adapter without a visual pool.

  >>> hepco(None, local.optimizer('sgd'), replay=-1.0)
  Traceback (most recent call last):
  fedjax_llm.types.Error: algorithm.replay is -1.0; it must be at least 0.
  """
  refuse('hepco', 'aggregator', parts)
  rule = distilled(
    rounds_per_task=rounds_per_task,
    generator_steps=generator_steps,
    generator_rate=generator_rate,
    noise=noise,
    hidden=hidden,
    steps=steps,
    rate=rate,
    batch_size=batch_size,
    replay=replay,
    divergence=divergence,
    difference=difference,
  )

  def run(base, start, state, batches, masks, context):
    out = local.sgd(loss, optimizer).run(
      base, start, state, batches, masks, context
    )
    classes = start['scores'].head.bias.shape[-1]
    real = class_names.known_rows(batches)
    labels = jnp.where(real, batches.label, classes)  # beyond the end
    counts = jnp.zeros(classes).at[labels].add(1.0, mode='drop')
    return out._replace(report=counts)

  algorithm = compose(
    LocalUpdate(lambda trainable: (), run),
    aggregator=rule,
    **{'measure': None, **parts},
  )

  def begin(key, params):
    node_of('hepco', params, VisualPool, 'visual_pool')
    return algorithm.init(key, params)

  def train(state, cohort, base=None):
    assert algorithm.train is not None
    uploads, states, info = algorithm.train(state, cohort, base)
    return uploads, states, billed(info)

  def round(state, cohort, base=None, data=None):
    state, states, info = algorithm.round(state, cohort, base, data)
    return state, states, billed(info)

  return algorithm._replace(init=begin, train=train, round=round)


def billed(info: RoundInfo) -> RoundInfo:
  """Returns the round's outcome with the bytes of the labels, C float32.

  >>> who, bytes = jnp.array([True, False]), jnp.ones((2, 1), jnp.int32)
  >>> info = RoundInfo(who, who, bytes, bytes, {}, jnp.ones((2, 3)))
  >>> billed(info).bytes_up.tolist()
  [[1, 12], [1, 0]]
  """
  size = info.reports.shape[-1] * 4
  more = jnp.where(info.reported, size, 0).astype(info.bytes_up.dtype)
  up = jnp.concatenate([info.bytes_up, more[:, None]], 1)
  return info._replace(bytes_up=up, reports=None)


def distilled(
  *,
  rounds_per_task: int,
  generator_steps: int,
  generator_rate: float,
  noise: int,
  hidden: tuple[int, int],
  steps: int,
  rate: float,
  batch_size: int,
  replay: float,
  divergence: float,
  difference: float,
) -> Aggregator:
  """Returns the rule of `hepco`, whose uploads report labels [K, C]."""
  least = dict(
    rounds_per_task=rounds_per_task,
    generator_steps=generator_steps,
    steps=steps,
    replay=replay,
  )
  for name, value in least.items():
    if value < 0:
      raise Error(f'algorithm.{name} is {value}; it must be at least 0.')
  for name, value in dict(noise=noise, batch_size=batch_size).items():
    if value < 1:
      raise Error(f'algorithm.{name} is {value}; it must be at least 1.')
  number = int(batch_size * replay)
  adam = lambda rate: local.optimizer('adam', rate)

  def init(params, key):
    del key
    node = node_of('hepco', params, VisualPool, 'visual_pool')
    nothing = jnp.zeros(node.head.bias.shape[-1])
    return Memory(jnp.int32(0), nothing, nothing, node)

  def aggregate(uploads, memory, params, key):
    weight = equal(uploads)
    result, _ = mean.aggregate(uploads, (), params, key)
    server = tree.add(params['scores'], result.delta['scores'])
    counts = uploads.reports * weight[:, None]  # [K, C]
    turn = memory.round % max(rounds_per_task, 1) == 0
    turn &= (memory.round > 0) & (rounds_per_task > 0)
    keep = lambda old, new: jax.tree.map(
      lambda x, y: jnp.where(turn, y, x), old, new
    )
    now = memory.counts + jnp.sum(counts, 0)
    memory = Memory(
      memory.round + 1,
      now,
      keep(memory.before, memory.counts),
      keep(memory.previous, params['scores']),
    )
    present = Teachers(
      tree.whole(uploads)['scores'],
      counts / jnp.sum(jnp.maximum(jnp.sum(counts, 0), 1.0)),
      jnp.sum(counts, 0),
    )
    past = Teachers(
      jax.tree.map(lambda x: x[None], memory.previous),
      (memory.before > 0)[None].astype(jnp.float32),
      memory.before,
    )
    keys = jax.random.split(key, 4)
    seen = now > 0
    made = []
    for name, teachers in zip(keys[:2], (present, past), strict=True):
      begin = generator(name, server, noise, hidden)
      score = lambda g, key, teachers=teachers: adversarial(
        g, server, teachers, seen, key, batch_size, divergence, difference
      )
      made.append(descended(score, begin, adam(generator_rate), name,
                            generator_steps))  # fmt: skip

    def drawn(key):
      """Returns features, labels and whether they count, present then past."""
      one, two = jax.random.split(key)
      z, y = featured(made[0], present.labels, one, batch_size)
      old, old_y = featured(made[1], past.labels, two, number)
      return (z, y), (old, old_y), jnp.any(past.labels > 0)

    def prompts(pool, key):
      (z, y), (old, old_y), some = drawn(key)
      node = VisualPool(pool[0], pool[1], server.head)
      total = jnp.sum(apart(node, present, z, y))
      return total + some * jnp.sum(apart(node, past, old, old_y))

    def heads(head, key):
      (z, y), (old, old_y), some = drawn(key)
      here = jnp.concatenate([jnp.ones(len(y)), some * jnp.ones(len(old_y))])
      logits = server._replace(head=head).classified(jnp.concatenate([z, old]))
      nats = _nats(logits, jnp.concatenate([y, old_y]), seen)
      return jnp.sum(here * nats) / jnp.sum(here)

    pool = descended(
      prompts, (server.rows, server.keys), adam(rate), keys[2], steps
    )
    head = descended(heads, server.head, adam(rate), keys[3], steps)
    moved = tree.sub(VisualPool(pool[0], pool[1], head), params['scores'])
    return Aggregate({**result.delta, 'scores': moved}), memory

  mean = aggregators.as_stack(aggregators.uniform_mean())
  return Aggregator(init, aggregate, weights=equal)


class Teachers(NamedTuple):
  """T nodes, their weights for a class, and the labels that they had."""

  nodes: VisualPool  # [T, ...]
  weight: Any  # [T, C]
  labels: Any  # [C]


def generator(
  key: Key, node: VisualPool, noise: int, hidden: tuple[int, int]
) -> Generator:
  """Returns a generator with the start of PyTorch's layers."""
  features, classes = node.head.kernel.shape
  keys = jax.random.split(jax.random.fold_in(key, 0), 4)
  sizes = [2 * noise, *hidden, features]
  layers = [
    draws.affine(name, *pair)
    for name, pair in zip(keys, itertools.pairwise(sizes))
  ]
  norms = [Affine(jnp.ones(n), jnp.zeros(n)) for n in hidden]
  return Generator(jax.random.normal(keys[3], (classes, noise)), layers, norms)


def featured(
  g: Generator, labels: Any, key: Key, number: int
) -> tuple[jax.Array, jax.Array]:
  """Returns features [B, E] of classes [B], drawn by their counts [C]."""
  names = jax.random.split(key)
  logits = jnp.where(labels > 0, jnp.log(jnp.maximum(labels, 1e-9)), -1e9)
  y = jax.random.categorical(names[0], logits, shape=(number,))
  e = jax.random.normal(names[1], (number, g.classes.shape[-1]))
  x = jnp.concatenate([e, g.classes[y]], -1)
  for layer, norm in zip(g.layers, g.norms):
    x = layer(x)
    x = x - jnp.mean(x, 0)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, 0) + 1e-5)
    x = jax.nn.relu(x * norm.kernel + norm.bias)
  return g.layers[-1](x), y


def adversarial(
  g: Generator,
  server: VisualPool,
  teachers: Teachers,
  seen: Any,
  key: Key,
  number: int,
  divergence: float,
  difference: float,
) -> jax.Array:
  """Returns the loss of a generator, the sum over a batch of features."""
  z, y = featured(g, teachers.labels, key, number)
  of = jax.vmap(lambda node: node.classified(z))
  theirs = of(teachers.nodes)  # [T, B, C]
  own = _log_softmax(server.classified(z), seen)
  log = _log_softmax(theirs, seen)
  far = jnp.where(seen, jnp.exp(log) * (log - own), 0.0)
  weight = teachers.weight[:, y]  # [T, B]
  nats = -jnp.take_along_axis(log, y[None, :, None], -1)[..., 0]
  total = jnp.sum(weight * (nats - divergence * jnp.sum(far, -1)))
  return total - difference * jnp.sum(apart(server, teachers, z, y))


def apart(node: VisualPool, teachers: Teachers, z: Any, y: Any) -> jax.Array:
  """Returns the weighted square distances of prompts, [T, B]."""
  theirs = jax.vmap(lambda one: one.prompts(z))(teachers.nodes)
  far = jnp.sum((theirs - node.prompts(z)) ** 2, (-2, -1))
  return teachers.weight[:, y] * far


def descended(
  score: Callable[[Any, Key], jax.Array],
  begin: Any,
  optimizer: LocalOptimizer,
  key: Key,
  steps: int,
) -> Any:
  """Returns the parameters after steps of an optimizer on score(x, key)."""

  def step(carry, index):
    now, moments = carry
    grads = jax.grad(score)(now, jax.random.fold_in(key, index + 1))
    change, moments = optimizer.update(grads, moments, now, index)
    return (tree.add(now, change), moments), None

  carry = (begin, optimizer.init(begin))
  return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]


def _log_softmax(logits: jax.Array, seen: Any) -> jax.Array:
  return jax.nn.log_softmax(jnp.where(seen, logits, -1e9))


def _nats(logits: jax.Array, y: jax.Array, seen: Any) -> jax.Array:
  log = _log_softmax(logits, seen)
  return -jnp.take_along_axis(log, y[:, None], -1)[:, 0]
