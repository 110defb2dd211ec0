"""Local training: a scan of optimizer steps on one client's batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.one_way import one_way
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.types import (
  Batch,
  ClientOutput,
  Error,
  LocalUpdate,
  Loss,
  LossSum,
  Masks,
  Params,
  known,
)


def sgd(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  prox: float = 0.0,
  clip_norm: float | None = None,
  keep_optimizer: bool = False,
) -> LocalUpdate:
  """S steps of an optimizer on loss + prox / 2 * ||p - start||^2.

  The local solver of FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm
  1) and, with `prox` > 0, of FedProx (Li et al. 2020, arXiv 1812.06127,
  equation 2). A step whose batch holds no loss token changes nothing.

  Args:
    loss: sums of nats and counts of tokens; a step descends their ratio, the
      token mean.
    optimizer: from `optimizer(...)`.
    prox: mu of FedProx.
    clip_norm: bound on the gradient's norm over the whole adapter.
    keep_optimizer: the client keeps its optimizer state between rounds; by
      default it starts afresh, as in federated averaging.

  Raises:
    Error: a negative prox or a clip_norm that is not positive.

  >>> from fedjax_llm.local.optimizers import optimizer
  >>> slope = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.float32([1, 0]))
  >>> update = sgd(slope, optimizer('sgd', 0.1))
  >>> masks = Masks(*[{'w': jnp.bool_(True)}] * 2)
  >>> out = update.run(None, {'w': jnp.float32(1)}, (), jnp.array([2.0, 3.0]),
  ...                  masks, 0, jax.random.key(0))
  >>> round(float(out.update['w']), 4)  # two steps: -0.1 * (2 + 3)
  -0.5
  """
  if known(prox) and prox < 0:
    raise Error(f'prox is {prox}; it must be 0 or more.')
  if clip_norm is not None and known(clip_norm) and clip_norm <= 0:
    raise Error(f'clip_norm is {clip_norm}; it must be above 0.')

  def adjust(grads, trained, start):
    if clip_norm is not None:
      grads = clip(grads, clip_norm)
    if not known(prox) or prox:
      # A sum of squares: the gradient of a norm at zero would be NaN. Added
      # after clipping, which bounds what the data say.
      grads = tree.map_present(
        lambda g, p, s: g + prox * (p - s), grads, trained, start
      )
    return grads

  def init(trainable: Params) -> Any:
    return optimizer.init(trainable) if keep_optimizer else ()

  def run(base, start, state, batches, masks, round, key) -> ClientOutput:
    trained = tree.like(start, masks.trained)
    optimizer_state = state if keep_optimizer else optimizer.init(trained)
    end, optimizer_state, metrics = descend(
      loss, optimizer, base, start, optimizer_state, batches, masks, round, key,
      lambda grads, now: adjust(grads, now, trained),
    )  # fmt: skip
    return ClientOutput(
      update=tree.sub(end, trained),
      masks=masks,
      state=optimizer_state if keep_optimizer else (),
      metrics=metrics,
    )

  return LocalUpdate(init, run)


def clip(grads: Params, clip_norm: float) -> Params:
  """Scales the whole tree to a norm of at most `clip_norm`."""
  norm = tree.norm(grads)
  return tree.scale(grads, jnp.minimum(1.0, clip_norm / (norm + 1e-12)))


def descend(
  loss: Loss,
  optimizer: LocalOptimizer,
  base: Any,
  start: Params,
  optimizer_state: Any,
  batches: Any,
  masks: Masks,
  round: jax.Array,
  key: jax.Array,
  adjust: Callable[[Params, Params], Params],
) -> tuple[Params, Any, dict[str, jax.Array]]:
  """The scan over steps that every gradient-based local update shares.

  `adjust(grads, now) -> grads` is where they differ. Returns the trained
  leaves at the end, the optimizer state and the metrics.
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]
  texts, needed = _contents(batches, num_steps)

  def mean_loss(trained, batch, key):
    sums = loss(base, tree.merge(trained, start), batch, key)
    return sums.total / jnp.maximum(sums.count, 1.0), sums

  def step(index, carry):
    trained, optimizer_state, told = carry
    batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)
    grads, sums = jax.grad(mean_loss, has_aux=True)(
      trained, batch, jax.random.fold_in(key, index)
    )
    grads = tree.apply_mask(adjust(grads, trained), masks.trained)
    count = round * num_steps + index
    updates, new_state = optimizer.update(
      grads, optimizer_state, trained, count
    )
    # Weight decay moves entries that have no gradient: mask again.
    updates = tree.apply_mask(updates, masks.trained)
    new = tree.map_present(
      lambda p, u: (p + u).astype(p.dtype), trained, updates
    )
    real = sums.count > 0  # a step without a loss token is padding
    keep = lambda n, o: jnp.where(real, n, o)
    rate = optimizer.learning_rate(count)
    norm = jax.lax.stop_gradient(tree.norm(grads))
    now = (sums, jnp.int32(1), rate, norm)
    return (
      tree.map_present(keep, new, trained),
      jax.tree.map(keep, new_state, optimizer_state),
      jax.tree.map(lambda t, x: t + jnp.where(real, x, 0), told, now),
    )

  trained = tree.like(start, masks.trained)
  zero = jnp.float32(0)
  told = (LossSum(zero, zero, zero), jnp.int32(0), zero, zero)
  # Steps of padding at the end are not computed: under `vmap` the loop ends
  # with the client that needs most. A loop whose end depends on data has no
  # gradient in reverse; one of all steps is a scan, and has.
  if optimizer.differentiable:
    needed, step = num_steps, jax.checkpoint(step, prevent_cse=False)
  end, optimizer_state, told = jax.lax.fori_loop(
    0, needed, step, (trained, optimizer_state, told)
  )
  if texts and not optimizer.differentiable:
    end = one_way(
      end,
      'local training has no gradient in reverse: build its optimizer with '
      'differentiable=True.',
    )
  sums, taken, rate, norm = told
  metrics = {
    'loss': sums.total / jnp.maximum(sums.count, 1.0),
    'accuracy': sums.correct / jnp.maximum(sums.count, 1.0),
    'tokens': sums.count,
    'steps': taken,
    'learning_rate_sum': rate,
    'grad_norm': norm / jnp.maximum(taken, 1),
  }
  if texts:
    metrics['text_tokens'] = sum(
      jnp.sum(x.segments > 0, dtype=jnp.float32) for x in texts
    )
    metrics['loop_steps'] = needed
  return end, optimizer_state, metrics


def _contents(batches: Any, num_steps: int) -> tuple[list[Batch], Any]:
  """The texts of [S, ...] batches, and up to which step there are any.

  Batches of something else than texts are taken to fill every step.
  """
  is_text = lambda x: isinstance(x, Batch)
  leaves = jax.tree.leaves(batches, is_leaf=is_text)
  texts = [x for x in leaves if is_text(x)]
  if len(texts) < len(leaves):
    return [], num_steps
  some = jnp.zeros(num_steps, bool)
  for x in texts:
    some |= jnp.any(x.segments > 0, axis=tuple(range(1, x.segments.ndim)))
  return texts, jnp.max(jnp.where(some, jnp.arange(num_steps) + 1, 0))
