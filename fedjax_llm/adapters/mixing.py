"""One adapter that changes outputs as a weighted sum of several adapters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.nodes import Bottleneck, LowRank
from fedjax_llm.types import Params


def mix(adapters: Sequence[Params], weights: Sequence[Any]) -> Params:
  """Returns one adapter whose nodes change outputs by sum_i w_i change_i.

  Low-rank factors are concatenated, as in `adapters.low_rank.multi.mix`, and so
  are bottlenecks, whose changes of the same input then add up. Of other leaves,
  such as prompt rows, it is the weighted sum.

  >>> one = jnp.ones((1, 1))
  >>> nodes = [Bottleneck(one, x * one) for x in (2.0, 4.0)]
  >>> both = mix([{'output': x} for x in nodes], [0.5, 0.5])['output']
  >>> y = jnp.array([[3.0]])
  >>> want = 0.5 * nodes[0].act(None, y) + 0.5 * nodes[1].act(None, y)
  >>> jnp.allclose(both.act(None, y), want).tolist()
  True
  """
  kinds = LowRank, Bottleneck

  def node(*xs):
    if isinstance(xs[0], Bottleneck):
      return _side_by_side(xs, weights)
    return multi.mix(xs, weights)

  return jax.tree.map(node, *adapters, is_leaf=lambda x: isinstance(x, kinds))


def _side_by_side(xs: Sequence[Bottleneck], weights) -> Bottleneck:
  """Returns a bottleneck of the sum of the widths."""
  first = xs[0]
  down = jnp.concatenate([x.down for x in xs], -1)
  factors = [w if x.scale is None else w * x.scale for x, w in zip(xs, weights)]
  # A factor is a number or one a layer, [L].
  by = lambda w, x, axes: x * jnp.reshape(w, jnp.shape(w) + (1,) * axes)
  up = jnp.concatenate([by(w, x.up, 2) for x, w in zip(xs, factors)], -2)
  inner = outer = None
  if first.down_bias is not None:
    inner = jnp.concatenate([x.down_bias for x in xs], -1)
  if first.up_bias is not None:
    outer = sum(by(w, x.up_bias, 1) for x, w in zip(xs, factors))
  return first._replace(
    down=down, up=up, down_bias=inner, up_bias=outer, scale=None
  )
