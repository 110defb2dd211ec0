"""Local training of a shared and a personal set of parameters."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.local.phases import Counted
from fedjax_llm.local.sgd import descend
from fedjax_llm.types import (
  ClientOutput,
  Dual,
  Error,
  LocalUpdate,
  Loss,
  Params,
)


def viewed(loss: Loss, view: Callable[[Params], Params]) -> Loss:
  """The loss of what a view makes of the parameters.

  >>> double = viewed(lambda base, params, batch, key: params, lambda p: 2 * p)
  >>> double(None, 3, None, None)
  6
  """
  return lambda base, params, batch, key: loss(base, view(params), batch, key)


def tethered(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float,
  keep_optimizer: bool = False,
) -> LocalUpdate:
  """Steps of v <- v - eta (g(v) + strength (v - w)) on the personal part v.

  w is the shared part of the `Dual` parameters as the client received it, and
  does not move: Ditto's personal solver (Li et al. 2021, arXiv 2012.04221,
  algorithm 1, line 7). The pull comes after clipping, which bounds what the
  data say. `keep_optimizer` as in `sgd`.

  Raises:
    Error: a negative strength.

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
  own = viewed(loss, lambda params: params.personal)

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


def forked(inner: LocalUpdate) -> LocalUpdate:
  """A client's first time, its personal part starts as a copy of the shared.

  Later it goes on from its own. The state counts the client's rounds.

  >>> from fedjax_llm.types import Context
  >>> still = LocalUpdate(lambda p: (), lambda base, start, *rest: ClientOutput(
  ...   Dual(jnp.float32(0), jnp.float32(0)), None))
  >>> start = Dual(shared=jnp.float32(5), personal=jnp.float32(1))
  >>> update = forked(still)
  >>> out = update.run(None, start, update.init(start), None, None, Context())
  >>> float(start.personal + out.update.personal), int(out.state.rounds)
  (5.0, 1)
  """

  def init(trainable):
    return Counted(jnp.int32(0), inner.init(trainable))

  def run(base, start, state, batches, masks, context):
    own = tree.merge(
      tree.map_present(
        lambda w, v: jnp.where(state.rounds == 0, w, v),
        start.shared,
        start.personal,
      ),
      start.personal,
    )
    out = inner.run(
      base,
      start._replace(personal=own),
      state.inner,
      batches,
      masks,
      context,
    )
    moved = tree.map_present(
      lambda u, v, old: v + u - old, out.update.personal, own, start.personal
    )
    return out._replace(
      update=out.update._replace(personal=moved),
      state=Counted(state.rounds + 1, out.state),
    )

  return LocalUpdate(init, run)


def synced(inner: LocalUpdate, *, every: int) -> LocalUpdate:
  """What the shared part became is copied to the personal one now and then.

  In rounds 0, `every`, 2 `every`, ... and in a client's first. The state counts
  the client's rounds.

  Raises:
    Error: `every` below one.

  >>> from fedjax_llm.types import Context
  >>> still = LocalUpdate(lambda p: (), lambda base, start, *rest: ClientOutput(
  ...   Dual(jnp.float32(2), jnp.float32(0)), None))
  >>> start = Dual(shared=jnp.float32(5), personal=jnp.float32(1))
  >>> update = synced(still, every=10)
  >>> out = update.run(None, start, update.init(start), None, None, Context())
  >>> float(start.personal + out.update.personal)  # 5 + 2
  7.0
  """
  if every < 1:
    raise Error(f'synced: every={every} must be at least 1.')

  def init(trainable):
    return Counted(jnp.int32(0), inner.init(trainable))

  def run(base, start, state, batches, masks, context):
    out = inner.run(base, start, state.inner, batches, masks, context)
    now = (context.round % every == 0) | (state.rounds == 0)
    copied = tree.map_present(
      lambda u, w, v, old: jnp.where(now, w + u - v, old),
      out.update.shared,
      start.shared,
      start.personal,
      out.update.personal,
    )
    return out._replace(
      update=out.update._replace(personal=copied),
      state=Counted(state.rounds + 1, out.state),
    )

  return LocalUpdate(init, run)
