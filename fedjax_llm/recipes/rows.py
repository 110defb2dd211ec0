"""Methods with several versions of the parameters; a client trains one of them.

`compose` returns a `FederatedAlgorithm`. The server holds C versions, stacked:
every leaf of the adapter becomes [C, ...]. A client receives one row, trains it
and sends it; the rule averages each row over the clients that trained it. A
client that never trained is served the mean of the rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, server, tree
from fedjax_llm.recipes import composing
from fedjax_llm.types import (
  AnyAggregator,
  ClientOutput,
  Context,
  FederatedAlgorithm,
  LocalUpdate,
  Masks,
  Params,
  Scope,
)


class Placed(NamedTuple):
  """A client's state with the row that it trained last, -1 for none."""

  row: Any  # [] int32
  inner: Any


def compose(
  update: LocalUpdate,
  num_rows: int,
  place: Callable[[Params, Context], jax.Array],
  parts: dict[str, Any],
  *,
  narrow: Callable[[Params, Masks, Context], Masks] | None = None,
  rule: AnyAggregator | None = None,
) -> FederatedAlgorithm:
  """Returns a method on C versions of the parameters.

  Args:
    update: training of one version.
    num_rows: C.
    place: `(params, context) -> row`, the version that a client trains.
    parts: of `fed_opt`, without an aggregator.
    narrow: `(params of one row, masks, context) -> masks`, entries of its row
      that a client holds and trains; all if None.
    rule: on the stacked parameters; the mean of each row over the clients that
      trained it if None. `aggregators.mixing.mixed` wants a row a client.

  >>> from fedjax_llm import local
  >>> own = lambda params, context: context.client % 2
  >>> method = compose(local.sgd(None, local.optimizer('sgd')), 2, own, {})
  >>> state = method.init(jax.random.key(0), {'w': jnp.ones(3)})
  >>> state.params['w'].shape, method.personal(state.params, None)['w'].shape
  ((2, 3), (3,))
  """
  # No rule here writes residuals, so there is nothing to fold.
  parts = {'measure': None, **parts, 'fold': None}
  inner = parts.pop('scope', None) or scopes.everything()

  return server.on_part(
    functools.partial(
      composing.compose,
      on_row(update, place),
      scope=_rows_of(inner, num_rows, place, narrow),
      aggregator=rule or aggregators.masked_mean('mask'),
      **parts,
    ),
    wrap=lambda key, params: jax.tree.map(
      jnp.array, tree.broadcast(params, num_rows)
    ),
    get=mean_row,
    put=lambda rows, part: tree.broadcast(part, num_rows),
    serve=_serve,
  )


def on_row(
  update: LocalUpdate, place: Callable[[Params, Context], jax.Array]
) -> LocalUpdate:
  """Returns a local update that trains one row of stacked parameters."""

  def init(trainable):
    return Placed(jnp.int32(-1), update.init(tree.take(trainable, 0)))

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    row = jnp.asarray(place(start, context), jnp.int32)
    mine = tree.take(start, row)
    own = Masks(*(tree.take(m, row) for m in masks))
    out = update.run(base, mine, state.inner, batches, own, context)

    def put(leaf, like):
      return jnp.zeros(like.shape, leaf.dtype).at[row].set(leaf)

    whole = tree.map_present(put, out.update, tree.like(start, masks.trained))
    return out._replace(update=whole, masks=masks, state=Placed(row, out.state))

  return LocalUpdate(init, run)


def _rows_of(inner, num_rows, place, narrow) -> Scope:
  def labels(params):
    return inner.labels(params)

  def mask(start, state, context):
    row = place(start, context)
    one = tree.take(start, 0)
    masks = inner.mask(one, state, context)
    if narrow is not None:
      masks = narrow(one, masks, context)
    chosen = jnp.arange(num_rows) == row

    def leaf(x, m):
      m = jnp.asarray(m)
      m = m.reshape((1,) * (x.ndim - m.ndim) + m.shape)
      return chosen.reshape((-1,) + (1,) * x.ndim) & m

    return Masks(*(tree.map_present(leaf, one, m) for m in masks))

  return Scope(labels, mask)


def mean_row(params: Params) -> Params:
  """Returns the mean of the rows, [C, ...] -> [...], a leaf.

  >>> mean_row({'w': jnp.array([[1.0], [3.0]])})['w'].tolist()
  [2.0]
  """
  return jax.tree.map(lambda x: jnp.mean(x, 0).astype(x.dtype), params)


def _serve(params: Params, state: Any) -> Params:
  if state is None:
    return mean_row(params)
  row = state.local.row
  mine, other = tree.take(params, jnp.maximum(row, 0)), mean_row(params)
  return jax.tree.map(lambda x, y: jnp.where(row >= 0, x, y), mine, other)
