"""Dense changes of a weight, and arithmetic with quantised weights.

Dense(value)              W' = value: a weight that is trained whole
Added(delta)              W' = W + delta: the meaning of a plain array
Amended(weight, change)   in the base: a quantised W with a change beside it
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import Error


class Dense(NamedTuple):
  """A node that replaces its weight, for example a classifier's head.

  >>> Dense(jnp.ones(2)).value.shape
  (2,)
  """

  value: Any

  def replacement(self) -> Any:
    """Returns the weight that the network uses; None keeps the base's."""
    return self.value

  def write(self, weight: Any) -> Any:
    value = self.value
    return weight if value is None else value.astype(weight.dtype)


class Added(NamedTuple):
  """A node that adds an array to its weight: W' = W + delta.

  A plain array in an adapter's tree means this node.

  >>> Added(jnp.ones((2, 2))).act(jnp.ones((1, 2)), jnp.zeros((1, 2))).tolist()
  [[2.0, 2.0]]
  """

  delta: Any  # of the shape of the weight

  def act(self, x, y, weight=None) -> jax.Array:
    del weight
    return y + times(x, self.delta, y.dtype)

  def write(self, weight: Any) -> Any:
    return add(weight, self.delta)

  def weight_shape(self) -> tuple[int, ...]:
    return jnp.shape(self.delta)


class Amended(NamedTuple):
  """A quantised weight of the base with a dense change beside it.

  The integers of a quantised weight are never rewritten, so the change stays a
  separate matrix: x @ weight + x @ change.

  >>> both = Amended(jnp.ones((1, 2)), change=jnp.ones((1, 2)))
  >>> times(jnp.ones((1, 1)), both, jnp.float32).tolist()
  [[2.0, 2.0]]
  """

  weight: Any  # has a `qvalue`
  change: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


def add(weight: Any, delta: Any) -> Any:
  """Returns the weight with a dense change in it, or beside it if quantised."""
  if isinstance(weight, Amended):
    return weight._replace(change=weight.change + delta)
  if is_quantised(weight):
    return Amended(weight, jnp.asarray(delta))
  return (weight + delta).astype(weight.dtype)


def times(x: jax.Array, weight: Any, dtype: Any) -> jax.Array:
  """Multiplies x [..., D] by a weight [D, F] of any kind, in x's precision.

  `dtype` is that of the result. A quantised weight is dequantised for this
  product only.

  >>> times(jnp.ones((1, 2)), jnp.eye(2), jnp.float32).tolist()
  [[1.0, 1.0]]
  """
  if isinstance(weight, Amended):
    return times(x, weight.weight, dtype) + times(x, weight.change, dtype)
  weight = values(weight, x.dtype)
  return jnp.matmul(x, weight, preferred_element_type=dtype)


def values(weight: Any, dtype: Any) -> jax.Array:
  """Returns a weight as an array, dequantised if it is quantised."""
  if isinstance(weight, Amended):
    whole = values(weight.weight, jnp.float32) + weight.change
    return whole.astype(dtype)
  if is_quantised(weight):
    weight = _qwix().dequantize(weight)
  return weight.astype(dtype)


def is_quantised(weight: Any) -> bool:
  """Returns True for a quantised weight, with or without a dense change."""
  return isinstance(weight, Amended) or hasattr(weight, 'qvalue')


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise Error(
      "quantisation needs the package 'qwix': pip install 'fedjax_llm[quant]'."
    ) from error
  return qwix
