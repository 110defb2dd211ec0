"""Local training in other parameters than those that travel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import ClientOutput, LocalUpdate, Masks, Params


def lifted(
  inner: LocalUpdate,
  lift: Callable[[Params], Params],
  settle: Callable[[Params], Params],
) -> LocalUpdate:
  """`inner` on parameters with more leaves, which are gone when it is done.

  `lift(start)` fills leaves that are absent, `inner` trains them with the rest,
  and `settle(end)` puts what they learned into the leaves that were there:
  `settle(lift(p)) == p`. The update, the masks and the bytes are those of the
  parameters that travel.

  >>> from fedjax_llm.types import Context
  >>> p = {'core': jnp.float32(3), 'gain': None}
  >>> lift = lambda p: {**p, 'gain': jnp.float32(1)}
  >>> settle = lambda p: {'core': p['core'] * p['gain'], 'gain': None}
  >>> trained = {'core': jnp.float32(1), 'gain': jnp.float32(1)}
  >>> inner = LocalUpdate(lambda p: (), lambda base, start, *rest: ClientOutput(
  ...   trained, None))
  >>> one = {'core': jnp.bool_(True), 'gain': None}
  >>> out = lifted(inner, lift, settle).run(
  ...   None, p, (), None, Masks(one, one), Context())
  >>> float(out.update['core'])  # (3 + 1) * (1 + 1) - 3
  5.0
  """

  def widened(masks, start, wide):
    new = lambda x, old, m: jnp.bool_(True) if old is None is not x else m
    part = lambda m: jax.tree.map(
      new, wide, start, m, is_leaf=lambda x: x is None
    )
    return Masks(part(masks.held), part(masks.trained))

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    wide = lift(start)
    out = inner.run(
      base, wide, state, batches, widened(masks, start, wide), context
    )
    end = settle(tree.add(wide, out.update))
    update = tree.like(tree.sub(end, start), masks.trained)
    return out._replace(update=update, masks=masks)

  return LocalUpdate(lambda trainable: inner.init(lift(trainable)), run)
