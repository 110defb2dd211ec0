"""Scopes for ranks that a plan gives to each weight of a client.

`allotted` returns a scope; `rank_sizes` counts the parameters of a rank.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.nodes import LowRank
from fedjax_llm.scopes.labels import everything
from fedjax_llm.scopes.ranks import both_trained, of_profile
from fedjax_llm.types import Error, Params, Scope

__all__ = ['allotted', 'rank_sizes']


def allotted(inner: Scope | None = None) -> Scope:
  """Returns a scope: a client holds all factors and trains its planned ranks.

  The profile's entry 'ranks' [M] is the number of ranks, the first ones, that a
  client trains of every weight with low-rank factors, in the order of the nodes
  and, inside a node, of its layers. `inner` decides on all other leaves.

  Raises:
    Error: from `labels`, a factor that `inner` freezes; from `mask`, clients
      without ranks in their profile.

  >>> from fedjax_llm.types import Context
  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> profile = {'ranks': jnp.array([1, 3])}
  >>> masks = allotted().mask({'q': node}, None, Context(profile=profile))
  >>> masks.trained['q'].a[:, 0].astype(int).tolist()
  [[1, 0, 0, 0], [1, 1, 1, 0]]
  """
  inner = everything() if inner is None else inner

  def mask(start, state, context):
    ranks = of_profile(context.profile, 'ranks', 'rank of every weight')
    masks = inner.mask(start, state, context)
    at = 0

    def node(x, m):
      nonlocal at
      if not isinstance(x, LowRank):
        return m
      *lead, _, size = x.a.shape
      num = int(np.prod(lead))
      mine = ranks[at : at + num].reshape(*lead, 1)
      at += num
      columns = jnp.arange(size) < mine  # [..., R]
      return m._replace(
        a=None if m.a is None else m.a & columns[..., None, :],
        b=None if m.b is None else m.b & columns[..., :, None],
      )

    is_leaf = lambda x: x is None or isinstance(x, LowRank)
    trained = jax.tree.map(node, start, masks.trained, is_leaf=is_leaf)
    return masks._replace(trained=trained)

  return Scope(both_trained(inner), mask)


def rank_sizes(params: Params) -> tuple[np.ndarray, np.ndarray]:
  """Returns each weight's parameters a rank, D + F, and its ranks R: [M] each.

  The weights are in the order of `allotted`.

  Raises:
    Error: there are no low-rank factors.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> [x.tolist() for x in rank_sizes({'q': node})]
  [[8, 8], [4, 4]]
  """
  is_node = lambda x: isinstance(x, LowRank)
  sizes, ranks = [], []
  for x in filter(is_node, jax.tree.leaves(params, is_leaf=is_node)):
    num = int(np.prod(x.a.shape[:-2]))
    sizes += [x.a.shape[-2] + x.b.shape[-1]] * num
    ranks += [x.a.shape[-1]] * num
  if not sizes:
    raise Error('ranks of weights need low-rank factors: adapter.name=lora.')
  return np.array(sizes), np.array(ranks)
