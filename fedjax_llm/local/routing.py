"""Local training of a network that routes tokens to experts.

`balanced` returns a `Loss`, `embeddings` a measure, `routed` a `LocalUpdate`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.local.observed import with_statistics
from fedjax_llm.nodes import Experts, Routing
from fedjax_llm.types import (
  ClientOutput,
  Error,
  LocalUpdate,
  Loss,
  Masks,
  Params,
)


def balanced(loss: Loss, strength: float) -> Loss:
  """Returns the token mean of the loss plus strength * sum_m balance_m.

  balance_m belongs to a weight with experts (`Routing`): 1 where tokens are
  spread evenly over all experts, up to half of the experts held where two
  receive all tokens. The sum is over weights and layers; for their mean divide
  the strength.

  Raises:
    Error: a negative strength; from the loss, a network without experts, or a
        loss without statistics (`local.Observed` has them).

  >>> from fedjax_llm.local.observed import Observed
  >>> from fedjax_llm.types import LossSum
  >>> def both(base, params, batch, key):  # of a network of two layers
  ...   routing = Routing(jnp.array([1.0, 3.0]), None, None, None)
  ...   return LossSum(*jnp.float32([10, 2, 0])), {'layers': routing}
  >>> loss = balanced(Observed(None, both), 0.5)
  >>> float(loss(None, {}, None, None).total)  # 10 + 2 * 0.5 * 4
  14.0
  """
  if strength < 0:
    raise Error(f'balanced: strength={strength} must not be negative.')

  def penalised(base, params, batch, key):
    sums, statistics = with_statistics(loss)(base, params, batch, key)
    term = sum(jnp.sum(x.balance) for x in _routings(statistics))
    return sums._replace(total=sums.total + sums.count * strength * term)

  return loss if strength == 0 else penalised


def embeddings(loss: Loss) -> Callable[..., Any]:
  """Returns a measure for `reported`: router embeddings of client and experts.

      experts [M, E, R]  mean over the client's tokens of x A_e, of the experts
                         that it holds, zero for others
      tokens  [M, R]     mean over the client's tokens of x P
      held    [M, E]     1 for the experts that it holds

  of each of M weights, in the order of `clients.assignment`; the client's
  tokens are those of all its batches of the round.

  >>> from fedjax_llm.local.observed import Observed
  >>> from fedjax_llm.types import LossSum
  >>> def both(base, params, batch, key):  # one token, and one layer
  ...   routing = Routing(None, batch * jnp.ones((1, 2, 1)), batch * jnp.ones(
  ...     (1, 1)), jnp.ones(1))
  ...   return LossSum(batch, batch, batch), {'q': routing}
  >>> loss = Observed(None, both)
  >>> node = Experts(None, None, None, held=jnp.array([[0, 1]], jnp.uint8))
  >>> batches = jnp.array([1.0, 3.0])
  >>> report = embeddings(loss)(None, {'q': node}, None, batches, None)
  >>> report['experts'].tolist(), report['tokens'].tolist()
  ([[[0.0], [2.0]]], [[2.0]])
  """

  def measure(base, params, held, batches, key):
    del held  # the nodes hold the experts' marks

    def one(batch) -> Any:
      _, statistics = with_statistics(loss)(base, params, batch, key)
      rows = [x._replace(balance=None) for x in _routings(statistics)]
      return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

    each = jax.lax.map(one, batches)
    sums = jax.tree.map(lambda x: jnp.sum(x, 0), each)
    count = jnp.maximum(sums.count, 1)
    mine = jnp.concatenate([x.held for x in _nodes(params)])
    mine = mine.astype(jnp.float32)
    return {
      'experts': mine[..., None] * sums.experts / count[:, None, None],
      'tokens': sums.tokens / count[:, None],
      'held': mine,
    }

  return measure


def routed(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner`, with tokens routed to the experts that the client holds.

  While `inner` trains, `Experts.held` marks the experts of the pool that the
  masks hold; `inner` does not train it. The client keeps it
  (`ClientOutput.private`) where the scope makes it private
  (`scopes.assignment.assigned`).

  >>> from fedjax_llm.types import Context
  >>> from fedjax_llm.nodes import LowRank
  >>> seen = []
  >>> def run(base, start, state, batches, masks, context):
  ...   seen.append(start['q'].held.tolist())
  ...   return ClientOutput(start, masks)
  >>> node = Experts(None, LowRank(jnp.ones((1, 3, 1, 1)), None, None), None,
  ...                jnp.zeros((1, 3), jnp.uint8))
  >>> mine = jnp.array([True, False, True]).reshape(1, 3, 1, 1)
  >>> mask = {'q': Experts(None, LowRank(mine, None, None), None, True)}
  >>> update = routed(LocalUpdate(lambda trainable: (), run))
  >>> both = Masks(mask, mask)
  >>> out = update.run(None, {'q': node}, (), None, both, Context())
  >>> seen, out.private['q'].held.tolist()
  ([[[1, 0, 1]]], [[1, 0, 1]])
  """

  def without(masks: Any) -> Any:
    return _each(lambda m: m._replace(held=None), masks)

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    def with_held(x, m):
      mine = jnp.broadcast_to(m.pool.a[..., 0, 0], x.held.shape)
      return x._replace(held=mine.astype(x.held.dtype))

    begin = _each(with_held, start, masks.held)
    out = inner.run(
      base, begin, state, batches, Masks(*map(without, masks)), context
    )
    mine = lambda x, new: x._replace(held=new.held)
    both = lambda mine, all: mine._replace(held=all.held)
    return out._replace(
      private=_each(mine, jax.tree.map(lambda _: None, start), begin),
      masks=Masks(*(_each(both, x, y) for x, y in zip(out.masks, masks))),
    )

  return LocalUpdate(lambda trainable: inner.init(without(trainable)), run)


def _is_node(x: Any) -> bool:
  return isinstance(x, Experts)


def _nodes(params: Params) -> list[Experts]:
  return [x for x in jax.tree.leaves(params, is_leaf=_is_node) if _is_node(x)]


def _each(change: Callable[..., Any], first: Any, *rest: Any) -> Any:
  """Applies `change` to the nodes of alike trees; keeps the first's rest."""

  def node(x, *others):
    return change(x, *others) if _is_node(x) else x

  is_leaf = lambda x: x is None or _is_node(x)
  return jax.tree.map(node, first, *rest, is_leaf=is_leaf)


def _routings(statistics: Any) -> list[Routing]:
  is_routing = lambda x: isinstance(x, Routing)
  leaves = jax.tree.leaves(statistics, is_leaf=is_routing)
  routings = list(filter(is_routing, leaves))
  if not routings:
    raise Error('the network has no experts, so it has no statistics of them.')
  return routings
