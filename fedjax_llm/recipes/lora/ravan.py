"""RAVAN: several heads between frozen bases, each with its own gain.

Raje et al. 2025, arXiv 2506.05568.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import adapters, local, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  compose,
  on_cores,
  refuse,
)
from fedjax_llm.types import (
  ClientOutput,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
)

# What the config of each method changes.
NEEDS = {
  'ravan': dict(adapter=dict(name='ravan', heads=4, rank=8)),
}


def ravan(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """RAVAN: several heads between frozen bases, each with its own gain.

      client: trains C_h and g_h (from 1) of  W + s sum_h g_h p_h C_h q_h,
      server: C_h <- sum_k w_k g_h,k C_h,k

  Raje et al. 2025, arXiv 2506.05568, on the adapter `ravan`: clients send the
  products, so the mean is exact and the gains cost nothing. Every client trains
  all heads; the paper's choice of a few heads for weak clients is left out.

  >>> method = ravan(None, local.optimizer('adamw'))
  >>> method.init(None, {'w': jnp.ones(2)})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ravan trains matrices between frozen bases: ...
  """
  refuse('ravan', 'scope', parts)
  update = lifted(
    local.sgd(loss, optimizer),
    adapters.cores.with_gains,
    adapters.cores.without_gains,
  )
  return compose(update, scope=on_cores('ravan'), **parts)


def lifted(
  inner: LocalUpdate,
  lift: Callable[[Params], Params],
  settle: Callable[[Params], Params],
) -> LocalUpdate:
  """Returns `inner` on parameters with additional leaves during training.

  `lift(start)` fills leaves that are absent, `inner` trains them with the rest,
  and `settle(end)` writes their result into the other leaves and removes them:
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
