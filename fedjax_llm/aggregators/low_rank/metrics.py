"""Metrics of the aggregation of low-rank factors.

`measure` returns the error, drift and effective rank of one round.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.nodes import Controlled, LowRank
from fedjax_llm.types import Metrics, Params, Uploads


def measure(uploads: Uploads, old: Params, new: Params) -> Metrics:
  """Returns the error, drift and effective rank of one aggregation, as metrics.

  With `uploads.weight` and the clients' whole factors, over all `LowRank` nodes
  whose factors travel:

      aggregators/error           ||served - wanted|| / ||wanted||,
                                  wanted = sum_k w_k s_k a_k b_k
      aggregators/error_by_layer  the same for each layer, [L]
      aggregators/effective_rank  participation ratio of wanted, mean over
                                  layers and targets (`effective_rank`)
      aggregators/drift           sqrt(sum_k w_k ||u_k - u||^2
                                  / sum_k w_k ||u_k||^2): 0 if all agree
      aggregators/drift_by_layer  the same for each layer, [L]

  `served` is s a b plus what the round added to the residual. `fed_opt` puts
  the weights of its rule (`Aggregator.weights`) in place of those of the round,
  so an unweighted rule is measured against the unweighted mean. All metrics are
  0 where no client has a positive weight. Norms are computed through Gram
  matrices, or through the residual where there is one; in float32 they resolve
  errors down to about 1e-3 where a rule changes the basis. Nodes with a private
  factor have no common product and are left out. The metrics by layer are left
  out where nodes differ in their number of layers.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> sent = received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> metrics = measure(sent, node(1, 0), node(2, 3))  # 7 wanted, 6 served
  >>> round(float(metrics['aggregators/error']), 4)
  0.1429
  """
  if isinstance(old, Controlled):
    assert isinstance(new, Controlled)
    own = lambda x: x.params
    uploads = uploads._replace(
      update=own(uploads.update),
      start=own(uploads.start),
      masks=uploads.masks._replace(
        held=own(uploads.masks.held), trained=own(uploads.masks.trained)
      ),
    )
    old, new = own(old), own(new)
  weight = tree.normalise(by_weight(uploads))
  some_weight = jnp.any(weight > 0)
  metrics = {'aggregators/drift': drift(uploads.update, weight)}
  measured = []
  for before, after, nodes, update, trained in _nodes(
    old, new, tree.whole(uploads), uploads.update, uploads.masks.trained
  ):
    sent = all(
      mask is None or got is not None
      for mask, got in ((trained.a, update.a), (trained.b, update.b))
    )
    if sent:
      measured.append((*error(nodes, weight, before, after), nodes, update))
  if not measured:
    return metrics
  squares = [(jnp.square(e), jnp.square(w)) for e, w, *_ in measured]
  # Without a positive weight the wanted product is zero: there is no error.
  squares = [(jnp.where(some_weight, e, 0), w) for e, w in squares]
  total = lambda i: sum(jnp.sum(s[i]) for s in squares)
  metrics['aggregators/error'] = _ratio(total(0), total(1))
  shapes = {e.shape for e, *_ in measured}
  if len(shapes) == 1 and len(next(iter(shapes))) == 1:
    by_layer = lambda i: sum(s[i] for s in squares)
    metrics['aggregators/error_by_layer'] = _ratio(by_layer(0), by_layer(1))
    metrics['aggregators/drift_by_layer'] = drift(
      [(update.a, update.b) for *_, update in measured], weight, axes=2
    )
  ranks = [
    jnp.ravel(low_rank.effective_rank(low_rank.stack(nodes, weight)))
    for _, _, nodes, _ in measured
  ]
  metrics['aggregators/effective_rank'] = jnp.mean(jnp.concatenate(ranks))
  return metrics


def error(
  nodes: LowRank, weight: jax.Array, before: LowRank, after: LowRank
) -> tuple[jax.Array, jax.Array]:
  """Returns ||served - wanted||_F and ||wanted||_F of one node, [...] each."""
  wanted = low_rank.stack(nodes, weight)
  if after.residual is None:
    missed = low_rank.fro_norm(low_rank.residual(nodes, weight, after))
  else:
    old = 0.0 if before.residual is None else before.residual
    gap = (low_rank.dense(wanted) - low_rank.dense(after)) - (
      after.residual - old
    )
    missed = jnp.sqrt(jnp.sum(jnp.square(gap), axis=(-1, -2)))
  return missed, low_rank.fro_norm(wanted)


def drift(update: Any, weight: jax.Array, axes: int = 1) -> jax.Array:
  """Returns the distance of updates [K, ...] from their mean, from 0 to 1.

  With `axes=2` updates are [K, L, ...], and the result is one number for each
  layer, [L].
  """
  mean = tree.weighted_sum(update, weight)
  rows = lambda x: jnp.sum(
    jnp.square(x.astype(jnp.float32)).reshape(*x.shape[:axes], -1), axis=-1
  )
  apart = jax.tree.leaves(jax.tree.map(lambda u, m: rows(u - m), update, mean))
  size = jax.tree.leaves(jax.tree.map(rows, update))
  dot = lambda parts: jnp.tensordot(weight, sum(parts), 1) if parts else 0.0
  return _ratio(dot(apart), dot(size))


def _ratio(above: Any, below: Any) -> jax.Array:
  """Returns sqrt(above / below); 0 where both are zero."""
  some = below > 0
  root = jnp.sqrt(above / jnp.where(some, below, 1.0))
  return jnp.where(some, root, jnp.where(above > 0, jnp.inf, 0.0))


def _nodes(first: Any, *rest: Any) -> list[tuple[LowRank, ...]]:
  """Returns the `LowRank` nodes of trees of one structure, side by side."""
  leaves, treedef = jax.tree.flatten(
    first, is_leaf=lambda x: x is None or low_rank.is_node(x)
  )
  others = [treedef.flatten_up_to(x) for x in rest]
  return [xs for xs in zip(leaves, *others) if low_rank.is_node(xs[0])]
