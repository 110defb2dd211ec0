"""Losses and networks that compute nothing: a round without its model.

`light` returns the loss, `no_network` the network.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import adapters, local
from fedjax_llm.nodes import (
  Domains,
  GrowingPool,
  Pictures,
  Reweighted,
  Towers,
  VisualPool,
)
from fedjax_llm.types import (
  LossSum,
  Model,
)


def _nothing(base: Any, params: Any, batch: Any, key: Any) -> LossSum:
  del base, batch, key
  total = jnp.float32(0)
  for x in jax.tree.leaves(floats(params)):
    total += 0.0 * jnp.sum(x)
  return LossSum(total, jnp.float32(1), jnp.float32(0))


_no_loss = local.Observed(
  _nothing,
  lambda base, params, batch, key: (
    _nothing(base, params, batch, key),
    adapters.experts.no_statistics(params),
  ),
  lambda model: _nothing,
)


def light(loss: Any) -> Any:
  """Returns a loss of the same kind that needs no network."""
  if isinstance(loss, local.ByNames):
    return local.ByNames(_nothing, _no_towers)
  if not isinstance(loss, local.Sampled):
    return _no_loss

  def sample(base, params, tokens, lengths, key, greedy=False):
    del base, params, lengths, key, greedy
    return jnp.zeros((tokens.shape[0], 1), jnp.int32)  # the token 0, no end

  return dataclasses.replace(loss, model=no_network(1), sample=sample)


def _no_towers(base: Any, params: Any, batch: Any) -> Towers:
  """Returns features of zeros, of the sizes that the trained node has."""
  del base
  node = params.get('scores')  # some methods keep it apart
  size = 1
  if isinstance(node, Reweighted):
    size = node.first.kernel.shape[0]
  if isinstance(node, Domains):
    size = node.query.shape[0]
  if isinstance(node, GrowingPool | VisualPool):
    size = node.keys.shape[-1]
  one = lambda *lead: jnp.zeros((*lead, size))
  return Towers(
    lambda rows: one(1), lambda rows: Pictures(one(len(batch.label))), 1.0
  )


def no_network(num_labels: int) -> Model:
  """Returns a network that computes zeros, for methods that ask one."""
  zeros = lambda x, size: jnp.zeros((*jnp.shape(x)[:-1], size))

  def places(batch):  # one state a token, or one a picture
    text = getattr(batch, 'tokens', None)
    return (batch.label if text is None else text)[..., None]

  return Model(
    hidden=lambda base, params, batch: zeros(places(batch), 1),
    logits=lambda base, params, hidden: zeros(hidden, max(num_labels, 1)),
    layers=lambda base, params, batch, numbers, hidden=None, *, ends=True: (
      zeros(places(batch), 1)
    ),
  )


def floats(params: Any) -> Any:
  return jax.tree.map(
    lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, params
  )
