"""Local training of the rank-one units that have mattered so far."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  Base,
  ClientOutput,
  Error,
  Key,
  LocalUpdate,
  Loss,
  LowRank,
  Masks,
  Params,
)


def saliency(
  loss: Loss, base: Base, start: Params, trained: Params, batches: Any, key: Key
) -> Params:
  """|p dL/dp| of every trained entry, L the token mean over all batches.

  How much the loss would change, to first order, without the entry.
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
  """What each low-rank weight is worth to a client, a number a rank.

      I_m = mean over ranks i of (mean |a dL/da|[:, i] + mean |b dL/db|[i, :])

  in the order of the nodes and, inside of one, of its layers: [M]. L is the
  token mean over all batches. A measure for `reported`.

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
  """`inner`, after which the client tells the server what it measured.

  `measure(base, params, held, batches, key)` sees the parameters that the
  client ends with, and of those the ones that it holds; its result becomes
  `ClientOutput.report`, for `server.planned`.

  >>> from fedjax_llm.types import Context
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


class Importance(NamedTuple):
  """What a client remembers of every entry that it can train."""

  sensitivity: Any
  uncertainty: Any
  inner: Any


def important(
  inner: LocalUpdate, loss: Loss, *, beta1: float = 0.85, beta2: float = 0.85
) -> LocalUpdate:
  """Trains the units of largest importance, as many as the scope lets train.

      I = |p dL/dp|,   J <- beta1 J + (1 - beta1) I,
      U <- beta2 U + (1 - beta2) |I - J|,   s = J U,
      score of unit i = mean s(a[:, i]) + mean s(b[i, :])

  AdaLoRA's smoothed sensitivity and uncertainty (Zhang et al. 2023, arXiv
  2303.10512, equations 8 to 11), which a client keeps over its rounds. Every
  target of every layer trains as many units as columns are in the mask that it
  is given, those of the largest scores. One gradient a round, of the token mean
  over all its batches at the parameters received, where AdaLoRA takes one a
  step; it costs a pass over the batches.

  Raises:
    Error: a beta not in [0, 1); from the round, no low-rank factors.

  >>> from fedjax_llm.types import Context, LossSum
  >>> loss = lambda base, p, x, key: LossSum(
  ...   x * (p['q'].a @ p['q'].b).sum(), *jnp.float32([1, 0]))
  >>> start = {'q': LowRank(jnp.array([[1.0, 9.0]]), jnp.ones((2, 1)), None)}
  >>> def still(base, start, state, batches, masks, context):
  ...   return ClientOutput(None, masks)
  >>> one = {'q': LowRank(*jnp.array([[[True, False]]] * 2), None)}
  >>> one['q'] = one['q']._replace(b=one['q'].b.T)  # one of two units may train
  >>> update = important(LocalUpdate(lambda p: (), still), loss)
  >>> out = update.run(None, start, update.init(start), jnp.ones(3),
  ...                  Masks(one, one), Context(key=jax.random.key(0)))
  >>> out.masks.trained['q'].a.tolist()  # the unit that the loss depends on
  [[False, True]]
  """
  for name, value in (('beta1', beta1), ('beta2', beta2)):
    if not 0 <= value < 1:
      raise Error(f'important: {name}={value} must be from 0 to below 1.')

  def init(trainable: Params) -> Importance:
    zeros = tree.zeros_like(trainable, jnp.float32)
    return Importance(zeros, zeros, inner.init(trainable))

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trained = tree.like(start, masks.trained)
    now = saliency(loss, base, start, trained, batches, context.key)
    mix = lambda beta: lambda old, new: beta * old + (1 - beta) * new
    smooth = tree.map_present(mix(beta1), state.sensitivity, now)
    apart = tree.map_present(lambda i, j: jnp.abs(i - j), now, smooth)
    unsure = tree.map_present(mix(beta2), state.uncertainty, apart)
    score = tree.map_present(jnp.multiply, smooth, unsure)
    chosen = _chosen(start, score, masks.trained)
    out = inner.run(
      base, start, state.inner, batches, Masks(masks.held, chosen), context
    )
    return out._replace(state=Importance(smooth, unsure, out.state))

  return LocalUpdate(init, run)


def _nodes(params: Params) -> list[LowRank]:
  is_node = lambda x: isinstance(x, LowRank)
  return [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]


def _chosen(start: Params, score: Any, trained: Any) -> Any:
  found = []

  def node(x, s, m):
    if not isinstance(x, LowRank) or m.a is None or m.b is None:
      return m
    found.append(x)
    units = jnp.mean(s.a, -2) + jnp.mean(s.b, -1)  # [..., R]
    columns = jnp.any(jnp.broadcast_to(m.a, x.a.shape), -2)
    size = jnp.sum(columns, -1, keepdims=True)
    place = jnp.argsort(jnp.argsort(-units, axis=-1), axis=-1)
    kept = place < size
    return m._replace(a=kept[..., None, :], b=kept[..., :, None])

  masks = jax.tree.map(
    node,
    start,
    score,
    trained,
    is_leaf=lambda x: x is None or isinstance(x, LowRank),
  )
  if not found:
    raise Error('important needs low-rank factors: adapter.name=lora.')
  return masks
