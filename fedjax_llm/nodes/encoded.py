"""Prompts that a small network computes from trained rows.

`Encoded` is the prompt of P-tuning, `Projected` the prefix of prefix tuning
with its reparametrisation. The networks are trained and sent with the rows;
`nodes.protocol.plain` computes the prompt, which is all that is served.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.prompt import Prefix, Prompt
from fedjax_llm.nodes.protocol import Peft


class Affine(NamedTuple):
  """x @ kernel + bias, a layer of a prompt's network.

  >>> Affine(jnp.ones((2, 3)), jnp.ones(3))(jnp.ones((1, 2))).tolist()
  [[3.0, 3.0, 3.0]]
  """

  kernel: Any  # [D, F]
  bias: Any  # [F]

  def __call__(self, x: jax.Array) -> jax.Array:
    return x @ self.kernel + self.bias


class Direction(NamedTuple):
  """One direction of a layer of an LSTM; gates in the order i, f, g, o.

      i, f, o = sigmoid(...),  g = tanh(...)   of x @ inputs + h @ hidden + bias
      c <- f c + i g,   h <- o tanh(c)

  >>> one = Direction(jnp.zeros((2, 12)), jnp.zeros((3, 12)), jnp.zeros(12))
  >>> one(jnp.ones((5, 2))).shape
  (5, 3)
  """

  inputs: Any  # [D, 4 H]
  hidden: Any  # [H, 4 H]
  bias: Any  # [4 H]

  def __call__(self, x: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Returns the states h of all places of x [P, D], [P, H]."""
    zero = jnp.zeros(self.hidden.shape[0], x.dtype)

    def step(carry, now):
      h, c = carry
      i, f, g, o = jnp.split(now + h @ self.hidden, 4)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return (h, c), h

    now = x @ self.inputs + self.bias
    return jax.lax.scan(step, (zero, zero), now, reverse=reverse)[1]


class Encoded(NamedTuple):
  """The soft prompt of P-tuning: an encoder of trained rows.

  Liu et al. 2021, arXiv 2103.10385, section 3.2:

      P = mlp(lstm(rows))   with a bidirectional LSTM of one or more layers
      P = mlp(rows)         without one, as PEFT does by default

  where the mlp has a ReLU between its layers.

  >>> layer = Affine(2 * jnp.eye(3), jnp.zeros(3))
  >>> Encoded(jnp.ones((2, 3)), (layer,)).plain().rows.tolist()[0]
  [2.0, 2.0, 2.0]
  """

  rows: Any  # [P, D]
  mlp: tuple[Affine, ...]
  lstm: tuple[tuple[Direction, Direction], ...] = ()  # forward, backward

  PLACES = ('inputs',)
  FROZEN = ()

  def plain(self) -> Prompt:
    x = self.rows
    for ahead, back in self.lstm:
      x = jnp.concatenate([ahead(x), back(x, reverse=True)], axis=-1)
    for layer in self.mlp[:-1]:
      x = jax.nn.relu(layer(x))
    return Prompt(self.mlp[-1](x))

  def peft(self) -> Peft:
    kind = 'LSTM' if self.lstm else 'MLP'
    inner = self.mlp[0].bias if not self.lstm else self.lstm[0][0].hidden
    fields = {
      'encoder_dropout': 0.0,
      'encoder_hidden_size': jnp.shape(inner)[0],
      'encoder_num_layers': len(self.lstm) or 2,
      'encoder_reparameterization_type': kind,
    }
    rows = self.plain().rows
    return Peft(None, kind='P_TUNING', values=rows, fields=fields)


class Projected(NamedTuple):
  """A prefix that two layers compute from trained rows, for all L layers.

  Li and Liang 2021, arXiv 2101.00190, section 4.3:

      [keys_l, values_l] = tanh(rows @ W + b) @ V_l + c_l

  Its place is the generator (`nodes.protocol`).

  >>> last = Affine(jnp.zeros((2, 5, 8)), jnp.ones((2, 8)))
  >>> node = Projected(jnp.ones((3, 4)), Affine(jnp.ones((4, 5)), 0.0), last)
  >>> node.generate()['layers']['self_attn']['prefix'].keys.shape
  (2, 3, 4)
  """

  rows: Any  # [P, E]
  inner: Affine  # [E, H]
  last: Affine  # [L, H, 2 F], [L, 2 F]

  PLACES = ('generator',)
  FROZEN = ()

  def generate(self) -> dict[str, Any]:
    inner = jnp.tanh(self.inner(self.rows))
    both = jnp.einsum('ph,lhf->lpf', inner, self.last.kernel)
    both = both + self.last.bias[:, None]
    keys, values = jnp.split(both, 2, axis=-1)
    return {'layers': {'self_attn': {'prefix': Prefix(keys, values)}}}
