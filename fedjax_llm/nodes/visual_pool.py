"""Pools of visual prompts that each image weighs, with a classifier.

`VisualPool` and `GrowingPool` are the nodes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.scores import Towers, unit

_HIGHEST = jax.lax.Precision.HIGHEST


class VisualPool(NamedTuple):
  """N visual prompts, mixed by the likeness of an image to their keys.

      P(q) = sum_i cos(q, key_i) rows_i,   q = f(image) without a prompt,
      logits = f(image, P(q)) W + b

  Halbe et al. 2023, arXiv 2306.09970 (HePCo). q gets no gradient. f are the
  features of the image tower of a dual encoder; its text tower is not used.

  >>> from fedjax_llm.nodes.scores import Pictures
  >>> images = lambda rows: Pictures(jnp.ones((1, 2)) * (
  ...   1 if rows is None else rows.sum()))
  >>> node = VisualPool(jnp.ones((3, 1, 4)), jnp.ones((3, 2)),
  ...                   Affine(jnp.eye(2), jnp.zeros(2)))
  >>> node.scores(Towers(None, images, 1.0)).round().tolist()  # 3 prompts of 4
  [[12.0, 12.0]]
  """

  rows: Any  # [N, Q, V]
  keys: Any  # [N, E]
  head: Affine  # W [E, C], b [C]

  PLACES = ('scores',)

  def prompts(self, query: Any) -> jax.Array:
    """Returns the prompt of each query [B, E], [B, Q, V]."""
    near = jnp.matmul(unit(query), unit(self.keys).T, precision=_HIGHEST)
    return jnp.einsum('bn,nqv->bqv', near, self.rows, precision=_HIGHEST)

  def classified(self, features: Any) -> jax.Array:
    """Returns the logits of features [B, E], [B, C]."""
    kernel, bias = self.head
    x = features.astype(jnp.float32)
    return jnp.matmul(x, kernel, precision=_HIGHEST) + bias

  def scores(self, towers: Towers) -> jax.Array:
    query = jax.lax.stop_gradient(towers.images(None).pooled)
    rows = self.prompts(query)
    return self.classified(towers.images(rows).pooled)


class GrowingPool(NamedTuple):
  """N visual prompts, of which the first `active` count, with attention.

      P(q) = sum_{i < active} cos(q * softmax(attention_i), key_i) rows_i

  Smith et al. 2023, arXiv 2211.13218 (CODA-Prompt), as in the authors' program
  of Fed-CPrompt (Bagwe et al. 2023, arXiv 2307.04869): prompts of one task
  after another become active. The rest is that of `VisualPool`.

  >>> from fedjax_llm.nodes.scores import Pictures
  >>> images = lambda rows: Pictures(jnp.ones((1, 2)) * (
  ...   1 if rows is None else rows.sum()))
  >>> one = jnp.ones((3, 2))
  >>> node = GrowingPool(jnp.ones((3, 1, 4)), one, one,
  ...                    Affine(jnp.eye(2), jnp.zeros(2)), jnp.int32(2))
  >>> node.scores(Towers(None, images, 1.0)).round().tolist()  # 2 prompts of 4
  [[8.0, 8.0]]
  """

  rows: Any  # [N, Q, V]
  keys: Any  # [N, E]
  attention: Any  # [N, E]
  head: Affine  # W [E, C], b [C]
  active: Any  # [] int32

  PLACES = ('scores',)
  FROZEN = ('active',)

  def prompts(self, query: Any) -> jax.Array:
    """Returns the prompt of each query [B, E], [B, Q, V]."""
    looked = jnp.asarray(query, jnp.float32)[:, None] * jax.nn.softmax(
      self.attention
    )  # [B, N, E]
    near = jnp.sum(unit(looked) * unit(self.keys), -1)
    near = jnp.where(jnp.arange(len(self.keys)) < self.active, near, 0.0)
    return jnp.einsum('bn,nqv->bqv', near, self.rows, precision=_HIGHEST)

  def features(self, towers: Towers) -> jax.Array:
    """Returns the features of images with their prompts, [B, E]."""
    query = jax.lax.stop_gradient(towers.images(None).pooled)
    return towers.images(self.prompts(query)).pooled

  def classified(self, features: Any) -> jax.Array:
    """Returns the logits of features [B, E], [B, C]."""
    return VisualPool(None, None, self.head).classified(features)

  def scores(self, towers: Towers) -> jax.Array:
    return self.classified(self.features(towers))
