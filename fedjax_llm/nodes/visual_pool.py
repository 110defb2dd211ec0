"""A pool of visual prompts that each image weighs, with a classifier.

`VisualPool` is the node.
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
