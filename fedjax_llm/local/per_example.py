"""The gradient of example-level privacy: every example clipped, noise a step.

`private` returns a `LocalOptimizer` whose steps take that gradient, and
`guarded` a loss that nothing else may call.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.types import Base, Error, Gradient, Key, Loss, LossSum, Params

CLIPPINGS = ('abadi', 'automatic')
_SLACK = 1e-6  # clipped norms stay this share below the bound, for rounding
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'inside', default=False
)


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
  token = _inside.set(True)
  try:
    yield
  finally:
    _inside.reset(token)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function of texts that only a clipped gradient may call.

  Raises:
    Error: from the function, when it is called elsewhere.

  >>> guarded(lambda *_: LossSum(0.0, 0.0, 0.0))(None, None, None, None)
  Traceback (most recent call last):
  fedjax_llm.types.Error: privacy: this method reads texts outside of the \
gradient whose examples are clipped: use a method that trains by gradients \
alone, such as fed_avg or ffa_lora.
  """

  def call(*args: Any, **keywords: Any) -> Any:
    if not _inside.get():
      raise Error(
        'privacy: this method reads texts outside of the gradient whose '
        'examples are clipped: use a method that trains by gradients alone, '
        'such as fed_avg or ffa_lora.'
      )
    return function(*args, **keywords)

  return call


def factor(norm: jax.Array, clip: float, clipping: str, gamma: float) -> Any:
  """Returns the factor of a gradient with a norm, so that it is at most C.

  'abadi' is min(1, C / norm) (Abadi et al. 2016, arXiv 1607.00133, algorithm
  1), 'automatic' C / (norm + gamma) (Bu et al. 2022, arXiv 2206.07136, AUTO-S).
  A norm that is not finite has the factor zero.

  >>> round(float(factor(jnp.float32(4.0), 2.0, 'automatic', 1.0)), 4)
  0.4
  """
  bound = clip * (1 - _SLACK)
  if clipping == 'abadi':
    scale = bound / jnp.maximum(norm, bound)
  else:
    scale = bound / (norm + gamma)
  return jnp.where(jnp.isfinite(norm), scale, 0.0)


def noisy(
  clip: float,
  noise_multiplier: float,
  denominator: float,
  *,
  clipping: str = 'abadi',
  gamma: float = 0.01,
  microbatch: int | None = None,
) -> Gradient:
  """Returns the gradient (sum_i clip(g_i) + N(0, (z C)^2)) / denominator.

  g_i is the gradient of the token mean of example i, a row of the batch. Rows
  of padding add zero, and the noise is there in a step without rows too (Abadi
  et al. 2016, arXiv 1607.00133, algorithm 1).

  Args:
    clip: C, over all trained leaves.
    noise_multiplier: z.
    denominator: a public number in place of the number of rows.
    clipping, gamma: see `factor`.
    microbatch: rows whose gradients exist at once; None: all rows.

  Raises:
    Error: from the gradient, rows that `microbatch` does not divide.

  >>> loss = lambda base, p, x, key: LossSum(
  ...   jnp.sum(p['w'] * x), jnp.float32(x.size), jnp.float32(0))
  >>> start = {'w': jnp.float32(0)}
  >>> gradient = noisy(1.0, 0.0, 2.0)
  >>> grads, _ = gradient(
  ...   loss, None, start, start, jnp.array([0.5, 9.0]), jax.random.key(0))
  >>> grads['w'].round(4).item()  # (0.5 + 1) / 2
  0.75
  """

  def gradient(
    loss: Loss, base: Base, trained: Params, start: Params, batch: Any, key: Key
  ) -> tuple[Params, LossSum]:
    num = jax.tree.leaves(batch)[0].shape[0]
    size = num if microbatch is None else microbatch
    if num % size:
      raise Error(
        f'privacy.microbatch is {size}, which does not divide the rows of a '
        f'step, cohort.batch_size={num}.'
      )
    own, noise = jax.random.split(key)

    def one(row, place):
      alone = jax.tree.map(lambda x: x[None], row)
      of = lambda t: mean_loss(
        loss, base, t, start, alone, jax.random.fold_in(own, place)
      )
      grads, sums = jax.grad(of, has_aux=True)(trained)
      norm = tree.norm(grads)
      by = jnp.where(sums.count > 0, factor(norm, clip, clipping, gamma), 0.0)
      clean = jax.tree.map(
        lambda g: jnp.where(jnp.isfinite(g), g, 0).astype(jnp.float32) * by,
        grads,
      )
      return clean, sums

    def some(total, rows):
      with _allowed():
        each = jax.vmap(one)(*rows)
      return jax.tree.map(lambda t, x: t + jnp.sum(x, 0), total, each), None

    chunks = jax.tree.map(
      lambda x: jnp.asarray(x).reshape(num // size, size, *x.shape[1:]),
      (batch, jnp.arange(num)),
    )
    zero = jnp.float32(0)
    begun = tree.zeros_like(trained, jnp.float32), LossSum(zero, zero, zero)
    (total, sums), _ = jax.lax.scan(some, begun, chunks)
    leaves, treedef = jax.tree.flatten(total)
    deviation = noise_multiplier * clip
    keys = jax.random.split(noise, max(len(leaves), 1))
    noised = [
      (x + deviation * jax.random.normal(k, x.shape)) / denominator
      for x, k in zip(leaves, keys)
    ]
    grads = tree.map_present(
      lambda g, p: g.astype(p.dtype),
      jax.tree.unflatten(treedef, noised),
      trained,
    )
    # A count of zero would mark the step as padding, which has no noise.
    return grads, sums._replace(count=jnp.maximum(sums.count, 1e-6))

  return gradient


def private(
  optimizer: LocalOptimizer, gradient: Gradient, begins: Callable[[], None]
) -> LocalOptimizer:
  """Returns the optimizer with a gradient of its own for `local.descend`.

  `begins()` is called at the beginning of every descent on a client's batches.

  Raises:
    Error: an optimizer that is differentiable.
  """
  if optimizer.differentiable:
    raise Error(
      'local.differentiable is True, and privacy adds noise in every step: '
      'leave it out.'
    )
  return optimizer._replace(gradient=gradient, begins=begins)
