"""The peak memory of one step of one client, from the compiled program.

`peaks` compiles the step of a config without running it: a forward pass alone,
two forward passes (zeroth order), forward mode, and backpropagation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_llm import local, scopes, tree
from fedjax_llm.local.gradients import backprop
from fedjax_llm.plan import work
from fedjax_llm.run import costs, metrics
from fedjax_llm.types import Gradient, Loss, Params, Shared


class Peak(NamedTuple):
  """The memory of a compiled step, in bytes."""

  name: str
  base: int  # the frozen weights
  others: int  # adapter, texts, results
  temporary: int  # activations and all else between them

  @property
  def total(self) -> int:
    return self.base + self.others + self.temporary


# The kinds of steps, the lightest first. None: no gradient.
GRADIENTS: dict[str, Gradient | None] = {
  'inference': None,
  'two points': local.along(local.two_point()),
  'forward mode': local.along(local.forward_mode()),
  'backpropagation': backprop,
}


def client_step(
  loss: Loss, gradient: Gradient | None
) -> Callable[..., tuple[Params, jax.Array]]:
  """Returns one step of SGD; without a gradient the loss alone.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import LossSum
  >>> loss = lambda base, p, x, key: LossSum(p['w'] ** 2, *jnp.ones(2))
  >>> step = client_step(loss, backprop)
  >>> new, _ = step(None, {'w': jnp.float32(1)}, None, jax.random.key(0))
  >>> round(float(new['w']), 4)
  0.998
  """

  def step(base, params, batch, key):
    if gradient is None:
      return params, loss(base, params, batch, key).total
    labels = scopes.everything().labels(params)
    trained = tree.select(params, labels, Shared)
    grads, sums = gradient(loss, base, trained, params, batch, key)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, trained, grads)
    return tree.merge(moved, params), sums.total

  return step


def shapes(planned: work.Work) -> tuple[Any, ...]:
  """Returns the shapes of a step's arguments: base, adapter, batch, key."""
  take = lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype)
  batch = jax.tree.map(take, planned.cohort.batches)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return planned.base, planned.initial, batch, key


def peak(
  name: str,
  planned: work.Work,
  gradient: Gradient | None,
  step: Callable[..., Any] | None = None,
) -> Peak:
  """Returns the memory of a step of one client of a round of shapes.

  `step(base, params, batch, key)` is another step than that of the gradient.
  """
  step = jax.jit(step or client_step(planned.loss, gradient), donate_argnums=1)
  found = step.lower(*shapes(planned)).compile()
  sizes: Any = found.memory_analysis()
  base = costs.num_bytes(planned.base)
  whole = (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
  )
  return Peak(name, base, max(whole - base, 0), sizes.temp_size_in_bytes)


def peaks(planned: work.Work, *, again: work.Work | None = None) -> list[Peak]:
  """Returns the memory of every kind of step.

  Args:
    planned: a round as shapes (`work.read`).
    again: the same round with rematerialised layers, as one more kind.
  """
  result = [peak(name, planned, g) for name, g in GRADIENTS.items()]
  if again is not None:
    result.append(peak('backpropagation, remat', again, backprop))
  return result


def rows(result: list[Peak]) -> list[tuple[str, str]]:
  """Returns the lines of a plan: name and memory, beside that of inference.

  >>> some = [Peak('inference', 100, 0, 20), Peak('two points', 100, 0, 26)]
  >>> rows(some)[1]
  ('  two points', '126 B, 1.05 x inference; activations 1.30 x')
  """
  first = result[0]
  lines = []
  for one in result:
    text = metrics.human_bytes(one.total)
    if one is not first:
      whole = one.total / first.total
      part = one.temporary / max(first.temporary, 1)
      text += f', {whole:.2f} x inference; activations {part:.2f} x'
    lines.append((f'  {one.name}', text))
  return lines
