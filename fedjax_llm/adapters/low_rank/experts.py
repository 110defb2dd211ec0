"""Pools of low-rank experts beside low-rank nodes: see `nodes.experts`."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.nodes import Experts, LowRank
from fedjax_llm.types import Error, Key, Params


def pooled(key: Key, params: Params, num_experts: int) -> Params:
  """Makes every low-rank node the shared expert beside a pool of new experts.

  All A_e and P are uniform in +-1/sqrt(D), all B_e zero: the outputs do not
  change. `held` is zero: no client holds an expert.

  Raises:
    Error: no low-rank node; a low-rank node outside the layers.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> wide = pooled(jax.random.key(0), {'layers': {'q': node}}, num_experts=6)
  >>> wide['layers']['q'].pool.a.shape, wide['layers']['q'].router.shape
  ((2, 6, 5, 4), (2, 5, 4))
  """
  inner = params.get('layers', {})
  is_node = lambda x: isinstance(x, LowRank)
  within, everywhere = (
    sum(map(is_node, jax.tree.leaves(x, is_leaf=is_node)))
    for x in (inner, params)
  )
  if not within or within < everywhere:
    raise Error(
      'experts stand beside low-rank factors in the layers, and only there: '
      'adapter.name=lora with targets in the layers.'
    )
  keys = jax.random.split(key, num_experts + 1)
  nodes = jax.tree.map(
    lambda x: x if is_node(x) else None, inner, is_leaf=is_node
  )
  drawn = jax.vmap(lambda one: multi.fresh(one, nodes))(keys)

  def node(x: Any, new: Any) -> Any:
    if not is_node(x):
      return x
    each = lambda z: jnp.moveaxis(z[:-1], 0, 1)
    pool = LowRank(each(new.a), each(new.b), each(new.scale))
    held = jnp.zeros(pool.scale.shape, jnp.uint8)
    return Experts(x, pool, new.a[-1], held)

  return {
    **params,
    'layers': jax.tree.map(node, inner, drawn, is_leaf=is_node),
  }


def no_statistics(params: Params) -> Params:
  """Returns zero statistics in the place of every node that has some.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> wide = pooled(jax.random.key(0), {'layers': {'q': node}}, num_experts=6)
  >>> no_statistics(wide)['layers']['q'].experts.shape
  (2, 6, 4)
  """
  is_node = lambda x: hasattr(x, 'no_statistics')
  return jax.tree.map(
    lambda x: x.no_statistics() if is_node(x) else None,
    params,
    is_leaf=is_node,
  )


def shared(params: Params) -> Params:
  """Returns the tree with the shared experts alone: a low-rank adapter.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> params = {'layers': {'q': node}}
  >>> wide = pooled(jax.random.key(0), params, num_experts=6)
  >>> shared(wide)['layers']['q'] is wide['layers']['q'].shared
  True
  """
  is_node = lambda x: isinstance(x, Experts)
  return jax.tree.map(
    lambda x: x.shared if is_node(x) else x, params, is_leaf=is_node
  )
