"""Robust rules: a few corrupted clients cannot move their result far.

Builders return an `Aggregator` on the whole stack [K, ...]. It counts every
valid client of positive weight the same and does not use masks: an entry that
a client did not train is a zero among the others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import counted, equal, floor_of
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits, known


@jax.custom_jvp
def _sorted(values: jax.Array) -> jax.Array:
  """Returns `jnp.sort` along the last axis, float32.

  It sorts integers in the order of the floats, which a CPU compares faster: all
  bits of a negative number but its sign are inverted.
  """
  turned = lambda x: jnp.where(x < 0, x ^ jnp.iinfo(jnp.int32).max, x)
  # A NaN without a sign is sorted to the end.
  nan_last = jnp.where(jnp.isnan(values), jnp.nan, values)
  bits = jax.lax.bitcast_convert_type(nan_last, jnp.int32)
  ordered = jnp.sort(turned(bits), axis=-1)
  return jax.lax.bitcast_convert_type(turned(ordered), jnp.float32)


_sorted.defjvp(lambda at, moved: jax.jvp(jnp.sort, at, moved))


def _by_rank(fn: Callable[[jax.Array, jax.Array], jax.Array]) -> Aggregator:
  """Returns a rule on the sorted values of each coordinate.

  `fn(values, n)` gets a leaf as [..., K], float32, sorted over the clients; the
  first n >= 1 values count. It reduces that axis.
  """

  def init(params, key):
    del params, key
    return ()

  def aggregate(uploads, state, params, key):
    del params, key  # and the weights: every client counts the same
    valid = counted(uploads)
    num_valid = jnp.sum(valid.astype(jnp.int32))

    def leaf(u):
      there = valid.reshape((-1,) + (1,) * (u.ndim - 1))
      # The number of rows that count is known only inside the round, so the
      # others are sorted to the end.
      values = jnp.where(there, u.astype(jnp.float32), jnp.inf)
      values = _sorted(jnp.moveaxis(values, 0, -1))
      out = fn(values, jnp.maximum(num_valid, 1))
      return jnp.where(num_valid > 0, out, 0.0).astype(u.dtype)

    return Aggregate(jax.tree.map(leaf, uploads.update)), state

  return Aggregator(init, aggregate, weights=equal)


def median() -> Aggregator:
  """Returns the median of each coordinate over the valid clients.

  With an even number of clients it is the mean of the two middle values. It
  stays within the honest values as long as fewer than half of the clients are
  corrupted (Yin et al. 2018, arXiv 1803.01498, definition 1). Weights are not
  used.

  >>> from fedjax_llm.types import Uploads
  >>> uploads = Uploads(jnp.array([1.0, 2.0, 1e9, 0.0]), None, None, None,
  ...                   jnp.array([True, True, True, False]))
  >>> float(median().aggregate(uploads, (), None, None)[0].delta)
  2.0
  """

  def middle(values, n):
    low = jnp.take(values, (n - 1) // 2, axis=-1)
    high = jnp.take(values, n // 2, axis=-1)
    # Halved first: the sum of two large values could overflow.
    return 0.5 * low + 0.5 * high

  return _by_rank(middle)


def trimmed_mean(trim_fraction: float = 0.1) -> Aggregator:
  """Returns the mean of each coordinate without its extremes on both sides.

  Of the n values of the valid clients the b = floor(trim_fraction * n)
  smallest and the b largest are dropped, and the rest averaged without
  weights. Up to b corrupted clients cannot leave the honest range (Yin et al.
  2018, arXiv 1803.01498, definition 2). With 0.1 and fewer than 10 clients
  nothing is dropped.

  Raises:
    Error: `trim_fraction` is not in [0, 0.5).

  >>> from fedjax_llm.types import Uploads
  >>> uploads = Uploads(jnp.array([1.0, 2.0, 3.0, 4.0, 1e9]), None, None, None,
  ...                   jnp.ones(5, bool))
  >>> rule = trimmed_mean(trim_fraction=0.2)
  >>> float(rule.aggregate(uploads, (), None, None)[0].delta)
  3.0
  """
  if known(trim_fraction) and not 0 <= trim_fraction < 0.5:
    raise Error(
      f'trimmed_mean: trim_fraction={trim_fraction} must be at least 0 and '
      'below 0.5: both sides are trimmed.'
    )

  def middle(values, n):
    num_rows = values.shape[-1]
    cut = floor_of(trim_fraction, num_rows)[n]
    rank = jnp.arange(num_rows)
    kept = (rank >= cut) & (rank < n - cut)
    return jnp.sum(jnp.where(kept, values, 0.0), axis=-1) / (n - 2 * cut)

  return _by_rank(middle)


def krum(num_byzantine: int, num_selected: int = 1) -> Aggregator:
  """Returns Krum, the update closest to its neighbours (multi-Krum: a few).

  With n valid clients of which at most f = `num_byzantine` are corrupted,

      score_k = sum of ||u_k - u_j||^2 over the n - f - 2 nearest j != k

  where the distance is that of the whole update. The `num_selected` clients
  of lowest score are averaged without weights (Blanchard et al. 2017, arXiv
  1703.02757, section 4). Equal scores, as those of two mutual nearest
  neighbours, are ordered by the distance to all clients, then by position.

  The guarantee needs n > 2 f + 2. A cohort that can never reach it is refused.
  If drop-outs leave fewer reports than that, the round is scored with
  max(n - f - 2, 1) neighbours and selects at most max(n - f, 1) clients: it is
  still the most central update, without the guarantee, so choose K with
  drop-outs in mind.

  Raises:
    Error: a negative f, `num_selected` not in 1 ... K - f, or K <= 2 f + 2.

  >>> from fedjax_llm.types import Uploads
  >>> uploads = Uploads(jnp.array([1.0, 1.1, 1.3, 1.7, 90.0]), None, None, None,
  ...                   jnp.ones(5, bool))
  >>> rule = krum(num_byzantine=1)
  >>> round(float(rule.aggregate(uploads, (), None, None)[0].delta), 3)
  1.1
  """
  f, m = num_byzantine, num_selected
  if f < 0:
    raise Error(f'krum: num_byzantine={f} must not be negative.')
  if m < 1:
    raise Error(f'krum: num_selected={m} must be at least 1.')

  def init(params, key):
    del params, key
    return ()

  def chosen(uploads):  # every client counts the same
    valid = counted(uploads)  # [K]
    num_rows = valid.shape[0]
    if num_rows <= 2 * f + 2:
      raise Error(
        f'krum needs more than 2 f + 2 clients a round, got K={num_rows} with '
        f'num_byzantine={f}: raise the cohort size to {2 * f + 3} or more.'
      )
    if m > num_rows - f:
      raise Error(
        f'krum: num_selected={m} must be at most K - num_byzantine = '
        f'{num_rows} - {f} = {num_rows - f}.'
      )
    n = jnp.sum(valid.astype(jnp.int32))
    # Squared distance over the whole update: norms a tensor select others.
    distance = tree.squared_distances(uploads.update)  # [K, K]
    other = valid[None, :] & ~jnp.eye(num_rows, dtype=bool)
    nearest = _sorted(jnp.where(other, distance, jnp.inf))
    summed = jnp.arange(num_rows) < jnp.clip(n - f - 2, 1, n - 1)
    score = jnp.sum(jnp.where(summed, nearest, 0.0), axis=1)
    total = jnp.sum(jnp.where(other, distance, 0.0), axis=1)
    order = jnp.lexsort((total, jnp.where(valid, score, jnp.inf), ~valid))
    best = jnp.arange(num_rows) < jnp.minimum(m, jnp.clip(n - f, 1, n))
    best &= n > 0
    return jnp.zeros(num_rows).at[order].set(best.astype(jnp.float32))

  def aggregate(uploads, state, params, key):
    del params, key
    return Aggregate(tree.weighted_mean(uploads.update, chosen(uploads))), state

  return Aggregator(init, aggregate, Traits(rotates=True), weights=chosen)
