"""Combinations of several adapters of one base into a single adapter."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Key, Params


def mix(adapters: Sequence[Params], weights: Sequence[Any]) -> Params:
  """Returns one adapter that changes the base by sum_i w_i change_i.

  Low-rank factors are concatenated, so the sum is exact and the rank of the
  result is the sum of the ranks:

      a = [a_1 ... a_n],   b = [w_1 b_1; ...; w_n s_n / s_1 b_n],   s = s_1

  A dense change beside factors becomes their residual; dense changes add up.
  The residuals of factors belong to the base, so they are added as they are.

  Args:
    adapters: trees of one structure with `LowRank` nodes or arrays.
    weights: one number for each adapter, traced or not.

  >>> node = lambda x: LowRank(jnp.full((1, 1), x), jnp.ones((1, 1)), 2.0)
  >>> both = mix([{'q': node(1.0)}, {'q': node(3.0)}], [0.25, 0.75])['q']
  >>> (both.scale * both.a @ both.b).tolist()  # 2 * (1 / 4 + 9 / 4)
  [[5.0]]
  """
  return jax.tree.map(
    lambda *nodes: _sum(nodes, weights), *adapters, is_leaf=_is_node
  )


def with_residuals(params: Params, other: Params) -> Params:
  """Returns `params` with the residuals of `other`, which belong to the base.

  >>> bare, full = LowRank(1.0, 2.0, 3.0), LowRank(4.0, 5.0, 6.0, 7.0)
  >>> with_residuals({'q': bare}, {'q': full})['q'].residual
  7.0
  """

  def node(x, y):
    if not _is_node(x):
      return x
    return x._replace(residual=y.residual if _is_node(y) else y)

  return jax.tree.map(node, params, other, is_leaf=_is_node)


def without_residuals(params: Params) -> Params:
  return jax.tree.map(
    lambda x: x._replace(residual=None) if _is_node(x) else x,
    params,
    is_leaf=_is_node,
  )


def dense_part(params: Params) -> Params:
  """Returns the residual of every node, or zeros, as a dense [..., D, F]."""

  def node(x):
    if not _is_node(x):
      return jnp.zeros_like(x)
    if x.residual is not None:
      return x.residual
    return jnp.zeros((*x.a.shape[:-1], x.b.shape[-1]), x.a.dtype)

  return jax.tree.map(node, params, is_leaf=_is_node)


def fresh(key: Key, params: Params) -> Params:
  """Draws new factors of the same shapes, as `lora` starts.

  a is uniform in +-1/sqrt(D), b is zero, and residuals are left out. Leaves
  that are no `LowRank` are unchanged.
  """

  def node(path, x):
    if not _is_node(x):
      return x
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    bound = x.a.shape[-2] ** -0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, zlib.crc32(name.encode())),
      x.a.shape,
      x.a.dtype,
      -bound,
      bound,
    )
    return LowRank(a, jnp.zeros_like(x.b), x.scale)

  return jax.tree_util.tree_map_with_path(node, params, is_leaf=_is_node)


def blend(adapters: Sequence[Params], weights: Sequence[Any]) -> Params:
  """Returns sum_i w_i params_i, leaf by leaf: it adds factors, not products.

  The scale and the residual are those of the last adapter.

  >>> node = lambda x: LowRank(x, x, 2.0)
  >>> blend([{'q': node(1.0)}, {'q': node(3.0)}], [0.5, 1.0])['q']
  LowRank(a=3.5, b=3.5, scale=2.0, residual=None)
  """

  def node(*xs):
    if not _is_node(xs[-1]):
      return sum(w * x for w, x in zip(weights, xs, strict=True))
    a = sum(w * x.a for w, x in zip(weights, xs, strict=True))
    b = sum(w * x.b for w, x in zip(weights, xs, strict=True))
    return xs[-1]._replace(a=a, b=b)

  return jax.tree.map(node, *adapters, is_leaf=_is_node)


def _is_node(x: Any) -> bool:
  return isinstance(x, LowRank)


def _sum(nodes: Sequence[Any], weights: Sequence[Any]) -> Any:
  low = [(x, w) for x, w in zip(nodes, weights, strict=True) if _is_node(x)]
  dense = [
    (x * w).astype(x.dtype) for x, w in zip(nodes, weights) if not _is_node(x)
  ]
  dense += [x.residual for x, _ in low if x.residual is not None]
  total = sum(dense[1:], dense[0]) if dense else None
  if not low:
    return total
  scale = low[0][0].scale

  def weighted(x, w):
    factor = jnp.asarray(w * x.scale / scale, x.b.dtype)
    return x.b * factor[..., None, None]

  return LowRank(
    a=jnp.concatenate([x.a for x, _ in low], axis=-1),
    b=jnp.concatenate([weighted(x, w) for x, w in low], axis=-2),
    scale=scale,
    residual=total,
  )
