"""The node of Houlsby's and Pfeiffer's adapters: a bottleneck with a residual.

Houlsby et al. 2019, arXiv 1902.00751, put one behind attention and one behind
the perceptron, each before the block's own residual is added; Pfeiffer et al.
2021, arXiv 2005.00247, only behind the perceptron:

    {'layers': {'self_attn': {'o_proj': {'output': Bottleneck(...)}},
                'mlp': {'down_proj': {'output': Bottleneck(...)}}}}

He et al. 2022, arXiv 2110.04366, put one beside the perceptron, which reads
the perceptron's own inputs:

    {'layers': {'mlp': {'parallel': Bottleneck(...)}}}
"""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.dense import times
from fedjax_llm.nodes.protocol import mismatch
from fedjax_llm.types import Error


@jax.tree_util.register_static
class Activation(enum.Enum):
  """The activation function of a bottleneck; a constant, not a leaf.

  >>> Activation.RELU(jnp.array([-1.0, 2.0])).tolist()
  [0.0, 2.0]
  """

  IDENTITY = 'identity'
  RELU = 'relu'
  SILU = 'silu'
  TANH = 'tanh'
  GELU = 'gelu'  # with the error function
  GELU_TANH = 'gelu_tanh'  # with its approximation by tanh

  def __call__(self, x: jax.Array) -> jax.Array:
    return _FUNCTIONS[self.value](x)


_FUNCTIONS = {
  'identity': lambda x: x,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'tanh': jnp.tanh,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class Bottleneck(NamedTuple):
  """y' = y + scale * (f(z @ down + down_bias) @ up + up_bias).

  At the 'output' of a module z is y. At the place 'parallel' of a sublayer, z
  is the sublayer's input and y its output: see `Parallel`. It is no linear map
  of the module's inputs, so it cannot be written into a weight.

  >>> one = jnp.ones((1, 1))
  >>> node = Bottleneck(one, 3 * one, activation=Activation.RELU)
  >>> node.act(None, jnp.array([[-1.0], [2.0]])).tolist()
  [[-1.0], [8.0]]
  """

  down: Any  # [L, F, R]
  up: Any  # [L, R, F]
  down_bias: Any = None  # [L, R]
  up_bias: Any = None  # [L, F]
  scale: Any = None  # [L], None for one; never trained
  activation: Activation = Activation.GELU

  PLACES = ('output',)
  FROZEN = ('scale', 'activation')

  def act(self, x, y, weight=None) -> jax.Array:
    del x, weight
    return y + self.change(y)

  def change(self, z: jax.Array) -> jax.Array:
    """Returns what is added, computed from z [..., F]."""
    inner = times(z, self.down, z.dtype)
    if self.down_bias is not None:
      inner = inner + self.down_bias.astype(z.dtype)
    change = times(self.activation(inner), self.up, z.dtype)
    if self.up_bias is not None:
      change = change + self.up_bias.astype(z.dtype)
    if self.scale is not None:
      change = change * self.scale.astype(z.dtype)
    return change

  def neutral(self) -> 'Bottleneck':
    return jax.tree.map(jnp.zeros_like, self)

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'a bottleneck adapter is no linear map, so it cannot be written into a '
      'weight: serve it beside the base.'
    )

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    *lead, features = shape
    down, up = jnp.shape(self.down), jnp.shape(self.up)
    rank = down[-1]
    if down != (*lead, features, rank):
      raise mismatch((*path, 'down'), down, (*lead, features, rank))
    if up != (*lead, rank, features):
      raise mismatch((*path, 'up'), up, (*lead, rank, features))

  def peft(self) -> Any:
    raise Error(
      'PEFT has no bottleneck adapters, so there are no files for it.'
    )


class Parallel(NamedTuple):
  """A bottleneck beside a sublayer: y' = y + change(x).

  x [..., D] are the inputs of the sublayer, behind its norm where it has one
  before it, and y its output, before the block's residual is added.

  >>> one = jnp.ones((1, 1))
  >>> node = Parallel(Bottleneck(one, one, activation=Activation.RELU))
  >>> node.act(jnp.array([[2.0]]), jnp.array([[5.0]])).tolist()
  [[7.0]]
  """

  bottleneck: Bottleneck

  PLACES = ('parallel',)
  FROZEN = ()

  def act(self, x, y, weight=None) -> jax.Array:
    del weight
    return y + self.bottleneck.change(x).astype(y.dtype)

  def neutral(self) -> 'Parallel':
    return Parallel(self.bottleneck.neutral())

  def write(self, weight: Any) -> Any:
    return self.bottleneck.write(weight)

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    self.bottleneck.check(shape, path)

  def peft(self) -> Any:
    return self.bottleneck.peft()
