"""The node of LoRA: two low-rank factors beside a weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.dense import add, times


class LowRank(NamedTuple):
  """A low-rank change: W' = W + scale * a @ b + residual.

  Stacked over layers every field has a leading L axis, so that one `lax.scan`
  walks the base and the adapter together. `scale` (alpha / R, or
  alpha / sqrt(R) for rsLoRA) is never trained and never averaged. `residual` is
  the dense part of a change that the factors do not hold, such as the error of
  averaged factors; it is added to the base once a round, outside `vmap`.

  Hu et al. 2021, arXiv 2106.09685.

  >>> node = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(0.5))
  >>> node.act(jnp.ones((1, 2)), jnp.zeros((1, 3))).tolist()
  [[1.0, 1.0, 1.0]]
  """

  a: Any  # [L, D, R]
  b: Any  # [L, R, F]
  scale: Any  # [L]
  residual: Any = None  # [L, D, F]

  FROZEN = ('scale', 'residual')

  def factors(self) -> 'LowRank':
    return self

  def act(self, x, y, weight=None) -> jax.Array:
    """Adds scale * (x @ a) @ b as a separate product.

    Under `vmap` over adapters the product with the base is then one unbatched
    matmul with the rows of all clients.
    """
    del weight
    scale = jnp.asarray(self.scale, x.dtype)
    y = y + times((x @ self.a.astype(x.dtype)) * scale, self.b, y.dtype)
    return y if self.residual is None else y + times(x, self.residual, y.dtype)

  def change(self) -> jax.Array:
    """Returns scale * a @ b + residual, [..., D, F]."""
    delta = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
    delta = delta * self.scale[..., None, None]
    return delta if self.residual is None else delta + self.residual

  def write(self, weight: Any) -> Any:
    return add(weight, self.change())

  def fold(self, weight: Any) -> tuple[Any, 'LowRank']:
    """Moves the residual into the weight."""
    if self.residual is None:
      return weight, self
    return add(weight, self.residual), self._replace(residual=None)

  def weight_shape(self) -> tuple[int, ...]:
    """Returns the shape of a fitting weight, [..., D, F]."""
    return (*jnp.shape(self.a)[:-1], jnp.shape(self.b)[-1])
