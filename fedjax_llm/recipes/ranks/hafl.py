"""HAFL with freezing: clients hold all units and train the most important.

Su et al. 2024, arXiv 2411.06581.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.importance import saliency
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import (
  RANKS,
  compose,
  refuse,
)
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  'hafl': RANKS,
}


def hafl(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  beta1: float = 0.85,
  beta2: float = 0.85,
  **parts: Any,
) -> FederatedAlgorithm:
  """HAFL with freezing: clients hold all units and train the most important.

      client:  the r_k units of each target with the largest importance,
      server:  a[:, i] <- mean of a_k[:, i] over the clients that trained i

  and the rows of b likewise, with the weights of the round (Su et al. 2024,
  arXiv 2411.06581). The importance is AdaLoRA's, `important`; r_k is the
  client's profile. The marks of the units that it trained are sent as well, a
  bit a unit. The variant that truncates instead, and the quantisation of HAFLQ,
  are left out.

  >>> from fedjax_llm.nodes import LowRank
  >>> method = hafl(None, local.optimizer('adamw'))
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init_client(params).local.sensitivity.a.shape  # of every entry
  (4, 2)
  """
  refuse('hafl', 'aggregator', parts)
  update = important(
    local.sgd(loss, optimizer),
    loss,
    beta1=beta1,
    beta2=beta2,
  )
  mine = {'scope': _trained_ranks(), 'upload': uploads.identity(bitmap=True)}
  return compose(
    update, aggregator=aggregators.masked_mean('mask'), **{**mine, **parts}
  )


def _trained_ranks() -> Scope:
  """Returns a scope: a client trains its profile's ranks and holds them all."""
  inner = scopes.everything()
  narrow = scopes.ranks(inner)

  def mask(start, state, context):
    some = narrow.mask(start, state, context)
    return inner.mask(start, state, context)._replace(trained=some.trained)

  return inner._replace(mask=mask)


class Importance(NamedTuple):
  """A client's smoothed importance of every entry that it can train."""

  sensitivity: Any
  uncertainty: Any
  inner: Any


def important(
  inner: LocalUpdate, loss: Loss, *, beta1: float = 0.85, beta2: float = 0.85
) -> LocalUpdate:
  """Returns `inner` on the most important units, as many as the scope allows.

      I = |p dL/dp|,   J <- beta1 J + (1 - beta1) I,
      U <- beta2 U + (1 - beta2) |I - J|,   s = J U,
      score of unit i = mean s(a[:, i]) + mean s(b[i, :])

  AdaLoRA's smoothed sensitivity and uncertainty (Zhang et al. 2023, arXiv
  2303.10512, equations 8 to 11), which a client keeps over its rounds. Every
  target of every layer trains as many units as its mask has columns, those of
  the largest scores. There is one gradient a round, of the token mean over all
  batches at the parameters received, where AdaLoRA takes one a step; it costs a
  pass over the batches.

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
  nodes = []

  def node(x, s, m):
    if not isinstance(x, LowRank) or m.a is None or m.b is None:
      return m
    nodes.append(x)
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
  if not nodes:
    raise Error('important needs low-rank factors: adapter.name=lora.')
  return masks
