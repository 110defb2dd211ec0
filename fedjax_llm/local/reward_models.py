"""Reward models: scores of whole texts, learned from pairs of replies.

A causal network with a head `score` gives a text one number r(x, y), which
`reward_of` computes. `bradley_terry` is the loss that makes the preferred reply
of a pair score higher.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.local.losses import class_logits
from fedjax_llm.types import (
  Base,
  Batch,
  Error,
  Key,
  Loss,
  LossSum,
  Model,
  Pairs,
  Params,
  known,
)


def reward_of(model: Model) -> Callable[[Base, Params, Batch], jax.Array]:
  """Returns a function of the rewards of texts, [B] float32.

  It is `(base, params, batch) -> rewards` on batches of one text a row, the
  first logit of the head at the state that it reads (`Model.read`).

  >>> states = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])  # [B, T, D]
  >>> model = Model(
  ...   hidden=lambda base, params, batch: states,
  ...   logits=lambda base, params, hidden: hidden @ base,
  ...   read=lambda hidden, batch: hidden[:, -1])
  >>> text = Batch(jnp.array([[7, 0]]), None, jnp.array([[1, 0]]), None)
  >>> reward_of(model)(jnp.array([[1.0], [10.0]]), {}, text).tolist()
  [43.0]
  """
  logits = class_logits(model)
  return lambda base, params, batch: logits(base, params, batch)[:, 0]


def bradley_terry(
  model: Model,
  *,
  centre: float = 0.0,
  per_row: bool = False,
) -> Loss:
  """Returns the loss of a reward model on pairs of replies, a term a pair.

      -log sigmoid(r_c - r_r) + centre (r_c + r_r)^2,   r = r(x, y)

  with r_c of the preferred reply and r_r of the other one: Bradley and Terry
  1952, in the form of Ouyang et al. 2022, arXiv 2203.02155, equation 1 with
  two replies a prompt. The second term keeps rewards near zero, which the first
  does not determine (Eisenstein et al. 2023, arXiv 2312.09244).

  The count is that of the pairs; `correct` counts those with r_c > r_r.

  Args:
    model: a causal network with one score a text.
    centre: the weight of the second term.
    per_row: one number a pair, [B], instead of their sum.

  Raises:
    Error: `centre` is negative; from the loss, a batch that is not of pairs.

  >>> model = Model(
  ...   hidden=lambda base, params, batch: batch.tokens[..., None] * 1.0,
  ...   logits=lambda base, params, hidden: hidden)
  >>> text = lambda token: Batch(
  ...   jnp.array([[token]]), None, jnp.ones((1, 1), int), None)
  >>> zero = jnp.zeros(1)
  >>> loss = bradley_terry(model)
  >>> sums = loss(None, {}, Pairs(text(3), text(3), zero, zero), None)
  >>> round(float(sums.total), 4), float(sums.correct)  # log 2
  (0.6931, 0.0)
  """
  if known(centre) and not centre >= 0:
    raise Error(f'bradley_terry: centre is {centre}; it must be 0 or more.')
  reward = reward_of(model)

  def loss(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
    del key  # no dropout
    if not isinstance(batch, Pairs):
      raise Error(
        f'a reward model learns from Pairs, not {type(batch).__name__}: the '
        'examples of its task must be types.Pair.'
      )
    real = jnp.any(jnp.asarray(batch.chosen.segments) > 0, -1)
    # Padding has the reward 0: a product of NaN would leak into the gradient.
    chosen, rejected = (
      jnp.where(real, reward(base, params, text), 0.0)
      for text in (batch.chosen, batch.rejected)
    )
    terms = jax.nn.softplus(rejected - chosen)
    terms += centre * (chosen + rejected) ** 2
    terms = jnp.where(real, terms, 0.0)
    sums = LossSum(
      terms, real.astype(jnp.float32), (real & (chosen > rejected)) * 1.0
    )
    return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))

  return loss
