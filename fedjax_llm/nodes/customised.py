"""Bottlenecks that a network makes from the classes and the texts of a batch.

`Customised` is the network, `Contextual` a bottleneck behind a module.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.bottleneck import Activation, Bottleneck
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.protocol import mismatch
from fedjax_llm.types import Error


class Contextual(NamedTuple):
  """A bottleneck whose weights depend on the texts of a batch (C2A).

      z = mean over texts of m / ||m||,   m the mean of y over a text's tokens
      w = (code + z W + b) @ weights,     down = [F, R] and up = [R, F] of w
      y' = y + gelu(y @ down + down_bias) @ up + up_bias

  with the error function in gelu. `down` and `up` are two shapes of the same
  R F numbers. A row holds one text; rows without tokens do not count.

  >>> one = lambda *shape: jnp.ones(shape)
  >>> node = Contextual(one(2, 3), one(2), Affine(one(3, 2), one(2)),
  ...                   jnp.zeros(1), jnp.zeros(3))
  >>> node.act_on_texts(None, one(1, 4, 3), None, None).shape
  (1, 4, 3)
  """

  weights: Any  # [L, E, R F]
  code: Any  # [L, E], of the layer and of the classes
  text: Affine  # W [L, F, E], b [L, E]
  down_bias: Any  # [L, R]
  up_bias: Any  # [L, F]

  PLACES = ('output',)

  def act_on_texts(self, x: Any, y: jax.Array, weight: Any, real: Any) -> Any:
    del x, weight
    return self.bottleneck(y, real).act(None, y)

  def bottleneck(self, y: jax.Array, real: Any) -> Bottleneck:
    """Returns the bottleneck of texts y [B, T, F] with tokens `real` [B, T]."""
    here = jnp.ones(y.shape[:2]) if real is None else real
    here = here.astype(jnp.float32)
    kept = jnp.where(here[..., None] > 0, y.astype(jnp.float32), 0)
    mean = kept.sum(1) / jnp.maximum(here.sum(1), 1)[:, None]  # [B, F]
    square = jnp.maximum(jnp.sum(mean**2, -1, keepdims=True), 1e-24)
    present = jnp.any(here > 0, 1).astype(jnp.float32)
    unit = mean * jax.lax.rsqrt(square) * present[:, None]
    z = unit.sum(0) / jnp.maximum(present.sum(), 1)
    w = (self.code + self.text(z)) @ self.weights
    size, rank = y.shape[-1], jnp.shape(self.down_bias)[-1]
    return Bottleneck(
      w.reshape(size, rank),
      w.reshape(rank, size),
      self.down_bias,
      self.up_bias,
      activation=Activation.GELU,
    )

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'a contextual bottleneck depends on the texts, so it cannot be written '
      'into a weight: serve it beside the base.'
    )

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    here = jnp.shape(self.text.kernel)
    if here != (*shape, here[-1]):
      raise mismatch((*path, 'text'), here, (*shape, here[-1]))

  def peft(self) -> Any:
    raise Error(
      'a contextual bottleneck depends on the texts, and PEFT has no such '
      'adapter.'
    )


class Customised(NamedTuple):
  """A network that makes the bottlenecks of all layers for a client (C2A).

      H = reshape(lower @ higher, [E, R F]) + bias,   rows of norm one
      code_l = layer_l + classes(labels)
      `Contextual`(H, code_l, text) behind attention and the perceptron of l

  Kim et al. 2023, "Client-Customized Adaptation for Parameter-Efficient
  Federated Learning", Findings of ACL. All but `labels`, the distribution of
  the classes of a batch, is trained and sent.

  >>> from fedjax_llm import adapters
  >>> kernel = {'kernel': jnp.ones((2, 6, 6))}
  >>> base = {'layers': {'mlp': {'down_proj': kernel},
  ...                    'self_attn': {'o_proj': kernel}},
  ...         'classifier': {'kernel': jnp.ones((6, 3))}}
  >>> node = adapters.c2a(4, 5).init(jax.random.key(0), base)['generator']
  >>> node.generate()['layers']['mlp']['down_proj']['output'].weights.shape
  (2, 5, 24)
  """

  lower: Any  # [E R, C]
  higher: Any  # [C, F]
  bias: Any  # [R F]
  layer: Any  # [L, E]
  classes: Affine  # [Y, E] and [E]
  text: Affine  # [F, E] and [E]
  down_bias: Any  # [R]
  up_bias: Any  # [F]
  labels: Any  # [Y], sums to one

  PLACES = ('generator',)
  FROZEN = ('labels',)

  def generate(self) -> dict[str, Any]:
    number, size = jnp.shape(self.layer)
    whole = (self.lower @ self.higher).reshape(size, -1) + self.bias
    square = jnp.maximum(jnp.sum(whole**2, -1, keepdims=True), 1e-24)
    each = lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x)))
    node = Contextual(
      each(whole * jax.lax.rsqrt(square)),
      self.layer + self.classes(self.labels),
      Affine(each(self.text.kernel), each(self.text.bias)),
      each(self.down_bias),
      each(self.up_bias),
    )
    return {
      'layers': {
        'self_attn': {'o_proj': {'output': node}},
        'mlp': {'down_proj': {'output': node}},
      }
    }
