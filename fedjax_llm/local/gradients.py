"""Gradients of one step, an argument of `local.sgd` and similar updates.

A `Gradient` is `(loss, base, trained, start, batch, key) -> (grads, LossSum)`:
an estimate of the gradient of the token mean with respect to `trained`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Base, Key, Loss, LossSum, Params


def mean_loss(
  loss: Loss, base: Base, trained: Params, start: Params, batch: Any, key: Key
) -> tuple[jax.Array, LossSum]:
  """Returns the token mean of the loss, and its sums.

  `trained` holds the leaves that are trained, `start` all others.

  >>> loss = lambda base, p, batch, key: LossSum(p['w'], jnp.float32(2), 0.0)
  >>> start = {'w': jnp.float32(1)}
  >>> float(mean_loss(loss, None, {'w': jnp.float32(6)}, start, None, None)[0])
  3.0
  """
  sums = loss(base, tree.merge(trained, start), batch, key)
  return sums.total / jnp.maximum(sums.count, 1.0), sums


def backprop(
  loss: Loss, base: Base, trained: Params, start: Params, batch: Any, key: Key
) -> tuple[Params, LossSum]:
  """Returns the gradient by reverse-mode differentiation.

  >>> loss = lambda base, p, batch, key: LossSum(p['w'] ** 2, *jnp.ones(2))
  >>> start = {'w': jnp.float32(3)}
  >>> float(backprop(loss, None, start, start, None, None)[0]['w'])
  6.0
  """
  of = lambda trained: mean_loss(loss, base, trained, start, batch, key)
  return jax.grad(of, has_aux=True)(trained)


def within(loss: Loss, start: Params, mask: Any) -> Loss:
  """Returns the loss with the entries outside of the mask as in `start`.

  Its gradient is zero there, so that a direction through all entries of a leaf
  acts through the trained ones alone.

  >>> loss = lambda base, p, batch, key: LossSum(p['w'].sum(), *jnp.ones(2))
  >>> start, mask = {'w': jnp.ones(2)}, {'w': jnp.array([True, False])}
  >>> inside = within(loss, start, mask)
  >>> float(inside(None, {'w': jnp.full(2, 5.0)}, None, None).total)
  6.0
  """

  def inside(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
    kept = tree.map_present(
      lambda p, s, m: jnp.where(m, p, s), params, start, mask
    )
    return loss(base, tree.merge(kept, params), batch, key)

  return inside
