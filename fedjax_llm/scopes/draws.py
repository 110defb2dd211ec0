"""Scopes of clients that draw ranks of low-rank factors at random.

`drawn` returns a `Scope`.
"""

import jax
import jax.numpy as jnp

from fedjax_llm.scopes.labels import everything
from fedjax_llm.scopes.ranks import both_trained, hold_columns, rank_of
from fedjax_llm.types import Masks, Scope


def drawn(*, hold: bool = True, inner: Scope | None = None) -> Scope:
  """Returns a scope: a client trains as many ranks as its profile, drawn anew.

  The set is uniform among those of the size r of the client's profile, drawn
  for each client and round from the scope's key, so the server knows it; it is
  the same for all weights and layers, columns of a and rows of b alike.

  Args:
    hold: the client holds the other ranks too, untrained; otherwise they are
      zero for it and do not travel.
    inner: decides on all other leaves; all shared if None.

  Raises:
    Error: as in `ranks`.

  >>> from fedjax_llm.nodes import LowRank
  >>> from fedjax_llm.types import Context
  >>> node = LowRank(jnp.ones((5, 4)), jnp.ones((4, 3)), jnp.ones(()))
  >>> context = Context(profile=jnp.int32(2), key=jax.random.key(1))
  >>> masks = drawn().mask({'q': node}, None, context)
  >>> masks.trained['q'].a.sum().item(), masks.held['q'].a.item()
  (2, True)
  """
  inner = everything() if inner is None else inner

  def mask(start, state, context) -> Masks:
    rank = rank_of(context.profile)
    masks = inner.mask(start, state, context)

    def keep(node):
      draw = jax.random.uniform(context.key, node.a.shape[-1:])
      return jnp.argsort(jnp.argsort(draw)) < rank

    some = hold_columns(masks, start, keep)
    return some._replace(held=masks.held) if hold else some

  return Scope(both_trained(inner), mask)
