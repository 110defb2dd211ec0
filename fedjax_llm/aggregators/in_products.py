"""Robust rules on products: any rule on lengths and angles.

`in_products` returns an `Aggregator`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.averaging import as_stack
from fedjax_llm.aggregators.low_rank.by_node import NOTHING, Seen, by_node
from fedjax_llm.aggregators.product_space import gram_of
from fedjax_llm.aggregators.robust_means import geometric_median
from fedjax_llm.aggregators.weights import by_weight, counted, equal
from fedjax_llm.checks import as_rule
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  AnyAggregator,
  Error,
  Masks,
  Traits,
  Uploads,
)


def in_products(inner: AnyAggregator | None = None) -> Aggregator:
  """Returns a rule on the changes of products, s_k a_k b_k - s a b.

  A rule that depends on lengths and angles alone, and whose result is a sum
  c_1 u_1 + ... + c_K u_K, needs no coordinates: it is applied to vectors of K
  numbers with the same inner products as the changes of all weights together,

      E E' = G,   G_kj = <s_k a_k b_k - s a b, s_j a_j b_j - s a b>

  and its coefficients c give the product s a b + sum_k c_k (s_k a_k b_k - s a
  b), which is written in factors of the server's rank as FlexLoRA writes its
  mean (`flexlora`). No matrix of [D, F] is formed. Factors that look harmless
  one by one are so judged by what they do to the weights. Leaves outside of
  low-rank nodes count by their updates.

  Args:
    inner: a rule with the trait `rotates` or `linear`; `geometric_median()` if
      None. A memory (`centred_clipping`) starts anew in every round.

  Raises:
    Error: a rule on single entries, such as the median; parameters without
      low-rank nodes; from the round, a factor that is frozen or private.

  >>> from fedjax_llm.aggregators import norm_bounding, received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> sent = received(node(1, 0), [node(1, 0.5), node(9, 9)])
  >>> rule = jax.jit(in_products(norm_bounding(bound=1.0)).aggregate)
  >>> new = rule(sent, (), node(1, 0), jax.random.key(0))[0].assign
  >>> round((new.a * new.b).item(), 4)  # of the products 0.5 and 81
  0.75
  """
  rule = as_stack(as_rule(inner or geometric_median(), 'in_products: inner'))
  if not (rule.traits.rotates or rule.traits.linear):
    raise Error(
      'in_products needs a rule on lengths and angles, and this one looks at '
      'single entries or writes factors itself: name one such as krum, '
      'geometric_median, norm_bounding, centred_clipping, foolsgold or fltrust.'
    )

  def init(params, key):
    return by_node('in_products', _nothing, Traits()).init(params, key)

  def coefficients(uploads: Uploads, params: Any, key: Any) -> jax.Array:
    here = counted(uploads)
    pair = here[:, None] & here
    gram = jnp.where(pair, gram_of(_changes(uploads, params)), 0.0)
    u, s, _ = linalg.svd((gram + gram.T) / 2)
    length = tree.root(jnp.maximum(s, 0.0))
    rows = u * length
    none: Any = Masks(None, None)
    zero = jnp.zeros(len(here))
    result, _ = rule.aggregate(
      uploads._replace(update=rows, start=rows, masks=none),
      rule.init(zero, key),
      zero,
      key,
    )
    # Directions in which nobody moves, up to rounding, have no coefficients.
    some = s > 1e-7 * jnp.max(s)
    inverse = jnp.where(some, 1 / jnp.where(some, length, 1.0), 0.0)
    exact = jax.lax.Precision.HIGHEST
    c = jnp.matmul(u, inverse * result.delta, precision=exact)
    return jnp.where(here, c, 0.0)

  def aggregate(uploads, state, params, key):
    share = coefficients(uploads, params, key)

    def write(seen: Seen) -> Aggregate:
      ours = tree.broadcast(seen.server._replace(residual=None), 1)
      join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)])
      nodes = LowRank(
        *(
          join(getattr(ours, name), getattr(seen.nodes, name))
          for name in ('a', 'b', 'scale')
        )
      )
      weight = jnp.append(1 - jnp.sum(share), share)
      best = low_rank.svd_round(
        low_rank.stack(nodes, weight),
        seen.server.a.shape[-1],
        scale=seen.server.scale,
      )
      return Aggregate(NOTHING, LowRank(best.a, best.b, None))

    written = by_node('in_products', write, Traits(), assigns=True)
    result, _ = written.aggregate(uploads, (), params, key)

    def beside(p, delta, update):
      if low_rank.is_node(p) or update is None:
        return delta
      return tree.weighted_sum(update, share).astype(update.dtype)

    delta = jax.tree.map(
      beside,
      params,
      result.delta,
      uploads.update,
      is_leaf=lambda x: x is None or low_rank.is_node(x),
    )
    return Aggregate(delta, result.assign), state

  weights = by_weight if rule.weights is by_weight else equal
  return Aggregator(
    init, aggregate, Traits(changes_basis=True), weights=weights
  )


def _nothing(seen: Seen) -> Aggregate:
  del seen
  return Aggregate(NOTHING, NOTHING)


def _changes(uploads: Uploads, params: Any) -> Any:
  """Returns nodes [K, ...] with the changes of the products, other updates.

      s_k a_k b_k - s a b = [a_k - a, a] [s_k b_k; s_k b_k - s b]

  so that small changes of large products are not lost in rounding.
  """

  def leaf(server, whole, update):
    if not low_rank.is_node(server):
      return update
    num = whole.a.shape[0]
    scaled = lambda b, scale: b.astype(jnp.float32) * scale[..., None, None]
    a, b = server.a.astype(jnp.float32), scaled(server.b, server.scale)
    own = scaled(whole.b, whole.scale)
    wide = jnp.broadcast_to(a, (num, *a.shape))
    return LowRank(
      jnp.concatenate([whole.a - a, wide], -1),
      jnp.concatenate([own, own - b], -2),
      jnp.ones_like(whole.scale),
    )

  return jax.tree.map(
    leaf,
    params,
    tree.whole(uploads),
    uploads.update,
    is_leaf=lambda x: x is None or low_rank.is_node(x),
  )
