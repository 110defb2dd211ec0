"""Local training: a scan of optimizer steps on one client's batches.

`sgd` returns a `LocalUpdate`; `descend` runs the scan for all such updates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import batching, tree
from fedjax_llm.local.gradients import backprop, within
from fedjax_llm.local.one_way import one_way
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.types import (
  Base,
  Batch,
  ClientOutput,
  Context,
  Error,
  Gradient,
  LocalUpdate,
  Loss,
  LossSum,
  Masks,
  Params,
  Work,
  known,
)


def sgd(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  prox: float = 0.0,
  keep_optimizer: bool = False,
  gradient: Gradient = backprop,
) -> LocalUpdate:
  """Returns S steps of an optimizer on loss + prox / 2 * ||p - start||^2.

  The local solver of FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm
  1) and, with `prox` > 0, of FedProx (Li et al. 2020, arXiv 1812.06127,
  equation 2). A step whose batch holds no loss token changes nothing.

  Args:
    loss: sums of nats and counts of tokens; a step descends their ratio, the
      token mean.
    optimizer: from `optimizer(...)`.
    prox: mu of FedProx.
    keep_optimizer: the client keeps its optimizer state between rounds; by
      default it starts afresh, as in federated averaging.
    gradient: the estimate of a step's gradient (`local.gradients`).

  Raises:
    Error: a negative prox.

  >>> from fedjax_llm.types import Context
  >>> from fedjax_llm.local.optimizers import optimizer
  >>> slope = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.float32([1, 0]))
  >>> update = sgd(slope, optimizer('sgd', 0.1))
  >>> masks = Masks(*[{'w': jnp.bool_(True)}] * 2)
  >>> out = update.run(None, {'w': jnp.float32(1)}, (), jnp.array([2.0, 3.0]),
  ...                  masks, Context(key=jax.random.key(0)))
  >>> round(float(out.update['w']), 4)  # two steps: -0.1 * (2 + 3)
  -0.5
  """
  if known(prox) and prox < 0:
    raise Error(f'prox is {prox}; it must be 0 or more.')

  def pull(grads, now, start):
    # The gradient of a sum of squares; that of a norm at zero would be NaN.
    return tree.map_present(
      lambda g, p, s: g + prox * (p - s), grads, now, start
    )

  def init(trainable: Params) -> Any:
    return optimizer.init(trainable) if keep_optimizer else ()

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trained = tree.like(start, masks.trained)
    adjust = None
    if not known(prox) or prox:
      adjust = lambda grads, now: pull(grads, now, trained)
    moments = state if keep_optimizer else optimizer.init(trained)
    out = descend(
      loss, optimizer, base, start, moments, batches, masks, context, adjust,
      gradient,
    )  # fmt: skip
    return ClientOutput(
      update=tree.sub(out.end, trained),
      masks=masks,
      state=out.optimizer if keep_optimizer else (),
      work=out.work,
      metrics=out.metrics,
    )

  return LocalUpdate(init, run)


def clip(grads: Params, clip_norm: float) -> Params:
  """Scales the whole tree to a norm of at most `clip_norm`."""
  norm = tree.norm(grads)
  return tree.scale(grads, jnp.minimum(1.0, clip_norm / (norm + 1e-12)))


def stepped(
  optimizer: LocalOptimizer,
  grads: Params,
  state: Any,
  now: Params,
  mask: Any,
  count: Any,
  real: Any,
  adjust: Callable[[Params, Params], Params] | None = None,
) -> tuple[Params, Any, Params]:
  """Returns parameters and state after one step, and its clipped gradient.

  Args:
    optimizer: its `clip_norm` bounds the gradient before `adjust(grads, now)`.
    grads, state, now: of the leaves that are trained.
    mask: the entries of them that the step may change.
    count: the number of the step in the run.
    real: [] bool; False for a step of padding, which changes nothing.

  >>> from fedjax_llm.local.optimizers import optimizer
  >>> half, one = optimizer('sgd', 0.5), {'w': jnp.ones(())}
  >>> new, _, _ = stepped(half, one, half.init(one), one, {'w': True}, 0, True)
  >>> float(new['w'])
  0.5
  """
  if optimizer.clip_norm is not None:
    grads = clip(grads, optimizer.clip_norm)
  if adjust is not None:
    grads = adjust(grads, now)
  grads = tree.apply_mask(grads, mask)
  updates, new_state = optimizer.update(grads, state, now, count)
  # Weight decay moves entries that have no gradient: mask again.
  updates = tree.apply_mask(updates, mask)
  new = tree.map_present(lambda p, u: (p + u).astype(p.dtype), now, updates)
  keep = lambda n, o: jnp.where(real, n, o)
  return (
    tree.map_present(keep, new, now),
    jax.tree.map(keep, new_state, state),
    grads,
  )


class Descent(NamedTuple):
  """The result of a scan over steps."""

  end: Params  # trained leaves
  optimizer: Any  # its state
  rates: Any  # [] float32, the sum of the learning rates of the steps taken
  work: Work
  metrics: dict[str, jax.Array]


def descend(
  loss: Loss,
  optimizer: LocalOptimizer,
  base: Base,
  start: Params,
  optimizer_state: Any,
  batches: Any,
  masks: Masks,
  context: Context,
  adjust: Callable[[Params, Params], Params] | None = None,
  gradient: Gradient = backprop,
  *,
  between: Callable[[jax.Array, Params], Params] | None = None,
) -> Descent:
  """Runs the scan over steps that all gradient-based local updates share.

  A step clips the gradient of the loss to `optimizer.clip_norm`, then applies
  `adjust(grads, now) -> grads`, in which the updates differ. Before a step
  `between(index, now) -> now` may replace the parameters.
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]
  texts, needed = contents(batches, num_steps)
  round, key = context.round, context.key
  if optimizer.gradient is not None:  # of examples, clipped and noised
    if gradient is not backprop:
      raise Error(
        'privacy: this method estimates its gradients itself, and only those '
        'of backpropagation can be clipped by example: use another method.'
      )
    optimizer.begins()
    # Steps without an example have noise too.
    gradient, needed = optimizer.gradient, num_steps
  elif gradient is not backprop:  # others move entries that are not trained
    loss = within(loss, start, masks.trained)

  def step(index, carry):
    trained, optimizer_state, totals = carry
    if between is not None:
      trained = between(index, trained)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)
    grads, sums = gradient(
      loss,
      base,
      trained,
      start,
      batch,
      jax.random.fold_in(key, index),
    )
    count = round * num_steps + index
    real = sums.count > 0  # a step without a loss token is padding
    new, new_state, grads = stepped(
      optimizer, grads, optimizer_state, trained, masks.trained, count, real,
      adjust,
    )  # fmt: skip
    rate = optimizer.learning_rate(count)
    norm = jax.lax.stop_gradient(tree.norm(grads))
    now = (sums, jnp.int32(1), rate, norm)
    return (
      new,
      new_state,
      jax.tree.map(lambda t, x: t + jnp.where(real, x, 0), totals, now),
    )

  trained = tree.like(start, masks.trained)
  zero = jnp.float32(0)
  totals = (LossSum(zero, zero, zero), jnp.int32(0), zero, zero)
  # Steps of padding at the end are not computed: under `vmap` the loop ends
  # with the client that has most steps. A loop with an end that depends on data
  # has no gradient in reverse; a loop over all steps is a scan and has one.
  if optimizer.differentiable:
    needed, step = num_steps, jax.checkpoint(step, prevent_cse=False)
  end, optimizer_state, totals = jax.lax.fori_loop(
    0, needed, step, (trained, optimizer_state, totals)
  )
  if texts and not optimizer.differentiable:
    end = one_way(
      end,
      'local training has no gradient in reverse: build its optimizer with '
      'differentiable=True.',
    )
  sums, taken, rates, norm = totals
  work = Work(tokens=sums.count, steps=taken)
  if texts:
    used = sum(jnp.sum(x.segments > 0, dtype=jnp.float32) for x in texts)
    work = work._replace(used=used, turns=jnp.int32(needed))
  metrics = {
    'loss': sums.total / jnp.maximum(sums.count, 1.0),
    'accuracy': sums.correct / jnp.maximum(sums.count, 1.0),
    'grad_norm': norm / jnp.maximum(taken, 1),
  }
  return Descent(end, optimizer_state, rates, work, metrics)


def contents(batches: Any, num_steps: int) -> tuple[list[Batch], Any]:
  """Returns the texts of [S, ...] batches, and the number of steps to run.

  Steps after the last one that is not padding are left out. Batches of an
  unknown kind count as full.
  """
  some = batching.real(batches)
  if some is None:
    return [], num_steps
  last = jnp.max(jnp.where(some, jnp.arange(num_steps) + 1, 0))
  return batching.texts(batches), last
