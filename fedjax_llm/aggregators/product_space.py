"""Robust rules in the space of products: distances of s a b, not of factors.

Two clients with far apart factors may change a weight alike, and factors that
each look harmless may have a harmful product. Distances of products come from
Gram matrices of factors, so no matrix of [D, F] is formed:

    <s_k a_k b_k, s_j a_j b_j> = s_k s_j sum((a_k' a_j) * (b_k b_j'))

Leaves outside of low-rank nodes count by their updates. Builders return an
`Aggregator`; they use the distances of whole clients, over all weights.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.low_rank.bases import flexlora
from fedjax_llm.aggregators.weights import counted, floor_of
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  Uploads,
  known,
)


def product_krum(*, byzantine_fraction: float = 0.2) -> Aggregator:
  """Returns Krum on products: the update of the client nearest to the others.

      score_k = sum of ||W_k - W_j||^2 over the n - f - 2 nearest j != k

  with W_k = s_k a_k b_k of all weights and f = floor(byzantine_fraction * n).
  The chosen client's factors are taken as they are, so its product is exact
  (Krum: Blanchard et al. 2017, arXiv 1703.02757, section 4, where n > 2 f + 2
  is needed for the guarantee). Equal scores are ordered by the distance to all.

  Raises:
    Error: a fraction outside of [0, 0.5).

  >>> from fedjax_llm.aggregators import received
  >>> from fedjax_llm.nodes import LowRank
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> ends = [node(1, 7), node(6, 1), node(2, 2.8), node(2, 9), node(-2, 3)]
  >>> server, rule = node(1, 0), jax.jit(product_krum().aggregate)
  >>> delta = rule(received(server, ends), (), server, None)[0].delta
  >>> (server.a + delta.a).item(), (server.b + delta.b).item()
  (6.0, 1.0)
  """
  _check('product_krum', byzantine_fraction)

  def chosen(uploads: Uploads) -> jax.Array:
    here = counted(uploads)
    num = here.shape[0]
    n = jnp.sum(here.astype(jnp.int32))
    f = floor_of(byzantine_fraction, num)[n]
    far = distances(uploads)
    other = here[None, :] & ~jnp.eye(num, dtype=bool)
    nearest = jnp.sort(jnp.where(other, far, jnp.inf), axis=1)
    summed = jnp.arange(num) < jnp.clip(n - f - 2, 1, n - 1)
    score = jnp.sum(jnp.where(summed, nearest, 0.0), axis=1)
    total = jnp.sum(jnp.where(other, far, 0.0), axis=1)
    best = jnp.lexsort((total, jnp.where(here, score, jnp.inf), ~here))[0]
    return ((jnp.arange(num) == best) & here).astype(jnp.float32)

  def init(params, key):
    del params, key
    return ()

  def aggregate(uploads, state, params, key):
    del params, key
    return Aggregate(tree.weighted_mean(uploads.update, chosen(uploads))), state

  return Aggregator(init, aggregate, weights=chosen)


def product_geometric_median(
  *, iterations: int = 8, smoothing: float = 1e-6
) -> Aggregator:
  """Returns the geometric median of products, argmin_V sum_k ||W_k - V||.

  Its Weiszfeld weights b_k (`geometric_median`) need only the distances
  D_kj = ||W_k - W_j||^2, as with weights that sum to one

      ||W_k - sum_j b_j W_j||^2 = (D b)_k - b' D b / 2

  The steps start from the mean of the floor(n / 2) + 1 clients nearest to the
  client with the smallest ball of that many. The result, sum_k b_k W_k, is
  written in factors of the server's rank as FlexLoRA writes its mean
  (`flexlora`, arXiv 2402.11505); the weights are those of RFA (Pillutla et al.
  2022, arXiv 1912.13445, algorithm 2).

  Raises:
    Error: no iterations; a smoothing that is not above 0; parameters without
      low-rank nodes; from the round, a factor that is frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> from fedjax_llm.nodes import LowRank
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> sent = received(node(1, 0), [node(1, 6), node(6, 1), node(90, 90)])
  >>> rule = jax.jit(product_geometric_median().aggregate)
  >>> new = rule(sent, (), node(1, 0), jax.random.key(0))[0].assign
  >>> round((new.a * new.b).item(), 2)
  6.0
  """
  if iterations < 1:
    raise Error(
      f'product_geometric_median: iterations={iterations} must be at least 1.'
    )
  if known(smoothing) and smoothing <= 0:
    raise Error(
      f'product_geometric_median: smoothing={smoothing} must be above 0.'
    )
  rule = flexlora()

  def weights(uploads: Uploads) -> jax.Array:
    here = counted(uploads)
    pair = here[:, None] & here
    far = jnp.where(pair, distances(uploads), 0.0)
    majority = jnp.sum(here.astype(jnp.int32)) // 2 + 1
    order = jnp.argsort(jnp.where(pair, far, jnp.inf), axis=1)
    place = jnp.argsort(order, axis=1)
    ball = (place < majority) & pair  # the nearest, itself among them
    radius = jnp.max(jnp.where(ball, far, 0.0), axis=1)
    centre = jnp.argmin(jnp.where(here, radius, jnp.inf))
    begin = tree.normalise(ball[centre].astype(jnp.float32))
    times = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    def step(b, _):
      square = times(far, b) - times(b, times(far, b)) / 2
      gap = tree.root(jnp.maximum(square, 0.0))
      new = jnp.where(here, 1 / jnp.maximum(gap, smoothing), 0.0)
      return tree.normalise(new), None

    return jax.lax.scan(step, begin, None, iterations)[0]

  def aggregate(uploads, state, params, key):
    weight = weights(uploads)
    return rule.aggregate(uploads._replace(weight=weight), state, params, key)

  return rule._replace(aggregate=aggregate, weights=weights)


def distances(uploads: Uploads) -> jax.Array:
  """Returns ||W_k - W_j||^2 over all weights, [K, K], symmetric, float32.

  Rounding is relative to the length of the products, not of their differences.

  >>> from fedjax_llm.aggregators import received
  >>> from fedjax_llm.nodes import LowRank
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(2))
  >>> distances(received(node(1, 0), [node(1, 3), node(3, 2)])).tolist()
  [[0.0, 36.0], [36.0, 0.0]]
  """
  is_leaf = lambda x: x is None or low_rank.is_node(x)
  either = lambda whole, update: whole if low_rank.is_node(whole) else update
  gram = gram_of(
    jax.tree.map(either, tree.whole(uploads), uploads.update, is_leaf=is_leaf)
  )
  gram = (gram + gram.T) / 2
  square = jnp.diagonal(gram)
  apart = jnp.maximum(square[:, None] + square - 2 * gram, 0.0)
  return jnp.where(jnp.eye(len(square), dtype=bool), 0.0, apart)


def gram_of(stack: Any) -> jax.Array:
  """Returns the inner products of the clients' products and other leaves.

  `stack` has nodes and leaves [K, ...], None where there is nothing: [K, K].
  """

  def leaf(x):
    if low_rank.is_node(x):
      return _gram(x)
    flat = x.reshape(x.shape[0], -1)
    return low_rank.dot(flat, flat.T)

  grams = [leaf(x) for x in jax.tree.leaves(stack, is_leaf=low_rank.is_node)]
  return functools.reduce(operator.add, grams)


def _gram(nodes: LowRank) -> jax.Array:
  """Returns the inner products of the clients' products, [K, K]."""
  wide = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])  # [K, L, ., .]
  a, b = wide(nodes.a), wide(nodes.b)
  scale = nodes.scale.reshape(a.shape[0], -1).astype(jnp.float32)
  turn = lambda x: jnp.swapaxes(x, -1, -2)

  def row(k):
    pair = low_rank.dot(turn(a[k]), a) * low_rank.dot(b[k], turn(b))
    return jnp.sum(scale[k] * scale * jnp.sum(pair, (-1, -2)), axis=1)

  return jax.lax.map(row, jnp.arange(a.shape[0]))


def _check(name: str, fraction: float) -> None:
  if known(fraction) and not 0 <= fraction < 0.5:
    raise Error(
      f'{name}: byzantine_fraction={fraction} must be at least 0 and below 0.5.'
    )
