"""The server's step: which uploads it accepts, which entries it moves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import checks, tree
from fedjax_llm.types import (
  Aggregate,
  AnyAggregator,
  ServerOptimizer,
  ServerState,
  Shared,
  StreamingAggregator,
  Update,
  Uploads,
)

# Rules compute with fourth powers (Gram matrices): 1e36 is still a float32.
LARGEST_NORM = 1e9
LARGEST_WEIGHT = 2.0**31


def usable(update: Update, weight: jax.Array) -> jax.Array:
  """Returns True [] for an upload of one client that rules can compute with.

  Its norm is at most `LARGEST_NORM` and its weight from 0 to `LARGEST_WEIGHT`;
  both are then finite.

  >>> update = {'w': jnp.array([3.0, 4.0])}
  >>> [bool(usable(update, jnp.float32(w))) for w in (0, 7, -1, 3e38, jnp.nan)]
  [True, True, False, False, False]
  >>> bool(usable({'w': jnp.float32(1e30)}, jnp.float32(1)))
  False
  """
  floating = [
    x for x in jax.tree.leaves(update) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  small = tree.norm(floating) <= LARGEST_NORM
  return small & (weight >= 0) & (weight <= LARGEST_WEIGHT)


# --------------------------------------------------------------- broadcasts --


def unseen(aggregator: AnyAggregator, params: Any) -> Any:
  """Returns `ClientState.seen` of a client that never took part."""
  if aggregator.num_bytes is None:
    return ()
  state = aggregator.init(params, jax.random.key(0))
  return aggregator.num_bytes(state, ())[1]


def owed(aggregator: AnyAggregator, state: Any, seen: Any) -> tuple[Any, Any]:
  """Returns the bytes of the rule's broadcasts for one client, and its `seen`.

  A caller that keeps no client states passes `()`, which stays `()`: each
  client then counts as one that never took part.
  """
  if aggregator.num_bytes is None:
    return (), seen
  counts, new = aggregator.num_bytes(state, seen)
  return counts, new if jax.tree.leaves(seen) else seen


# --------------------------------------------------------- trained entries --


def watched(aggregator: AnyAggregator) -> AnyAggregator:
  """Returns the rule, with `Aggregate.trained` filled in.

  The trained entries are those inside the `trained` mask of at least one client
  that is valid and has a positive weight. Sums of a streaming rule become (its
  sums, the number of clients that trained each entry), the counts in the shapes
  of the masks; `zero` does not know these and returns None: see `begun`.

  Raises:
    Error: the argument is not a built rule; from the round, a rule that reads
      the value of a traced array in Python.
  """
  rule = checks.as_rule(aggregator, 'aggregator')
  call = functools.partial(checks.traced, 'the aggregator')
  if isinstance(rule, StreamingAggregator):

    def accumulate(sums, uploads, state, params):
      inner, counts = sums
      more = _counts(uploads)
      return (
        call(rule.accumulate, inner, uploads, state, params),
        more if counts is None else jax.tree.map(jnp.add, counts, more),
      )

    def finalize(sums, state, params, key):
      inner, counts = sums
      result, state = call(rule.finalize, inner, state, params, key)
      return _with_trained(result, counts), state

    return rule._replace(
      zero=lambda params: (rule.zero(params), None),
      accumulate=accumulate,
      finalize=finalize,
    )

  def aggregate(uploads, state, params, key):
    result, state = call(rule.aggregate, uploads, state, params, key)
    return _with_trained(result, _counts(uploads)), state

  return rule._replace(aggregate=aggregate)


def begun(sums: Any, uploads: Uploads) -> Any:
  """Returns sums of `watched(rule).zero` with zero counts of the masks' shapes.

  Args:
    sums: the result of `zero`.
    uploads: those of a block, or their shapes (`jax.eval_shape`).
  """
  shapes = jax.eval_shape(_counts, uploads)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return sums[0], zeros


def _counts(uploads: Uploads) -> Any:
  """Counts the clients that trained each entry, float32, in masks' shapes."""
  counts = uploads.valid & (uploads.weight > 0)

  def leaf(u, m):
    if u is None:
      return None
    if m is None:
      return jnp.sum(counts, dtype=jnp.float32)
    rows = counts.reshape((-1,) + (1,) * (m.ndim - 1))
    return jnp.sum(m & rows, axis=0, dtype=jnp.float32)

  return jax.tree.map(
    leaf, uploads.update, uploads.masks.trained, is_leaf=lambda x: x is None
  )


def _with_trained(result: Aggregate, counts: Any) -> Aggregate:
  if result.trained is not None:
    return result
  return result._replace(trained=jax.tree.map(lambda n: n > 0, counts))


# --------------------------------------------------------------------- step --


def stepped(
  state: ServerState,
  aggregate: Aggregate,
  aggregator_state: Any,
  server: ServerOptimizer,
  labels: Any,
) -> ServerState:
  """Returns the server's state after a step; only here the sign changes.

  The optimizer moves the entries that were trained (`Aggregate.trained`) or
  that the rule itself moved. All others keep their value, and their moments in
  every part of the optimizer's state that has the structure of the parameters.
  """
  shared = tree.select(state.params, labels, Shared)
  # A shared leaf that the rule assigns has no gradient; others have no update.
  delta = tree.merge(
    tree.like(aggregate.delta, shared), tree.zeros_like(shared)
  )
  pseudo_gradient = tree.scale(delta, -1.0)
  step, optimizer = server.update(pseudo_gradient, state.optimizer, shared)
  if aggregate.trained is not None:
    moved = tree.map_present(
      lambda d, t: t | (d != 0), delta, _trained(aggregate.trained, shared)
    )
    step = tree.map_present(lambda s, m: jnp.where(m, s, 0), step, moved)
    optimizer = _kept(optimizer, state.optimizer, shared, moved)
  params = tree.add(state.params, step)
  if aggregate.assign is not None:
    params = tree.merge(aggregate.assign, params)
  return state._replace(
    params=params, optimizer=optimizer, aggregator=aggregator_state
  )


def _trained(trained: Any, shared: Any) -> Any:
  """Returns booleans for every shared leaf: False where updates have none."""
  none = tree.map_present(lambda _: jnp.bool_(False), shared)
  return tree.merge(tree.like(trained, shared), none)


def _kept(new: Any, old: Any, params: Any, moved: Any) -> Any:
  """Returns the new optimizer state, the old one for entries not moved."""
  treedef = jax.tree.structure(params)
  shapes = [jnp.shape(p) for p in jax.tree.leaves(params)]
  masks = jax.tree.leaves(moved)

  def alike(x, shape):
    return (
      hasattr(x, 'dtype')
      and x.shape == shape
      and jnp.issubdtype(x.dtype, jnp.floating)
    )

  def by_leaf(x):  # None unless x has the structure of the parameters
    try:
      leaves = treedef.flatten_up_to(x)
    except (KeyError, TypeError, ValueError):
      return None
    return leaves if any(map(alike, leaves, shapes)) else None

  def node(new, old):
    leaves = by_leaf(new)
    if leaves is None:
      return new
    parts = [
      jnp.where(m, n, o) if alike(n, shape) else n
      for n, o, m, shape in zip(
        leaves, treedef.flatten_up_to(old), masks, shapes, strict=True
      )
    ]
    return jax.tree.unflatten(treedef, parts)

  return jax.tree.map(node, new, old, is_leaf=lambda x: by_leaf(x) is not None)
