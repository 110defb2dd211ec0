"""Recovers the inputs of a gradient by matching it: DLG and its relatives.

Where `inversion` has no span to look in (more tokens than the rank, later
layers), an attacker looks for inputs whose gradient is like the one that it
saw. `recovered` does this by gradient descent on the inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.types import Error

DISTANCES = ('squared', 'cosine')


class Recovered(NamedTuple):
  """The outcome of an attack.

  >>> Recovered(inputs=None, distance=0.1).distance
  0.1
  """

  inputs: Any  # as the start of the attack
  distance: Any  # [] of the gradients, at the end


def distance(seen: Any, own: Any, kind: str = 'squared') -> jax.Array:
  """Returns the distance of two gradients, [].

      squared  sum_l ||g_l - g'_l||^2
      cosine   sum_l 1 - <g_l, g'_l> / (||g_l|| ||g'_l||)

  over the leaves l. The first is that of DLG (Zhu et al. 2019, arXiv
  1906.08935). The second does not depend on lengths; it is that of LAMP
  (Balunovic et al. 2022, arXiv 2202.08827) times the number of leaves. Geiping
  et al. 2020 (arXiv 2003.14053) take one cosine of the whole gradient.

  Raises:
    Error: another kind.

  >>> x, y = {'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([0.0, 3.0])}
  >>> distance(x, y).item(), distance(x, y, 'cosine').item()
  (10.0, 1.0)
  """
  if kind not in DISTANCES:
    raise Error(f'distance: {kind!r} must be one of {", ".join(DISTANCES)}.')
  pairs = list(zip(jax.tree.leaves(seen), jax.tree.leaves(own), strict=True))
  if kind == 'squared':
    return sum((jnp.sum((x - y) ** 2) for x, y in pairs), jnp.float32(0))
  size = lambda x: _root(jnp.sum(x**2))
  one = lambda x, y: 1 - jnp.sum(x * y) / (size(x) * size(y))
  return sum((one(x, y) for x, y in pairs), jnp.float32(0))


def _root(x: jax.Array) -> jax.Array:
  """Returns the square root, with a finite slope at zero."""
  return jnp.sqrt(x + 1e-24)


def recovered(
  gradient: Callable[[Any], Any],
  seen: Any,
  start: Any,
  *,
  kind: str = 'cosine',
  lengths: float = 0.0,
  length: float = 1.0,
  steps: int = 300,
  learning_rate: float = 0.1,
) -> Recovered:
  """Returns inputs whose gradient is like the one that was seen.

      min_x distance(seen, gradient(x)) + lengths (mean_t ||x_t|| - length)^2

  by Adam from a start. The second term holds the mean length of the inputs of
  the places t, the last axis but one of each leaf, at that of the embeddings of
  a vocabulary: the regulariser of LAMP (arXiv 2202.08827, section 4), whose
  discrete steps with a language model are `lamp.discrete`. Inputs that meet a
  gradient are not unique: try several starts and keep the least distance.

  Args:
    gradient: from inputs to the gradient of what the client trains; it knows
      labels, or they are part of the inputs.
    seen: the client's gradient.
    start: inputs [..., T, D], or a pytree of such.
    kind: 'squared' or 'cosine', see `distance`.
    lengths: the weight of the second term.
    length: the mean length.
    steps, learning_rate: of Adam.

  Raises:
    Error: as `distance`; `steps` below 1.

  >>> gradient = lambda x: {'w': 2.0 * x}
  >>> seen = gradient(jnp.array([[0.5, -0.5]]))
  >>> result = recovered(gradient, seen, jnp.zeros((1, 2)), kind='squared')
  >>> result.inputs.round(2).tolist()
  [[0.5, -0.5]]
  """
  if steps < 1:
    raise Error(f'recovered: steps={steps} must be at least 1.')
  optimizer = optax.adam(learning_rate)

  def loss(x):
    value = distance(seen, gradient(x), kind)
    if not lengths:
      return value, value
    norms = [
      jnp.mean(_root(jnp.sum(leaf**2, -1))) for leaf in jax.tree.leaves(x)
    ]
    gaps = sum(((norm - length) ** 2 for norm in norms), jnp.float32(0))
    return value + lengths * gaps, value

  @jax.jit
  def run(x):
    def step(carry, _):
      x, state = carry
      grads, _ = jax.grad(loss, has_aux=True)(x)
      updates, state = optimizer.update(grads, state, x)
      return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), None, steps)
    return Recovered(x, loss(x)[1])

  return run(start)


def nearest(inputs: jax.Array, table: jax.Array) -> jax.Array:
  """Returns the rows of a table [V, D] nearest to inputs [..., D] by cosine.

  >>> nearest(jnp.array([[0.9, 0.1], [0.0, 2.0]]), jnp.eye(2)).tolist()
  [0, 1]
  """
  unit = lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-12)
  return jnp.argmax(unit(inputs) @ unit(table).T, axis=-1)
