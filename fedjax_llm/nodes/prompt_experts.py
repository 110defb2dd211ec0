"""A mixture of contexts of class names: an own one, and frozen ones of others.

`PromptExperts` is the node, `attended` its gate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.scores import Towers, compared, unit

_HIGHEST = jax.lax.Precision.HIGHEST


class Heads(NamedTuple):
  """Four affine layers of an attention with H heads of size d / H.

  >>> one = jnp.ones((4, 2, 2))
  >>> Heads(*[one, one[0]] * 3, jnp.ones((2, 2, 4)), jnp.ones(4)).out.shape
  (2, 2, 4)
  """

  query: Any  # [d, H, d / H]
  query_bias: Any  # [H, d / H]
  key: Any
  key_bias: Any
  value: Any
  value_bias: Any
  out: Any  # [H, d / H, d]
  out_bias: Any  # [d]


class PromptExperts(NamedTuple):
  """An own context, and attention of each image to it and those of others.

      q = pool(f),   k_x = v_x = pool(t([P_x, name_c])),   x = own, others,
      g_c = attention(q, k, v) with scores 10 q' W_q W_k' k,
      logit_c = share * scale cos(f, t_own,c) + scale pool(f)' g_c

  Luo et al. 2025, arXiv 2410.10114 (pFedMoAP). pool takes every (E / d)-th
  feature of a unit vector. The features of other contexts get no gradient.
  Without another context the logits are scale cos(f, t_own,c).

  >>> zero = jnp.zeros((2, 3, 4))
  >>> node = PromptExperts(zero[0], zero, jnp.zeros(2), None)
  >>> node.present.shape
  (2,)
  """

  rows: Any  # [P, D], the own context
  others: Any  # [X, P, D]
  present: Any  # [X], 0 for a place without a context
  heads: Heads
  share: Any = 0.5  # []

  PLACES = ('scores',)
  FROZEN = ('others', 'present', 'share')

  def scores(self, towers: Towers) -> jax.Array:
    own = towers.texts(self.rows)  # [C, E]
    pooled = towers.images(None).pooled
    alone = compared(towers, pooled, own)
    if not len(self.others):
      return alone
    theirs = jax.lax.stop_gradient(jax.vmap(towers.texts)(self.others))
    size = self.heads.out.shape[-1]
    pool = lambda x: x[..., :: x.shape[-1] // size]
    q = pool(unit(pooled))  # [B, d]
    experts = pool(jnp.concatenate([own[None], theirs]))  # [1 + X, C, d]
    seen = jnp.concatenate([jnp.ones(1), self.present]) > 0
    gated = attended(self.heads, q, experts, seen)  # [B, C, d]
    near = jnp.einsum('bd,bcd->bc', q, gated, precision=_HIGHEST)
    mixed = self.share * alone + towers.scale * near
    return jnp.where(jnp.any(self.present > 0), mixed, alone)


def attended(heads: Heads, q: Any, experts: Any, seen: Any) -> jax.Array:
  """Returns an attention of images to experts, class by class, [B, C, d].

  Scores are 10 times the products of queries and keys.

  Args:
    heads: the four layers.
    q: queries [B, d].
    experts: keys and values [X, C, d].
    seen: [X] bool.

  >>> one = jnp.ones((2, 1, 2))
  >>> heads = Heads(*[one, one[0]] * 3, jnp.ones((1, 2, 2)), jnp.zeros(2))
  >>> attended(heads, jnp.ones((5, 2)), jnp.ones((3, 4, 2)),
  ...          jnp.ones(3, bool)).shape
  (5, 4, 2)
  """
  project = lambda x, w, b: (
    jnp.einsum('...d,dhk->...hk', x, w, precision=_HIGHEST) + b
  )
  queries = project(q, heads.query, heads.query_bias)  # [B, H, k]
  keys = project(experts, heads.key, heads.key_bias)  # [X, C, H, k]
  values = project(experts, heads.value, heads.value_bias)
  near = 10 * jnp.einsum('bhk,xchk->bchx', queries, keys, precision=_HIGHEST)
  share = jax.nn.softmax(jnp.where(seen, near, -1e9), axis=-1)
  mixed = jnp.einsum('bchx,xchk->bchk', share, values, precision=_HIGHEST)
  out = jnp.einsum('bchk,hkd->bcd', mixed, heads.out, precision=_HIGHEST)
  return out + heads.out_bias
