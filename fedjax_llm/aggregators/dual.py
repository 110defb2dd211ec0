"""Rules on the shared part of `Dual` parameters.

`on_shared` returns an aggregator.
"""

from typing import Any

import jax

from fedjax_llm.checks import as_rule
from fedjax_llm.nodes import Dual
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  AnyAggregator,
  Masks,
  Params,
  Uploads,
)


def on_shared(inner: AnyAggregator) -> AnyAggregator:
  """Returns `inner` on the shared part alone; the personal part gets no change.

  Rules that need whole factors then work beside personal ones. The result is
  streaming if `inner` is.

  >>> from fedjax_llm.aggregators import mean
  >>> import jax.numpy as jnp
  >>> rule, params = on_shared(mean()), Dual(jnp.float32(0), jnp.float32(7))
  >>> update = Dual(jnp.array([1.0, 3.0]), None)
  >>> ones = Masks(params, params)
  >>> uploads = Uploads(update, update, ones, jnp.ones(2), jnp.ones(2, bool))
  >>> sums = rule.accumulate(rule.zero(params), uploads, (), params)
  >>> rule.finalize(sums, (), params, None)[0].delta
  Dual(shared=Array(2., dtype=float32), personal=None)
  """

  as_rule(inner, 'on_shared: inner')

  def own(uploads: Uploads) -> Uploads:
    return uploads._replace(
      update=uploads.update.shared,
      start=uploads.start.shared,
      masks=Masks(*(m.shared for m in uploads.masks)),
    )

  def whole(result: Aggregate, params: Dual) -> Aggregate:
    nothing = jax.tree.map(lambda _: None, params.personal)
    beside = lambda x: None if x is None else Dual(x, nothing)
    return Aggregate(beside(result.delta), beside(result.assign))

  def init(params: Params, key: Any) -> Any:
    return inner.init(params.shared, key)

  def weights(uploads: Uploads) -> jax.Array:
    seen = own(uploads)
    return seen.weight if inner.weights is None else inner.weights(seen)

  if isinstance(inner, Aggregator):

    def aggregate(uploads, state, params, key):
      result, state = inner.aggregate(own(uploads), state, params.shared, key)
      return whole(result, params), state

    return inner._replace(init=init, aggregate=aggregate, weights=weights)

  def finalize(sums, state, params, key):
    result, state = inner.finalize(sums, state, params.shared, key)
    return whole(result, params), state

  return inner._replace(
    init=init,
    zero=lambda params: inner.zero(params.shared),
    accumulate=lambda sums, uploads, state, params: inner.accumulate(
      sums, own(uploads), state, params.shared
    ),
    finalize=finalize,
    weights=weights,
  )
