"""Robust rules that are means with bounded or chosen weights.

Builders return an `Aggregator` or a `StreamingAggregator` on whole updates: a
norm or a distance is that of all leaves together. Masks are not used: an entry
that a client did not train is a zero among the others.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.averaging import mean
from fedjax_llm.aggregators.robust import median
from fedjax_llm.aggregators.weights import counted, equal
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  StreamingAggregator,
  Traits,
  Uploads,
  known,
)


def geometric_median(
  *, iterations: int = 8, smoothing: float = 1e-6
) -> Aggregator:
  """Returns the geometric median: argmin_v sum_k ||u_k - v||.

  It takes `iterations` smoothed Weiszfeld steps,

      b_k = 1 / max(smoothing, ||u_k - v||),  v <- sum_k b_k u_k / sum_k b_k

  from the coordinate-wise median (Pillutla et al. 2022, RFA, arXiv 1912.13445,
  algorithm 2, which starts from the mean: a far update then needs more steps).
  It stays within a bounded distance of the honest updates as long as fewer than
  half of the clients are corrupted. Every client counts the same.

  Raises:
    Error: no iterations; a smoothing that is not above 0.

  >>> update, ones = jnp.array([[0.0], [1.0], [2.0], [1e6]]), jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = geometric_median(iterations=20)
  >>> delta = rule.aggregate(uploads, (), None, None)[0].delta
  >>> 1.0 <= delta.item() <= 2.0
  True
  """
  if iterations < 1:
    raise Error(
      f'geometric_median: iterations={iterations} must be at least 1.'
    )
  if known(smoothing) and smoothing <= 0:
    raise Error(f'geometric_median: smoothing={smoothing} must be above 0.')
  begin = median()

  def weights(uploads: Uploads) -> jax.Array:
    here = counted(uploads)
    key: Any = None  # a median draws nothing
    centre = begin.aggregate(uploads, (), None, key)[0].delta

    def step(centre, _):
      gap = tree.root(_squares(uploads.update, centre))
      weight = jnp.where(here, 1 / jnp.maximum(gap, smoothing), 0.0)
      weight = tree.normalise(weight)
      return tree.weighted_sum(uploads.update, weight), weight

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), centre)
    # Sums of no clients are zero.
    return jax.lax.scan(step, wide, None, iterations)[1][-1]

  def aggregate(uploads, state, params, key):
    del params, key
    return Aggregate(
      tree.weighted_mean(uploads.update, weights(uploads))
    ), state

  return Aggregator(_nothing, aggregate, Traits(rotates=True), weights=weights)


def norm_bounding(*, bound: float = 1.0) -> StreamingAggregator:
  """Returns the weighted mean of updates clipped to a norm.

      sum_k w_k u_k min(1, bound / ||u_k||) / sum_k w_k

  A client of share p moves the result by at most p * bound (Sun et al. 2019,
  arXiv 1911.07963, section 4). It does not remove attackers: it bounds them.

  Raises:
    Error: a bound that is not above 0.

  >>> from fedjax_llm.aggregators import as_stack
  >>> update, ones = jnp.array([[0.5], [40.0]]), jnp.ones(2)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = as_stack(norm_bounding(bound=1.0))
  >>> rule.aggregate(uploads, (), jnp.zeros(1), None)[0].delta.tolist()
  [0.75]
  """
  if known(bound) and bound <= 0:
    raise Error(f'norm_bounding: bound={bound} must be above 0.')
  rule = mean()

  def accumulate(sums, uploads, state, params):
    clipped = _scaled(
      uploads.update, _shrinking(jax.vmap(tree.norm)(uploads.update), bound)
    )
    return rule.accumulate(
      sums, uploads._replace(update=clipped), state, params
    )

  return rule._replace(accumulate=accumulate, traits=Traits(rotates=True))


def centred_clipping(*, radius: float = 1.0, iterations: int = 1) -> Aggregator:
  """Returns centred clipping: the mean of differences clipped to a radius.

      v <- v + 1 / n sum_k (u_k - v) min(1, radius / ||u_k - v||)

  `iterations` times, from the result of the last round, zero at first
  (Karimireddy et al. 2021, arXiv 2012.10333, section 4). m corrupted clients of
  n move one iteration by at most 2 radius m / n. Every client counts the same.

  Raises:
    Error: a radius that is not above 0; no iterations.

  >>> params, ones = jnp.zeros(1), jnp.ones(4)
  >>> update = jnp.array([[0.5], [0.5], [0.5], [-1e6]])
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = centred_clipping(radius=1.0)
  >>> result, _ = rule.aggregate(uploads, rule.init(params, None), params, None)
  >>> result.delta.tolist()
  [0.125]
  """
  if known(radius) and radius <= 0:
    raise Error(f'centred_clipping: radius={radius} must be above 0.')
  if iterations < 1:
    raise Error(
      f'centred_clipping: iterations={iterations} must be at least 1.'
    )

  def init(params, key):
    del key
    return tree.zeros_like(params, jnp.float32)

  def aggregate(uploads, state, params, key):
    del params, key
    share = tree.normalise(equal(uploads))  # [K]
    update = uploads.update
    centre = tree.like(state, update)
    for _ in range(iterations):
      gap = tree.root(_squares(update, centre))
      part = share * _shrinking(gap, radius)
      moved = tree.weighted_sum(update, part)
      rest = 1 - jnp.sum(part)
      some = jnp.sum(share) > 0
      centre = jax.tree.map(
        lambda v, m, rest=rest, some=some: jnp.where(some, rest * v + m, v),
        centre,
        moved,
      )
    some = jnp.sum(share) > 0
    delta = jax.tree.map(
      lambda v, u: jnp.where(some, v, 0).astype(u.dtype), centre, update
    )
    return Aggregate(delta), tree.merge(centre, state)

  return Aggregator(init, aggregate, Traits(rotates=True), weights=equal)


def _nothing(params, key):
  del params, key
  return ()


def _shrinking(norms: jax.Array, bound) -> jax.Array:
  """Returns min(1, bound / norm), one where the norm is zero."""
  return jnp.minimum(1.0, bound / jnp.where(norms > 0, norms, bound))


def _scaled(stack, factor: jax.Array):
  """Returns the stack with each client's update times its factor [K]."""
  wide = lambda u: factor.reshape((-1,) + (1,) * (u.ndim - 1))
  return jax.tree.map(lambda u: (u * wide(u)).astype(u.dtype), stack)


def _squares(stack, centre) -> jax.Array:
  """Returns ||u_k - v||^2 over the whole tree, [K] float32."""
  away = lambda u: jax.tree.map(
    lambda x, v: x.astype(jnp.float32) - v, u, centre
  )
  return jax.vmap(lambda u: tree.dot(away(u), away(u)))(stack)
