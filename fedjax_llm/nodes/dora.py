"""The node of DoRA: a low-rank direction and a norm per output feature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.dense import values
from fedjax_llm.nodes.low_rank import LowRank
from fedjax_llm.nodes.protocol import Peft


class Dora(NamedTuple):
  """W' = m V / ||V||_c with V = W + scale * a @ b.

  ||.||_c is the norm over the inputs of each output feature; no gradient flows
  through it. Liu et al. 2024, arXiv 2402.09353, equation 5.

  >>> node = Dora(LowRank(None, None, None), magnitude=jnp.ones(3))
  >>> node.magnitude.shape
  (3,)
  """

  direction: LowRank
  magnitude: Any  # m [..., F]

  def act(self, x, y, weight) -> jax.Array:
    gain = self.gain(values(weight, jnp.float32))
    return self.direction.act(x, y) * gain.astype(y.dtype)

  def write(self, weight: Any) -> Any:
    turned = (weight + self.direction.change()) * self.gain(weight)[
      ..., None, :
    ]
    return turned.astype(weight.dtype)

  def fold(self, weight: Any) -> tuple[Any, 'Dora']:
    weight, direction = self.direction.fold(weight)
    return weight, self._replace(direction=direction)

  def weight_shape(self) -> tuple[int, ...]:
    return self.direction.weight_shape()

  def peft(self) -> Peft:
    return Peft(self.direction, self.magnitude)

  def gain(self, weight: jax.Array) -> jax.Array:
    """Returns m / ||W + scale * a @ b|| for each output feature, [..., F].

    Computed from products with the factors, so that clients in a `vmap` share W
    and no client's matrix is formed. The norm has no gradient.
    """
    highest = jax.lax.Precision.HIGHEST
    dot = lambda x, y: jnp.matmul(x, y, precision=highest)
    a, b, scale, residual = self.direction
    wide = weight.astype(jnp.float32)
    if residual is not None:
      wide = wide + residual
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    b = b * scale[..., None, None]
    across = jnp.swapaxes(a, -1, -2)
    cross = 2 * dot(across, wide) + dot(dot(across, a), b)
    square = jnp.sum(jnp.square(wide), -2) + jnp.sum(b * cross, -2)
    norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
    return self.magnitude / jax.lax.stop_gradient(norm)
