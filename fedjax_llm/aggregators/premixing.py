"""Steps before a robust rule that make the clients' updates more alike.

Robust rules fail where honest clients differ, as under heterogeneous data.
Builders return an `Aggregator` that hands mixed updates to a rule of the
caller's choice. The rule reads `update`, `weight` and `valid`; rules on
low-rank factors are refused, since a mean of factors has another product.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.averaging import as_stack
from fedjax_llm.aggregators.mixing import mix
from fedjax_llm.aggregators.robust import median
from fedjax_llm.aggregators.weights import counted, equal, floor_of
from fedjax_llm.checks import as_rule
from fedjax_llm.types import (
  Aggregator,
  AnyAggregator,
  Error,
  Masks,
  Uploads,
  known,
)


def bucketing(
  inner: AnyAggregator | None = None, *, size: int = 2
) -> Aggregator:
  """Returns a rule on the means of random buckets of `size` clients.

  Of n clients the rule sees ceil(n / size) buckets, each client in one of them.
  Their variance is about a `size`-th of that of the clients; at most as many
  buckets are corrupted as clients, so the rule has to withstand `size` times
  the fraction (Karimireddy et al. 2022, arXiv 2006.09365, algorithm 1). The
  buckets are drawn anew every round, by the ids of the clients.

  Args:
    inner: the rule; `median()` if None. Every bucket counts the same.
    size: s; 1 is the rule itself on equal weights.

  Raises:
    Error: a size below 1; a rule that writes bases or residuals of low-rank
      factors.

  >>> from fedjax_llm import aggregators
  >>> update, ones = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = bucketing(aggregators.mean(), size=2)
  >>> key = jax.random.key(0)
  >>> rule.aggregate(uploads, (), jnp.float32(0), key)[0].delta.item()
  1.5
  """
  if size < 1:
    raise Error(f'bucketing: size={size} must be at least 1.')
  rule = _rule('bucketing', inner)

  def matrix(uploads, key):  # [buckets, K]
    here = counted(uploads)
    num_rows = here.shape[0]
    ids = jnp.arange(num_rows) if uploads.ids is None else uploads.ids
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i))
    order = jnp.lexsort((jax.vmap(draw)(jnp.asarray(ids)), ~here))
    rank = jnp.zeros(num_rows, jnp.int32).at[order].set(jnp.arange(num_rows))
    bucket = jnp.arange(-(-num_rows // size))
    return (rank // size == bucket[:, None]) & here

  def aggregate(uploads, state, params, key):
    buckets, within = jax.random.split(key)
    member = matrix(uploads, buckets)
    return rule.aggregate(_mixed(uploads, member), state, params, within)

  return rule._replace(aggregate=aggregate, weights=equal)


def nearest_mixing(
  inner: AnyAggregator | None = None, *, byzantine_fraction: float = 0.2
) -> Aggregator:
  """Returns a rule on the means of every client's nearest updates (NNM).

      y_k = mean of the n - f updates nearest to u_k, itself among them

  with f = floor(byzantine_fraction * n), in distances of whole updates. With it
  the coordinate-wise median, the trimmed mean, Krum and the geometric median
  reach the best order of error under heterogeneous data (Allouah et al. 2023,
  arXiv 2302.01772, algorithm 2).

  Args:
    inner: the rule; `median()` if None. Every client counts the same.
    byzantine_fraction: the largest share of corrupted clients.

  Raises:
    Error: a fraction outside of [0, 0.5); a rule that writes bases or residuals
      of low-rank factors.

  >>> update, ones = jnp.array([0.0, 1.0, 2.0, 9.0]), jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = nearest_mixing(byzantine_fraction=0.25)  # median of 1, 1, 1, 4
  >>> rule.aggregate(uploads, (), jnp.float32(0), None)[0].delta.item()
  1.0
  """
  fraction = byzantine_fraction
  if known(fraction) and not 0 <= fraction < 0.5:
    raise Error(
      f'nearest_mixing: byzantine_fraction={fraction} must be at least 0 and '
      'below 0.5.'
    )
  rule = _rule('nearest_mixing', inner)

  def matrix(uploads):  # [K, K]
    here = counted(uploads)
    num_rows = here.shape[0]
    n = jnp.sum(here.astype(jnp.int32))
    kept = n - floor_of(fraction, num_rows)[n]
    far = jnp.where(here, tree.squared_distances(uploads.update), jnp.inf)
    far = jnp.where(jnp.eye(num_rows, dtype=bool), -1.0, far)
    place = jnp.argsort(jnp.argsort(far, axis=-1), axis=-1)
    return (place < kept) & here & here[:, None]

  def aggregate(uploads, state, params, key):
    return rule.aggregate(_mixed(uploads, matrix(uploads)), state, params, key)

  return rule._replace(aggregate=aggregate, weights=equal)


def _rule(name: str, inner: AnyAggregator | None) -> Aggregator:
  rule = as_stack(as_rule(inner or median(), f'{name}: inner'))
  if rule.traits.changes_basis or rule.traits.writes_residual:
    raise Error(
      f'{name} hands means of factors to its rule, and this rule needs the '
      'products of single clients: name a rule on entries, such as median.'
    )
  rotates = rule.traits.linear or rule.traits.rotates
  traits = rule.traits._replace(linear=False, rotates=rotates)
  return rule._replace(traits=traits)


def _mixed(uploads: Uploads, member: jax.Array) -> Uploads:
  """Returns the uploads of the means over groups, [groups, K] booleans."""
  ones = member.astype(jnp.float32)
  share = ones / jnp.maximum(jnp.sum(ones, 1, keepdims=True), 1.0)
  some = jnp.any(member, 1)

  def means(stack: Any) -> Any:
    mean = mix(stack, share)
    return jax.tree.map(lambda m, x: m.astype(x.dtype), mean, stack)

  def either(mask: Any) -> Any:  # what some client of the group has
    flat = jnp.reshape(mask, (member.shape[1], -1))
    any_of = jnp.any(member[:, :, None] & (flat > 0), 1)
    return any_of.reshape((-1, *jnp.shape(mask)[1:]))

  masks = Masks(None, None) if uploads.masks is None else uploads.masks
  return Uploads(
    update=means(uploads.update),
    start=means(uploads.start),
    masks=Masks(*jax.tree.map(either, tuple(masks))),
    weight=some.astype(jnp.float32),
    valid=some,
  )
