"""Scopes for experts that a plan assigns to each client.

`assigned` returns a scope; `places` counts the weights with experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.nodes import Experts, LowRank
from fedjax_llm.scopes.labels import everything
from fedjax_llm.scopes.ranks import of_profile
from fedjax_llm.types import Error, Masks, Params, Private, Scope

__all__ = ['assigned', 'places']


def assigned() -> Scope:
  """Returns a scope: a client holds and trains the experts of its plan.

  The profile's entry 'experts' [M, E] marks them, a row for every weight with a
  pool, in the order of the nodes and, inside a node, of its layers. All clients
  hold the shared expert, the router and every leaf outside `Experts` nodes.
  `held` is private: the client's record of the experts that it had, which
  `local.routed` writes.

  Raises:
    Error: from `mask`, clients without experts in their profile.

  >>> from fedjax_llm.types import Context
  >>> two = lambda *lead: LowRank(
  ...   jnp.ones((*lead, 5, 4)), jnp.ones((*lead, 4, 3)), jnp.ones(lead))
  >>> node = Experts(two(2), two(2, 3), jnp.ones((2, 5, 4)), None)
  >>> profile = {'experts': jnp.array([[1, 1, 0], [0, 1, 1]], bool)}
  >>> masks = assigned().mask({'q': node}, None, Context(profile=profile))
  >>> masks.held['q'].pool.b[:, :, 0, 0].astype(int).tolist()
  [[1, 1, 0], [0, 1, 1]]
  """
  inner = everything()

  def labels(params: Params) -> Any:
    own = lambda x: x._replace(held=Private) if _is_node(x) else x
    return jax.tree.map(own, inner.labels(params), is_leaf=_is_node)

  def mask(start, state, context) -> Masks:
    experts = of_profile(context.profile, 'experts', 'experts of every weight')
    masks = inner.mask(start, state, context)

    def narrow(masks, record):
      at = 0

      def node(x, m):
        nonlocal at
        if not _is_node(x):
          return m
        *lead, _, _, _ = x.pool.a.shape
        num = int(np.prod(lead))
        mine = experts[at : at + num].reshape(*lead, -1, 1, 1)
        at += num
        pool = m.pool._replace(a=m.pool.a & mine, b=m.pool.b & mine)
        return m._replace(pool=pool, held=jnp.bool_(record))

      is_leaf = lambda x: x is None or _is_node(x)
      return jax.tree.map(node, start, masks, is_leaf=is_leaf)

    # The record `held` starts at zero in every round.
    return Masks(narrow(masks.held, False), narrow(masks.trained, True))

  return Scope(labels, mask)


def places(params: Params) -> tuple[int, int]:
  """Returns the number of weights with low-rank factors, M, and their rank.

  Raises:
    Error: there are no such weights, or their ranks differ.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> places({'k': node, 'q': node})
  (4, 4)
  """
  is_node = lambda x: isinstance(x, LowRank)
  nodes = [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]
  ranks = sorted({x.a.shape[-1] for x in nodes})
  if len(ranks) != 1:
    raise Error(
      'experts need low-rank factors of one rank, adapter.name=lora; these are '
      f'of {", ".join(map(str, ranks)) or "none"}.'
    )
  return sum(int(np.prod(x.a.shape[:-2])) for x in nodes), ranks[0]


def _is_node(x: Any) -> bool:
  return isinstance(x, Experts)
