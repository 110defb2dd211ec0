"""Uploads made from chosen parameters, to try a rule without training.

`received` returns an `Uploads`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Masks, Params, Uploads


def received(
  params: Params,
  ends: Sequence[Params],
  weight: Sequence[float] | None = None,
  ranks: Sequence[int] | None = None,
) -> Uploads:
  """Returns the uploads of K clients that train from `params` to `ends`.

  All clients train everything but the scales of low-rank nodes, and report. A
  rule can then be tried without a model or a text:
  `rule.aggregate(received(...), rule.init(params, key), params, key)`.

  Args:
    params: the parameters that the server sent.
    ends: the parameters of each client after training.
    weight: of the clients, [K]; the same for all if None.
    ranks: the number of columns of low-rank factors that each client holds;
      the rest is zero for it; all if None.

  >>> ends = [{'w': jnp.float32(3)}, {'w': jnp.float32(6)}]
  >>> received({'w': jnp.float32(1)}, ends).update['w'].tolist()
  [2.0, 5.0]
  """
  num = len(ends)
  is_node = lambda x: isinstance(x, LowRank)
  whole = jnp.ones((num, 1), bool)

  def held(x: Any) -> Any:
    if not is_node(x):
      return whole[:, 0]
    width = x.a.shape[-1]
    limits = [width] * num if ranks is None else ranks
    some = jnp.arange(width) < jnp.asarray(limits)[:, None]  # [K, R]
    return LowRank(some, some[..., None], None)

  def moved(end: Any, start: Any) -> Any:
    change = jax.tree.map(jnp.subtract, end, start)
    if is_node(change):
      return change._replace(scale=None, residual=None)
    return change

  mask = jax.tree.map(held, params, is_leaf=is_node)
  begun = tree.broadcast(params, num)
  cut = lambda stack: tree.apply_mask(
    stack, tree.map_present(tree.rows, mask, tree.like(stack, mask))
  )
  begun, ended = cut(begun), cut(tree.stack(list(ends)))
  return Uploads(
    update=jax.tree.map(moved, ended, begun, is_leaf=is_node),
    start=begun,
    masks=Masks(mask, mask),
    weight=jnp.ones(num) if weight is None else jnp.asarray(weight),
    valid=whole[:, 0],
  )
