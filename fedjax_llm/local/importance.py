"""Importance of entries and weights, and local updates that report it.

`weight_importance` returns a measure, `reported` a `LocalUpdate`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Base, ClientOutput, Key, LocalUpdate, Loss, Params


def saliency(
  loss: Loss, base: Base, start: Params, trained: Params, batches: Any, key: Key
) -> Params:
  """Returns |p dL/dp| of every trained entry, L the token mean over batches.

  It is the change of the loss, to first order, if the entry were zero.
  """

  def mean_loss(trained):
    def one(batch):
      sums = loss(base, tree.merge(trained, start), batch, key)
      return sums.total, sums.count

    totals, counts = jax.lax.map(one, batches)
    return jnp.sum(totals) / jnp.maximum(jnp.sum(counts), 1.0)

  slope = jax.grad(mean_loss)(trained)
  return tree.map_present(lambda p, g: jnp.abs(p * g), trained, slope)


def weight_importance(loss: Loss) -> Callable[..., jax.Array]:
  """Returns a measure for `reported`: the importance of each low-rank weight.

      I_m = mean over ranks i of (mean |a dL/da|[:, i] + mean |b dL/db|[i, :])

  in the order of the nodes and, inside a node, of its layers: [M]. L is the
  token mean over all batches.

  >>> from fedjax_llm.types import LossSum
  >>> node = LowRank(jnp.full((1, 1), 3.0), jnp.full((1, 1), 2.0), None)
  >>> def loss(base, params, batch, key):
  ...   product = params['q'].a @ params['q'].b
  ...   return LossSum(jnp.sum(product), jnp.float32(1), jnp.float32(0))
  >>> measure = weight_importance(loss)
  >>> measure(None, {'q': node}, {'q': node}, jnp.zeros(1), None).tolist()
  [12.0]
  """

  def measure(base, params, held, batches, key) -> jax.Array:
    score = saliency(loss, base, params, held, batches, key)
    ranks = [jnp.mean(s.a, -2) + jnp.mean(s.b, -1) for s in _nodes(score)]
    return jnp.concatenate([jnp.mean(s, -1).reshape(-1) for s in ranks])

  return measure


def reported(inner: LocalUpdate, measure: Callable[..., Any]) -> LocalUpdate:
  """Returns `inner` with the result of a measure as the client's report.

  `measure(base, params, held, batches, key)` takes the parameters at the end of
  training, and `held`, those of them that the client holds. Its result becomes
  `ClientOutput.report`, for `server.planned`.

  >>> from fedjax_llm.types import Context, Masks
  >>> def run(base, start, state, batches, masks, context):
  ...   return ClientOutput({'w': jnp.float32(1)}, masks)
  >>> update = reported(
  ...   LocalUpdate(lambda trainable: (), run),
  ...   lambda base, params, held, batches, key: 10 * held['w'],
  ... )
  >>> masks = Masks({'w': True}, {'w': True})
  >>> out = update.run(None, {'w': jnp.float32(2)}, (), None, masks, Context())
  >>> float(out.report)
  30.0
  """

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    out = inner.run(base, start, state, batches, masks, context)
    end = tree.add(start, out.update)
    held = tree.like(end, masks.held)
    report = measure(base, end, held, batches, context.key)
    return out._replace(report=report)

  return LocalUpdate(inner.init, run)


def _nodes(params: Params) -> list[LowRank]:
  is_node = lambda x: isinstance(x, LowRank)
  return [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]
