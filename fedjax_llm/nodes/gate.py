"""The node of FedCLIP: attention over features."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.protocol import mismatch
from fedjax_llm.types import Error


class Gate(NamedTuple):
  """Weighs features: y' = y * softmax(tanh(y W1 + b1) W2 + b2).

  Lu et al. 2023, arXiv 2302.13485. The weights of all
  features sum to one.

  >>> layer = Affine(jnp.zeros((4, 4)), jnp.zeros(4))
  >>> Gate(layer, layer).act(None, jnp.ones((1, 4))).tolist()
  [[0.25, 0.25, 0.25, 0.25]]
  """

  inner: Affine  # [L, F, R]
  last: Affine  # [L, R, F]

  PLACES = ('output',)
  FROZEN = ()

  def act(self, x, y, weight=None) -> jax.Array:
    del x, weight
    wide = y.astype(jnp.float32)
    scores = self.last(jnp.tanh(self.inner(wide)))
    return (wide * jax.nn.softmax(scores)).astype(y.dtype)

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'a gate depends on the features, so it cannot be written into a weight: '
      'serve it beside the base.'
    )

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    last = jnp.shape(self.last.bias)
    if last != shape:
      raise mismatch((*path, 'last'), last, shape)
    inner = jnp.shape(self.inner.kernel)
    want = (*shape, jnp.shape(self.last.kernel)[-2])
    if inner != want:
      raise mismatch((*path, 'inner'), inner, want)

  def peft(self) -> Any:
    raise Error('PEFT has no gates of features, so there are no files for it.')
