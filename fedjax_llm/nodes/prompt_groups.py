"""Groups of paired prompts of class names and images.

`PromptGroups` is the node.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.scores import Towers, compared


class Seen(NamedTuple):
  """What each of G groups makes of one batch of images and C classes.

  >>> Seen(jnp.ones((2, 5, 3)), None, None).logits.shape
  (2, 5, 3)
  """

  logits: Any  # [G, B, C]
  texts: Any  # [G, C, E], unit features of class names
  pooled: Any  # [G, B, E], features of images


class PromptGroups(NamedTuple):
  """G pairs of a context of class names and a prompt of images.

      logit_c = sum_g share_g scale cos(f(image, visual_g), t([rows_g, name_c]))

  Bo et al. 2025, arXiv 2511.00480 (FedMGP), with the shares 1 / G; G = 1 is a
  context with a visual prompt (shallow MaPLe without its coupling).

  >>> from fedjax_llm.nodes.scores import Pictures, unit
  >>> texts = lambda rows: unit(jnp.eye(2) + rows.sum())
  >>> images = lambda rows: Pictures(jnp.array([[0.0, 2.0]]) + rows.sum())
  >>> node = PromptGroups(
  ...   jnp.zeros((3, 1, 4)), jnp.zeros((3, 1, 5)), jnp.ones(3) / 3)
  >>> print(node.scores(Towers(texts, images, 10.0)).round(1))
  [[ 0. 10.]]
  """

  rows: Any  # [G, P, D]
  visual: Any  # [G, Q, V]
  share: Any  # [G], adds up to one

  PLACES = ('scores',)
  FROZEN = ('share',)

  def seen(self, towers: Towers) -> Seen:
    """Returns logits and features of each group."""
    texts = jax.vmap(towers.texts)(self.rows)
    pooled = jax.vmap(lambda rows: towers.images(rows).pooled)(self.visual)
    each = jax.vmap(lambda f, t: compared(towers, f, t))
    return Seen(each(pooled, texts), texts, pooled)

  def scores(self, towers: Towers) -> jax.Array:
    return jnp.einsum('g,gbc->bc', self.share, self.seen(towers).logits)
