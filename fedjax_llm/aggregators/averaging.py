"""Means of updates, control variates, and streaming rules on a whole stack.

Builders return a `StreamingAggregator`, `as_stack` an `Aggregator`. Sums are
added up block by block, in float32, by one contraction of the weights with the
stack (`tree.weighted_sum`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import by_weight, equal
from fedjax_llm.checks import as_rule
from fedjax_llm.nodes import Controlled
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  AnyAggregator,
  Error,
  Masks,
  Params,
  StreamingAggregator,
  Traits,
  Uploads,
)


class Sums(NamedTuple):
  """The sums of a mean over the clients added so far, all float32."""

  total: Any  # sum_k w_k u_k, as the parameters
  weight: Any  # sum_k w_k: [], or as the parameters where masks differ


def _divide(total: jax.Array, weight: jax.Array, like: jax.Array) -> jax.Array:
  some = weight > 0
  mean = jnp.where(some, total / jnp.where(some, weight, 1.0), 0.0)
  return mean.astype(like.dtype)


def _mean_by(weights: Callable[[Uploads], jax.Array]) -> StreamingAggregator:
  def init(params, key):
    del params, key
    return ()

  def zero(params):
    return Sums(tree.zeros_like(params, jnp.float32), jnp.float32(0))

  def accumulate(sums, uploads, state, params):
    del state, params
    weight = weights(uploads)
    return Sums(
      tree.add(sums.total, tree.weighted_sum(uploads.update, weight)),
      sums.weight + jnp.sum(weight),
    )

  def finalize(sums, state, params, key):
    del key
    delta = tree.map_present(
      lambda total, p: _divide(total, sums.weight, p), sums.total, params
    )
    return Aggregate(delta), state

  return StreamingAggregator(init, zero, accumulate, finalize, weights=weights)


def mean() -> StreamingAggregator:
  """Returns the weighted mean of the updates: sum_k w_k u_k / sum_k w_k.

  With weights that count examples this is federated averaging (McMahan et al.
  2017, arXiv 1602.05629, algorithm 1). An entry that a client did not train
  has the update zero and counts as a vote for no change; `masked_mean` leaves
  it out instead. A round without any weight changes nothing.

  Updates are [K, ...] a leaf, sums run in float32, the delta has the dtype of
  the parameter.

  >>> update = {'w': jnp.array([[1.0, 2.0], [5.0, 6.0]])}  # [K, 2]
  >>> uploads = Uploads(update, None, None, jnp.array([3.0, 1.0]),
  ...                   jnp.array([True, True]))
  >>> rule, params = mean(), {'w': jnp.zeros(2)}
  >>> sums = rule.accumulate(rule.zero(params), uploads, (), params)
  >>> rule.finalize(sums, (), params, None)[0].delta['w'].tolist()
  [2.0, 3.0]
  """
  return _mean_by(by_weight)._replace(traits=Traits(linear=True))


def uniform_mean() -> StreamingAggregator:
  """Returns the mean with the same weight for valid clients: sum_k u_k / n.

  Secure aggregation and differential privacy start from this form; several
  codebases use it in FedAdam and FedYogi.

  >>> rule = as_stack(uniform_mean())
  >>> uploads = Uploads(jnp.array([1.0, 5.0, 0.0]), None, None,
  ...                   jnp.array([3.0, 1.0, 0.0]),
  ...                   jnp.array([True, True, False]))
  >>> float(rule.aggregate(uploads, (), jnp.float32(0), None)[0].delta)
  3.0
  """
  return _mean_by(equal)._replace(traits=Traits(rotates=True))


def masked_mean(
  denominator: str = 'mask', weighted: bool = True
) -> StreamingAggregator:
  """Returns the weighted mean of each entry over the clients that trained it.

      denominator='mask':    sum_k w_k m_k u_k / sum_k w_k m_k
      denominator='weight':  sum_k w_k m_k u_k / sum_k w_k

  where m_k is `Uploads.masks`, trained. 'mask' is the mean over the holders of
  a rank, a layer or a block (RBLA, arXiv 2408.08699; FedRA, arXiv 2311.11227);
  'weight' is padding with zeros. Where no client trained the delta is zero, so
  the server keeps its value. With full masks both are `mean`. Without
  `weighted` clients count the same.

  Raises:
    Error: `denominator` is another word.

  >>> masks = Masks(None, jnp.array([[True, True], [True, False]]))  # [K, R]
  >>> uploads = Uploads(jnp.array([[2.0, 2.0], [4.0, 0.0]]), None, masks,
  ...                   jnp.ones(2), jnp.array([True, True]))
  >>> for name in ('mask', 'weight'):
  ...   rule = as_stack(masked_mean(name))
  ...   rule.aggregate(uploads, (), jnp.zeros(2), None)[0].delta.tolist()
  [3.0, 2.0]
  [3.0, 1.0]
  """
  if denominator not in ('mask', 'weight'):
    raise Error(
      f"masked_mean: denominator={denominator!r} is neither 'mask' nor "
      "'weight'."
    )
  counted = by_weight if weighted else equal
  plain = _mean_by(counted)

  def zero(params):
    zeros = tree.zeros_like(params, jnp.float32)
    return Sums(zeros, zeros) if denominator == 'mask' else plain.zero(params)

  def accumulate(sums, uploads, state, params):
    trained = tree.map_present(tree.rows, uploads.masks.trained, uploads.update)
    update = tree.apply_mask(uploads.update, trained)
    if denominator == 'weight':
      inside = uploads._replace(update=update)
      return plain.accumulate(sums, inside, state, params)
    weight = counted(uploads)

    def holders(u, m):  # sum_k w_k m_k, contracted before it is broadcast
      if u is None:
        return None
      if m is None:
        return jnp.broadcast_to(jnp.sum(weight), u.shape[1:])
      return jnp.broadcast_to(tree.weighted_sum(m, weight), u.shape[1:])

    seen = jax.tree.map(
      holders, uploads.update, trained, is_leaf=lambda x: x is None
    )
    return Sums(
      tree.add(sums.total, tree.weighted_sum(update, weight)),
      tree.add(sums.weight, seen),
    )

  def finalize(sums, state, params, key):
    if denominator == 'weight':
      return plain.finalize(sums, state, params, key)
    delta = tree.map_present(_divide, sums.total, sums.weight, params)
    return Aggregate(delta), state

  return StreamingAggregator(
    plain.init, zero, accumulate, finalize, weights=counted
  )


# ------------------------------------------------------------- composition --


def control_variates(inner: AnyAggregator, num_clients: int) -> AnyAggregator:
  """Returns SCAFFOLD's server rule: `inner` and the mean control variate c.

  Parameters are `Controlled(params, control)` and an update is
  `Controlled(u_k, c_k+ - c_k)`. `inner` aggregates the u_k; the control
  variate is assigned, not optimised:

      c <- c + 1/N sum_{valid k} (c_k+ - c_k)

  unweighted and over the N clients of the population, so that c stays the mean
  of all c_k (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, line 17).
  The result is streaming if `inner` is.

  Raises:
    Error: `num_clients` is not positive.

  >>> rule = as_stack(control_variates(mean(), num_clients=10))
  >>> params = Controlled(jnp.float32(0), jnp.float32(1))
  >>> update = Controlled(jnp.array([2.0, 4.0]), jnp.array([3.0, 2.0]))
  >>> ones, both = Masks(params, params), jnp.array([True, True])
  >>> uploads = Uploads(update, update, ones, jnp.ones(2), both)
  >>> result, _ = rule.aggregate(uploads, (), params, None)
  >>> float(result.delta.params), float(result.assign.control)
  (3.0, 1.5)
  """
  as_rule(inner, 'control_variates: inner')
  if num_clients < 1:
    raise Error(
      f'control_variates: num_clients={num_clients} must be at least 1: it is '
      'the size of the population.'
    )

  def own(uploads: Uploads) -> Uploads:
    return uploads._replace(
      update=uploads.update.params,
      start=uploads.start.params,
      masks=Masks(uploads.masks.held.params, uploads.masks.trained.params),
    )

  def changes(uploads: Uploads) -> Any:
    return tree.weighted_sum(uploads.update.control, equal(uploads))

  def outcome(result: Aggregate, change: Any, params: Controlled) -> Aggregate:
    control = tree.map_present(
      lambda c, d: (c.astype(jnp.float32) + d / num_clients).astype(c.dtype),
      params.control,
      change,
    )
    assign = result.assign
    if assign is None:
      assign = jax.tree.map(lambda _: None, params.params)
    return Aggregate(
      delta=Controlled(
        result.delta, jax.tree.map(lambda _: None, params.control)
      ),
      assign=Controlled(assign, control),
    )

  # A change of c counts the same for clients of every weight.
  traits = inner.traits._replace(linear=False, rotates=False)

  def init(params, key):
    return inner.init(params.params, key)

  def weights(uploads: Uploads) -> jax.Array:
    seen = own(uploads)
    return seen.weight if inner.weights is None else inner.weights(seen)

  if isinstance(inner, Aggregator):

    def aggregate(uploads, state, params, key):
      result, state = inner.aggregate(own(uploads), state, params.params, key)
      return outcome(result, changes(uploads), params), state

    return inner._replace(
      init=init, aggregate=aggregate, traits=traits, weights=weights
    )

  def zero(params):
    return Controlled(
      inner.zero(params.params), tree.zeros_like(params.control, jnp.float32)
    )

  def accumulate(sums, uploads, state, params):
    return Controlled(
      inner.accumulate(sums.params, own(uploads), state, params.params),
      tree.add(sums.control, changes(uploads)),
    )

  def finalize(sums, state, params, key):
    result, state = inner.finalize(sums.params, state, params.params, key)
    return outcome(result, sums.control, params), state

  return inner._replace(
    init=init,
    zero=zero,
    accumulate=accumulate,
    finalize=finalize,
    traits=traits,
    weights=weights,
  )


def as_stack(aggregator: AnyAggregator) -> Aggregator:
  """Returns any rule as one on the whole stack, taken as a single block.

  >>> isinstance(as_stack(mean()), Aggregator)
  True
  """
  rule = as_rule(aggregator, 'as_stack: aggregator')
  if isinstance(rule, Aggregator):
    return rule

  def aggregate(uploads: Uploads, state: Any, params: Params, key: Any):
    sums = rule.accumulate(rule.zero(params), uploads, state, params)
    return rule.finalize(sums, state, params, key)

  return Aggregator(
    rule.init,
    aggregate,
    rule.traits,
    rule.num_bytes,
    rule.weights,
    rule.broadcast,
  )
