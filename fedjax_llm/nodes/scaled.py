"""The node of (IA)3: a vector that scales features."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.dense import is_quantised
from fedjax_llm.nodes.protocol import Peft, mismatch
from fedjax_llm.types import Error


class Scaled(NamedTuple):
  """Scales each feature: y' = y * scale.

  Liu et al. 2022, arXiv 2205.05638, equation 1. At a weight ('kernel') y is
  x @ W before the bias, so W' = W diag(scale); at 'output' y is the module's
  output, bias included; at 'input' the module's inputs are scaled, as in the
  paper between the two matrices of a perceptron. A norm's 'scale' can be scaled
  too.

  >>> node = Scaled(jnp.array([2.0, 0.5]))
  >>> node.act(None, jnp.ones((1, 2))).tolist()
  [[2.0, 0.5]]
  >>> node.write(jnp.ones((3, 2)))[0].tolist()
  [2.0, 0.5]
  """

  scale: Any  # [L, F]

  PLACES = ('kernel', 'input', 'output', 'scale')

  def act(self, x, y, weight=None) -> jax.Array:
    del x, weight
    return y * self.scale.astype(y.dtype)

  def neutral(self) -> 'Scaled':
    return Scaled(jnp.ones_like(self.scale))

  def write(self, weight: Any) -> Any:
    """Returns a weight [L, D, F] or a vector [L, F] with scaled features."""
    if is_quantised(weight):
      raise Error(
        'a quantised weight holds integers, so its features cannot be scaled: '
        'leave model.quantisation out.'
      )
    scale = self.scale
    if weight.ndim > scale.ndim:
      scale = scale[..., None, :]
    return (weight * scale).astype(weight.dtype)

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    if path[-1] == 'kernel':
      shape = (*shape[:-2], shape[-1])
    if jnp.shape(self.scale) != shape:
      raise mismatch(path, jnp.shape(self.scale), shape)

  def peft(self) -> Peft:
    return Peft(None, kind='IA3', values=self.scale)
