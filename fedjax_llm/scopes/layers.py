"""Scopes of clients that hold some layers of the network."""

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.scopes.labels import everything
from fedjax_llm.scopes.ranks import of_profile
from fedjax_llm.types import (
  Error,
  Masks,
  Scope,
)


def layers(inner: Scope | None = None) -> Scope:
  """Returns a scope: a client holds and trains layers drawn in every round.

  The client's profile, `Cohort.profiles` or its entry 'layers', is the number
  of layers to draw from the L over which leaves under 'layers/' are stacked.
  `inner` decides on the rest. FedRA's allocation (arXiv 2311.11227).

  Raises:
    Error: from `mask`, clients without that number in their profile, or
      parameters without leaves that are stacked over layers.

  >>> from fedjax_llm.types import Context
  >>> params = {'layers': {'a': jnp.ones((3, 2))}, 'head': jnp.ones(2)}
  >>> mine = Context(key=jax.random.key(0), profile=jnp.int32(2))
  >>> held = layers().mask(params, None, mine).held
  >>> held['layers']['a'].shape, int(held['layers']['a'].sum())
  ((3, 1), 2)
  """
  inner = everything() if inner is None else inner

  def mask(start, state, context):
    size = of_profile(context.profile, 'layers', 'number of layers')
    masks = inner.mask(start, state, context)
    below = jax.tree.leaves(start.get('layers', ()))
    if not below:
      raise Error('this method needs leaves that are stacked over layers.')
    num = below[0].shape[0]
    order = jnp.argsort(jax.random.uniform(context.key, (num,)))
    keep = jnp.argsort(order) < size

    def narrow(masks):
      def leaf(x, m):
        return m & keep.reshape(-1, *[1] * (x.ndim - 1))

      some = tree.map_present(leaf, start['layers'], masks['layers'])
      return {**masks, 'layers': some}

    return Masks(*map(narrow, masks))

  return Scope(inner.labels, mask)
