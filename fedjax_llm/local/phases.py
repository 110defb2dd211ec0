"""Local training in phases: one after another, each on its own leaves.

`phases` and `counted` return a `LocalUpdate`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  ClientOutput,
  Error,
  LocalUpdate,
  Masks,
  Params,
  Private,
  Scope,
  Shared,
  Work,
)


class Phase(NamedTuple):
  """A part of a client's local training: an update, its leaves and its rounds.

  It trains the leaves that `scope` does not freeze, in the rounds where
  `when(round)` holds (None: in all). In other rounds its leaves and its state
  stay as they are, and it costs and sends nothing.

  >>> from fedjax_llm import scopes
  >>> late = Phase(None, scopes.frozen('^shared/'), lambda round: round >= 5)
  >>> late.when(4), late.when(5)
  (False, True)
  """

  local: LocalUpdate
  scope: Scope
  when: Callable[[jax.Array], jax.Array] | None = None


def phases(*parts: Phase, steps: Sequence[int] | None = None) -> LocalUpdate:
  """Returns a local update of phases; each starts where the last one stopped.

  A client's state is the tuple of the phases' states. Loss and accuracy are
  token means over all phases; tokens and steps are sums over all phases.

  Args:
    parts: in order. A leaf may be trained by several.
    steps: the number of the S batches that each phase but the last takes, one
      after another; the last takes the rest. None: every phase takes all S.
      The schedule of an optimizer runs over the steps of its own phase.

  Raises:
    Error: no phase, a number of steps that is not positive or one missing;
      from the round, no batch left for the last phase.

  >>> from fedjax_llm.types import ClientOutput, Context
  >>> everything = Scope(lambda p: {name: Shared for name in p}, None)
  >>> def add(by):
  ...   def run(base, start, state, batches, masks, context):
  ...     update = {name: jnp.float32(by) for name in start}
  ...     return ClientOutput(
  ...       update, masks, work=Work(tokens=1.0), metrics={'loss': by})
  ...   return LocalUpdate(lambda params: (), run)
  >>> both = phases(*(Phase(add(by), everything) for by in (1.0, 3.0)))
  >>> start, masks = {'w': jnp.float32(0)}, Masks(*[{'w': jnp.bool_(True)}] * 2)
  >>> out = both.run(None, start, both.init(start), jnp.ones(2), masks,
  ...                Context(key=jax.random.key(0)))
  >>> float(out.update['w']), float(out.metrics['loss'])
  (4.0, 2.0)
  """
  if not parts:
    raise Error('phases needs at least one phase.')
  if steps is not None and (
    len(steps) != len(parts) - 1 or any(n < 1 for n in steps)
  ):
    raise Error(
      f'phases: steps={tuple(steps)} must be a positive number for each of the '
      f'{len(parts)} phases but the last.'
    )

  def init(trainable: Params) -> Any:
    return tuple(p.local.init(_own(trainable, trainable, p)) for p in parts)

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    num = jax.tree.leaves(batches)[0].shape[0]
    ends = [num] * len(parts)
    begins = [0] * len(parts)
    if steps is not None:
      for i, n in enumerate(steps):
        ends[i] = begins[i + 1] = begins[i] + n
      if begins[-1] >= num:
        raise Error(
          f'phases: the first phases take {begins[-1]} steps, but a client has '
          f'{num}: raise cohort.num_steps.'
        )
    now, outs, states = start, [], []
    update = tree.zeros_like(tree.like(start, masks.trained))
    for i, part in enumerate(parts):
      mine = Masks(*(_own(m, start, part) for m in masks))
      if not jax.tree.leaves(mine.trained):
        states.append(state[i])
        continue
      rows = jax.tree.map(lambda x, i=i: x[begins[i] : ends[i]], batches)
      key = jax.random.fold_in(context.key, i)
      here = context._replace(key=key)
      out = _run(part, base, now, state[i], rows, mine, here)
      now = tree.add(now, out.update)
      update = tree.merge(tree.map_present(jnp.add, update, out.update), update)
      masks = Masks(*(tree.merge(*pair) for pair in zip(out.masks, masks)))
      states.append(out.state)
      outs.append(out)
    work, metrics = _together(outs)
    return ClientOutput(
      update, masks, tuple(states), work=work, metrics=metrics
    )

  return LocalUpdate(init, run)


def _own(x: Any, params: Params, part: Phase) -> Any:
  return tree.select(x, part.scope.labels(params), Shared, Private)


def _run(part: Phase, base, start, state, rows, masks, context):
  def train(start, state):
    return part.local.run(base, start, state, rows, masks, context)

  if part.when is None:
    return train(start, state)

  def skip(start, state):
    shape = jax.eval_shape(train, start, state)
    zeros = lambda x: jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x
    )
    none = Masks(shape.masks.held, zeros(shape.masks.trained))
    held = jax.tree.map(
      lambda leaf, m: jnp.broadcast_to(m, leaf.shape), none.held, masks.held
    )
    return ClientOutput(
      zeros(shape.update),
      none._replace(held=held),
      state,
      work=zeros(shape.work),
      metrics=zeros(shape.metrics),
    )

  # The round is the same for all clients: under `vmap` this stays a branch.
  return jax.lax.cond(part.when(context.round), train, skip, start, state)


def _together(outs: list[ClientOutput]) -> tuple[Work, dict[str, Any]]:
  """Returns the sum of the phases' work, and token means of their metrics."""
  if not outs:
    raise Error('phases: no phase trains a leaf of the parameters.')
  work = jax.tree.map(lambda *xs: sum(xs), *(out.work for out in outs))
  mean = lambda name: (
    sum(out.metrics[name] * out.work.tokens for out in outs)
    / jnp.maximum(work.tokens, 1.0)
  )
  shared = [n for n in outs[0].metrics if all(n in o.metrics for o in outs)]
  return work, {name: mean(name) for name in shared}


class Counted(NamedTuple):
  """A client's state with the number of rounds that it has trained.

  >>> Counted(rounds=3, inner=()).rounds
  3
  """

  rounds: Any  # [] int32
  inner: Any


def counted(inner: LocalUpdate) -> LocalUpdate:
  """Returns the local update with a state that also counts the client's rounds.

  >>> from fedjax_llm.types import Context
  >>> still = LocalUpdate(lambda p: (), lambda *rest: ClientOutput(
  ...   None, None))
  >>> update = counted(still)
  >>> out = update.run(None, None, update.init(None), None, None, Context())
  >>> int(out.state.rounds)
  1
  """

  def init(trainable):
    return Counted(jnp.int32(0), inner.init(trainable))

  def run(base, start, state, batches, masks, context):
    out = inner.run(base, start, state.inner, batches, masks, context)
    return out._replace(state=Counted(state.rounds + 1, out.state))

  return LocalUpdate(init, run)
