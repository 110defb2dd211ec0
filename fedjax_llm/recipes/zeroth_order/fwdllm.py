"""FwdLLM: forward gradients along chosen directions, in rounds that wait.

Xu et al. 2024, arXiv 2308.13894.

    client:  of n C random directions a leaf, the n nearest to the last gradient
             (cosine);  g = 1/n sum_i v_i (L(p + h v_i) - L(p - h v_i)) / (2 h)
    server:  collects g of all clients since the last step, in two halves;
             V = mean over entries of var(half means);
             V <= threshold:  p <- p - eta sum g / number, collect anew
             V >  threshold:  p stays, the next round adds more directions

Defaults: h = 0.01, C = 10, a threshold of 0.1 (DistilBERT and ALBERT; 0.2 for
BERT and RoBERTa-large), eta = 0.01.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.gradients import mean_loss, within
from fedjax_llm.local.seeded import plain_sgd
from fedjax_llm.local.sgd import contents
from fedjax_llm.nodes.directions import draw_leaf
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.scopes.labels import (
  check_match,
  compiled,
  leaf_paths,
  shared_labels,
)
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  LossSum,
  Params,
  Shared,
  Work,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fwdllm': dict(
    local=dict(name='sgd', learning_rate=1e-2),
    algorithm=dict(threshold=1.0),  # that of a tiny model's few rounds
  ),
}


def fwdllm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  h: float = 0.01,
  directions: int = 1,
  candidates: int = 10,
  threshold: float = 0.1,
  watched: str = '',
  **parts: Any,
) -> FederatedAlgorithm:
  """FwdLLM: forward gradients along chosen directions, in rounds that wait.

  Xu et al. 2024, arXiv 2308.13894, with the settings of the authors' program. A
  client sends the sum of its forward gradients, as large as the adapter, and
  receives the last gradient beside the parameters. Every batch of a client is
  evaluated at the parameters of the round. The step has the rate of the local
  optimizer at the number of steps so far.

  Args:
    h: the distance of the two points.
    directions: n, directions a batch.
    candidates: C, candidates for each of them; one takes them as drawn.
    threshold: the largest variance of the halves at which the server steps.
    watched: a pattern for the leaves whose variance counts; all leaves if ''.
      The program takes one layer.

  Raises:
    Error: a number that is not positive; an optimizer with moments; an
      aggregator in `parts`.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fwdllm(None, local.optimizer('sgd', 0.01))
  >>> state = method.init(jax.random.key(0), {'w': jnp.ones(9)})
  >>> state.aggregator.waited.tolist()  # rounds since the last step
  0
  """
  refuse('fwdllm', 'aggregator', parts)
  plain_sgd(optimizer, 'fwdllm')
  for name, value in (
    ('h', h),
    ('directions', directions),
    ('candidates', candidates),
    ('threshold', threshold),
  ):
    if known(value) and not value > 0:
      raise Error(f'fwdllm: {name}={value} must be above 0.')
  update = forward_gradients(
    loss, h=h, directions=directions, candidates=candidates
  )
  rule = waiting(optimizer.learning_rate, threshold, watched)
  parts.setdefault('measure', None)
  return compose(update, aggregator=rule, **parts)


# --------------------------------------------------------------- directions --


def nearest(
  key: Key, last: Params, directions: int, candidates: int
) -> tuple[Any, Callable[[Any, Any], Params]]:
  """Chooses directions for every leaf; returns them as numbers, and `drawn`.

  Of `directions` x `candidates` normal directions of a leaf these are the ones
  of largest cosine with the leaf of `last`, the largest first; with zeros there
  they are the first ones. `drawn(chosen, i)` draws the i-th direction.

  >>> last = {'w': jnp.array([1.0, 0.0])}
  >>> chosen, drawn = nearest(jax.random.key(0), last, 1, 200)
  >>> v = drawn(chosen, 0)['w']
  >>> float(v[0] / jnp.linalg.norm(v)) > 0.99
  True
  """
  num = directions * candidates
  key_of = lambda c: jax.random.fold_in(key, c)

  def choose(path, leaf):
    name = tree.path_name(path)
    size = tree.root(jnp.sum(leaf * leaf))

    def cosine(c):
      v = draw_leaf(key_of(c), name, leaf)
      scale = jnp.sqrt(jnp.sum(v * v)) * jnp.where(size > 0, size, 1.0)
      return jnp.sum(v * leaf) / scale

    cosines = jax.lax.map(cosine, jnp.arange(num))
    return jnp.argsort(-cosines, stable=True)[:directions]

  def drawn(chosen, i):
    def leaf(path, c, like):
      return draw_leaf(key_of(c[i]), tree.path_name(path), like)

    return jax.tree_util.tree_map_with_path(leaf, chosen, last)

  return jax.tree_util.tree_map_with_path(choose, last), drawn


def forward_gradients(
  loss: Loss, *, h: float, directions: int, candidates: int
) -> LocalUpdate:
  """Returns minus the mean forward gradient of a client's batches.

  `Context.news` is the last gradient. The client's weight is the number of
  batches that hold a loss token.

  >>> from fedjax_llm.types import Context, Masks
  >>> line = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.ones(2))
  >>> update = forward_gradients(line, h=0.1, directions=1, candidates=1)
  >>> start = {'w': jnp.float32(1)}
  >>> context = Context(key=jax.random.key(0), news={'w': jnp.float32(0)})
  >>> ones = Masks(*[{'w': jnp.bool_(True)}] * 2)
  >>> out = update.run(None, start, (), jnp.array([3.0]), ones, context)
  >>> float(out.update['w']) < 0, float(out.weight)  # -3 v^2
  (True, 1.0)
  """

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trained = tree.like(start, masks.trained)
    last = tree.apply_mask(tree.like(context.news, trained), masks.trained)
    inside = within(loss, start, masks.trained)
    num_steps = jax.tree.leaves(batches)[0].shape[0]
    texts, needed = contents(batches, num_steps)

    def step(index, carry):
      total, (sums, taken) = carry
      batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)
      key = jax.random.fold_in(context.key, index)
      chosen, drawn = nearest(key, last, directions, candidates)

      def value(v, size):
        point = jax.tree.map(
          lambda p, d: (p + size * d).astype(p.dtype), trained, v
        )
        return mean_loss(inside, base, point, start, batch, key)

      def one(i, carry):
        total, sums = carry
        (above, more), (below, less) = (
          value(drawn(chosen, i), size) for size in (h, -h)
        )
        slope = (above - below) / (2 * h * directions)
        slope = jnp.where(more.count > 0, slope, 0.0)
        total = jax.tree.map(
          lambda t, v: t + slope * v, total, drawn(chosen, i)
        )
        mean = lambda s, x, y: s + 0.5 * (x + y) / directions
        return total, jax.tree.map(mean, sums, more, less)

      zero = jnp.float32(0)
      total, more = jax.lax.fori_loop(
        0, directions, one, (total, LossSum(zero, zero, zero))
      )
      real = more.count > 0
      return total, jax.tree.map(
        lambda t, x: t + jnp.where(real, x, 0), (sums, taken), (more, 1)
      )

    zero = jnp.float32(0)
    totals = (LossSum(zero, zero, zero), jnp.int32(0))
    zeros = tree.zeros_like(trained, jnp.float32)
    total, (sums, taken) = jax.lax.fori_loop(0, needed, step, (zeros, totals))
    update = tree.scale(total, -1.0 / jnp.maximum(taken, 1))
    work = Work(tokens=sums.count, steps=taken)
    if texts:
      used = sum(jnp.sum(x.segments > 0, dtype=jnp.float32) for x in texts)
      work = work._replace(used=used, turns=jnp.int32(needed))
    return ClientOutput(
      update=tree.apply_mask(update, masks.trained),
      masks=masks,
      weight=taken.astype(jnp.float32),
      work=work,
      metrics={
        'loss': sums.total / jnp.maximum(sums.count, 1.0),
        'accuracy': sums.correct / jnp.maximum(sums.count, 1.0),
      },
    )

  return LocalUpdate(lambda trainable: (), run)


# ------------------------------------------------------------------- waiting --


class Collected(NamedTuple):
  """Forward gradients since the last step, and the gradient of that step."""

  sums: Any  # [2, ...] of two halves of the clients, float32
  weight: Any  # [2] float32, batches in each
  last: Any  # the gradient of the last step, float32
  steps: Any  # [] int32, steps taken
  waited: Any  # [] int32, rounds since the last step


def waiting(
  rate: Callable[[Any], Any], threshold: float, watched: str = ''
) -> Aggregator:
  """Returns FwdLLM's rule: it steps when two halves of the clients agree.

      V = mean over the watched entries of (m_0 - m_1)^2 / 2

  with m_i the mean of half i since the last step: clients of even and of odd
  place in the order of ids. A half without a client waits. `broadcast` is the
  gradient of the last step.

  Raises:
    Error: a pattern that is no regular expression or matches no leaf.

  >>> from fedjax_llm.types import Uploads
  >>> rule = waiting(lambda step: 0.5, threshold=1.0)
  >>> params = {'w': jnp.float32(0)}
  >>> def result(first, second):
  ...   uploads = Uploads({'w': jnp.array([first, second])}, None, None,
  ...                     jnp.ones(2), jnp.ones(2, bool), ids=jnp.arange(2))
  ...   out, _ = rule.aggregate(uploads, rule.init(params, None), params, None)
  ...   return float(out.delta['w'])
  >>> result(-3.0, -2.0), result(-3.0, 2.0)  # V is 0.5 and 12.5
  (-1.25, 0.0)
  """
  regex = compiled(watched)

  def init(params, key) -> Collected:
    del key
    check_match(regex, leaf_paths(params))
    trained = tree.select(params, shared_labels(params), Shared)
    zeros = tree.zeros_like(trained, jnp.float32)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), zeros)
    zero = jnp.int32(0)
    return Collected(both, jnp.zeros(2), zeros, zero, zero)

  def aggregate(uploads, state, params, key):
    del key
    weight = by_weight(uploads)
    there = counted(uploads)
    place = jnp.argsort(
      jnp.argsort(jnp.where(there, uploads.ids, jnp.iinfo(jnp.int32).max))
    )
    halves = jnp.stack([weight * (place % 2 == i) for i in range(2)])  # [2, K]
    more = jax.vmap(lambda w: tree.weighted_sum(uploads.update, w))(halves)
    sums = tree.add(tree.like(state.sums, more), more)
    total = state.weight + jnp.sum(halves, 1)  # [2]
    share = 1 / jnp.maximum(total, 1e-12)
    means = jax.tree.map(
      lambda x: x * share.reshape(-1, *[1] * (x.ndim - 1)), sums
    )
    square, size = jnp.float32(0), 0
    for name, x in tree.named(means).items():
      if regex.search(name):
        square += jnp.sum((x[0] - x[1]) ** 2) / 2
        size += x[0].size
    variance = square / max(size, 1)
    ready = (variance <= threshold) & jnp.all(total > 0)
    mean = jax.tree.map(lambda x: jnp.sum(x, 0) / jnp.sum(total), sums)
    eta = rate(state.steps)
    delta = tree.map_present(
      lambda g, p: jnp.where(ready, eta * g, 0.0).astype(p.dtype), mean, params
    )
    trained = jax.tree.map(lambda _: ready, delta)
    kept = lambda new, old: jax.tree.map(
      lambda n, o: jnp.where(ready, n, o), new, old
    )
    whole = lambda part, like: tree.merge(part, tree.zeros_like(like))
    sums = whole(sums, state.sums)
    new = Collected(
      sums=kept(tree.zeros_like(sums), sums),
      weight=jnp.where(ready, 0.0, total),
      last=kept(tree.scale(whole(mean, state.last), -1.0), state.last),
      steps=state.steps + ready,
      waited=jnp.where(ready, 0, state.waited + 1),
    )
    return Aggregate(delta, trained=trained), new

  return Aggregator(init, aggregate, broadcast=lambda state: state.last)
