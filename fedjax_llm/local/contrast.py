"""Losses of dual encoders: zero-shot classification, and InfoNCE.

`zero_shot` returns a `Model` whose classes are texts, `contrastive` a `Loss`.
The dual encoder is an argument with the functions `text`, `image` and `scale`
of `models.dual.Dual`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.scores import unit
from fedjax_llm.types import (
  Base,
  Error,
  ImagesWithTexts,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
)


def zero_shot(dual: Any, tokens: Any, ends: Any) -> Model:
  """Returns a dual encoder as a classifier whose classes are texts.

      logits_c = exp(logit_scale) cos(image, text_c)

  Radford et al. 2021, arXiv 2103.00020, section 3.1.2. `classification` trains
  it as any classifier, with adapters of either tower.

  Args:
    dual: the towers.
    tokens: the texts of the classes, [C, T].
    ends: the places of their ends, [C].

  >>> from typing import NamedTuple
  >>> class Towers(NamedTuple):
  ...   text: Any = lambda base, params, tokens, ends: jnp.eye(2)
  ...   image: Any = lambda base, params, pixels: (pixels, None)
  ...   scale: Any = lambda base, params: jnp.float32(10)
  >>> model = zero_shot(Towers(), jnp.zeros((2, 3), int), jnp.zeros(2, int))
  >>> model.logits(None, {}, jnp.array([[0.0, 3.0]])).tolist()
  [[0.0, 10.0]]
  """

  def hidden(base: Base, params: Params, batch: Any) -> jax.Array:
    pixels = getattr(batch, 'pixels', None)
    if pixels is None:
      raise Error('zero-shot classification reads images, and this is a text.')
    return dual.image(base, params, pixels)[0]

  def logits(base: Base, params: Params, hidden: jax.Array) -> jax.Array:
    classes = unit(dual.text(base, params, tokens, ends=ends))  # [C, P]
    return dual.scale(base, params) * (unit(hidden) @ classes.T)

  return Model(hidden, logits)


def contrastive(dual: Any, *, per_row: bool = False) -> Loss:
  """Returns the symmetric InfoNCE loss of images with their texts, a row.

      s_ij = exp(logit_scale) cos(image_i, text_j)
      loss_i = -1/2 log softmax_j(s_ij)_i - 1/2 log softmax_j(s_ji)_i

  Radford et al. 2021, arXiv 2103.00020, figure 3. The other rows of a step are
  the negatives, equal texts among them, so the loss depends on the batch size;
  rows of padding are neither. An image is right where its own text is the
  nearest.

  Args:
    dual: the towers.
    per_row: one number a row, [B], instead of their sum.

  >>> from typing import NamedTuple
  >>> class Towers(NamedTuple):
  ...   text: Any = lambda base, params, tokens, ends: jnp.eye(2)
  ...   image: Any = lambda base, params, pixels: (pixels, None)
  ...   scale: Any = lambda base, params: jnp.float32(1)
  >>> from fedjax_llm.types import Batch
  >>> ones = jnp.ones((2, 1), jnp.int32)
  >>> batch = ImagesWithTexts(jnp.eye(2), Batch(ones, ones > 0, ones, ones))
  >>> sums = contrastive(Towers())(None, {}, batch, None)
  >>> round(float(sums.total), 4), float(sums.correct)  # 2 log(1 + 1 / e)
  (0.6265, 2.0)
  """

  def loss(
    base: Base, params: Params, batch: ImagesWithTexts, key: Key
  ) -> LossSum:
    del key  # no dropout
    length = (batch.text.segments > 0).sum(-1)  # [B]
    real = length > 0
    ends = jnp.maximum(length - 1, 0)
    texts = unit(dual.text(base, params, batch.text.tokens, ends=ends))
    images = unit(dual.image(base, params, batch.pixels)[0])
    images = jnp.where(real[:, None], images, 0)
    scores = dual.scale(base, params) * (images @ texts.T)  # [B, B]
    scores = jnp.where(real[:, None] & real[None], scores, -jnp.inf)
    # Rows of padding see themselves alone, so that no gradient is NaN.
    alone = jnp.eye(len(real), dtype=bool) & ~real[:, None]
    scores = jnp.where(alone, 0.0, scores)
    own = jnp.diagonal(scores)
    nats = jax.nn.logsumexp(scores, 1) + jax.nn.logsumexp(scores, 0) - 2 * own
    hit = jnp.sum(scores >= own[:, None], axis=1) == 1
    count = real.astype(jnp.float32)
    sums = LossSum(
      jnp.where(real, nats / 2, 0.0),
      count,
      jnp.where(real, hit, False).astype(jnp.float32),
    )
    return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))

  return loss
