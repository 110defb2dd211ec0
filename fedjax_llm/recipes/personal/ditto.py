"""Ditto: federated averaging, and a personal model pulled towards its result.

Li et al. 2021, arXiv 2012.04221.
"""

from typing import Any

from fedjax_llm import local, tree
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.local.sgd import descend
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import dual
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
)

# What the config of each method changes.
NEEDS = {
  'ditto': {},
}


def ditto(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float = 0.1,
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Ditto: federated averaging, and a personal model pulled towards its result.

      w <- sum_k w_k (local steps on F_k from w),
      v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w))

  with w as received (Li et al. 2021, arXiv 2012.04221, algorithm 1). The
  distance is that of the factors. lambda = 0 is local training; the larger it
  is, the closer v_k follows w, as long as eta lambda < 1.

  Args:
    strength: lambda, which the paper tunes.
    private_steps: see `recipes.dual`.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> method = ditto(None, local.optimizer('adamw'), strength=0.1)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(2)}).params
  >>> method.init_client(start).private
  Dual(shared={'w': None}, personal={'w': Array([1., 1.], dtype=float32)})
  """
  own = tethered(loss, optimizer, strength=strength)
  common = local.sgd(local.viewed(loss, dual.shared), optimizer)
  update = local.phases(
    Phase(local.counted(own), dual.OWN),
    Phase(common, dual.COMMON),
    steps=dual.first_steps(private_steps),
  )
  return dual.compose(
    update, dual.own_or_shared, parts, lambda key, p: Dual(p, p)
  )


def tethered(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float,
  keep_optimizer: bool = False,
) -> LocalUpdate:
  """Returns steps v <- v - eta (g(v) + strength (v - w)) on the personal part.

  w is the shared part of the `Dual` parameters as the client received it, and
  does not move: Ditto's personal solver (Li et al. 2021, arXiv 2012.04221,
  algorithm 1, line 7). The pull is added after clipping, which bounds the
  gradient of the loss. `keep_optimizer` as in `sgd`.

  Raises:
    Error: a negative strength.

  >>> from jax import numpy as jnp
  >>> import jax
  >>> from fedjax_llm.local import optimizer
  >>> from fedjax_llm.types import Context, LossSum, Masks
  >>> flat = lambda base, p, x, key: LossSum(0 * p * x, *jnp.float32([1, 0]))
  >>> update = tethered(flat, optimizer('sgd', 0.5), strength=1.0)
  >>> start = Dual(shared=jnp.float32(0), personal=jnp.float32(8))
  >>> mine = Dual(None, jnp.bool_(True))
  >>> out = update.run(None, start, (), jnp.ones(2), Masks(mine, mine),
  ...                  Context(key=jax.random.key(0)))
  >>> float(start.personal + out.update.personal)  # half of the way, twice
  2.0
  """
  if strength < 0:
    raise Error(f'tethered: strength={strength} must not be negative.')
  own = local.viewed(loss, lambda params: params.personal)

  def init(trainable: Dual) -> Any:
    return optimizer.init(trainable) if keep_optimizer else ()

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trained = tree.like(start, masks.trained)

    def adjust(grads, now):
      pulled = tree.map_present(
        lambda g, v, w: g + strength * (v - w),
        grads.personal,
        now.personal,
        start.shared,
      )
      return grads._replace(personal=pulled)

    moments = state if keep_optimizer else optimizer.init(trained)
    out = descend(
      own, optimizer, base, start, moments, batches, masks, context, adjust
    )
    return ClientOutput(
      update=tree.sub(out.end, trained),
      masks=masks,
      state=out.optimizer if keep_optimizer else (),
      work=out.work,
      metrics=out.metrics,
    )

  return LocalUpdate(init, run)
