"""Prompts and bottlenecks that are computed from few or shared parameters.

`LowDimensional` and `Attended` make a soft prompt, `Hyper` and `Kronecker` the
bottlenecks of all layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.bottleneck import Activation, Bottleneck
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.prompt import Prompt


class LowDimensional(NamedTuple):
  """A soft prompt in a random subspace: P = start + reshape(z @ basis).

  Sun et al. 2022, arXiv 2201.03514: only z is trained, so that it
  can be searched without gradients; the basis is the same for all clients.

  >>> node = LowDimensional(jnp.ones(2), jnp.ones((2, 12)), jnp.zeros((3, 4)))
  >>> node.plain().rows.tolist()[0]
  [2.0, 2.0, 2.0, 2.0]
  """

  z: Any  # [d]
  basis: Any  # [d, P D]
  start: Any  # [P, D]

  PLACES = ('inputs',)
  FROZEN = ('basis', 'start')

  def plain(self) -> Prompt:
    return Prompt(self.start + (self.z @ self.basis).reshape(self.start.shape))


class Attended(NamedTuple):
  """A prompt generator: queries that attend to embeddings of classes.

  Qiu et al. 2024, arXiv 2310.06123 (FedTPG), with H heads:

      x = concat_h softmax(n(Q) Wq_h (n(C) Wk_h)^T / sqrt(d / H)) n(C) Wv_h
      x = x Wo + bo
      P = x + geglu(n(x) W1 + b1) W2 + b2,   geglu([a, b]) = a * gelu(b)

  without a residual around the attention. n is a layer norm with trained scale
  and bias; C are the frozen rows `context` and the trained rows `client`, of
  which one may be None. The queries have the width of the model.

  >>> from fedjax_llm.adapters import prompts
  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> adapter = prompts.generated_prompt(3, heads=2, context=jnp.ones((2, 4)))
  >>> adapter.init(jax.random.key(0), base)['inputs'].plain().rows.shape
  (3, 4)
  """

  queries: Any  # Q [P, D]
  query: Any  # Wq [H, D, D / H]
  key: Any  # Wk [H, D, D / H]
  value: Any  # Wv [H, D, D / H]
  out: Affine  # Wo [D, D]
  inner: Affine  # W1 [D, 2 M]
  last: Affine  # W2 [M, D]
  norms: tuple[Affine, Affine, Affine]  # scales and biases, of Q, C and x
  context: Any = None  # [C, D], frozen
  client: Any = None  # [E, D], trained

  PLACES = ('inputs',)
  FROZEN = ('context',)

  def plain(self) -> Prompt:
    return Prompt(self.made(None))

  def made(self, context: Any, present: Any = None) -> jax.Array:
    """Returns the prompt of further frozen rows, [P, D].

    `context` [E, F] stand beside `self.context` and `self.client`; it may be
    None, and `present` [E] masks rows of it out of the attention.
    """
    rows = [x for x in (context, self.context, self.client) if x is not None]
    of_q, of_c, of_x = self.norms
    queries = _normed(self.queries, of_q)
    context = _normed(jnp.concatenate(rows), of_c)
    project = lambda x, w: jnp.einsum('pd,hdk->hpk', x, w)
    q, k, v = (
      project(x, w)
      for x, w in (
        (queries, self.query), (context, self.key), (context, self.value)
      )
    )  # fmt: skip
    near = jnp.einsum('hpk,hck->hpc', q, k) * q.shape[-1] ** -0.5
    if present is not None:
      seen = jnp.pad(
        present, (0, len(context) - len(present)), constant_values=True
      )
      near = jnp.where(seen, near, -1e9)
    weights = jax.nn.softmax(near)
    x = jnp.einsum('hpc,hck->phk', weights, v)
    x = self.out(x.reshape(len(x), -1))
    a, b = jnp.split(self.inner(_normed(x, of_x)), 2, axis=-1)
    gated = a * jax.nn.gelu(b, approximate=False)
    return x + self.last(gated)


def _normed(x: jax.Array, norm: Affine) -> jax.Array:
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
  return x * norm.kernel + norm.bias


class Hyper(NamedTuple):
  """Bottlenecks of all layers from a shared hypernetwork.

  Karimi Mahabadi et al. 2021, arXiv 2106.04489, with an embedding
  of the client in the place of that of the task:

      e_l = client + layer_l,   down_l = reshape(e_l @ D),   up_l = e_l @ U

  behind the perceptron of each layer. The client's embedding is one leaf, which
  a scope may keep private.

  >>> node = Hyper(jnp.ones(2), jnp.ones((3, 2)), jnp.ones((2, 4, 5)),
  ...              jnp.zeros((2, 5, 4)))
  >>> node.generate()['layers']['mlp']['down_proj']['output'].down.shape
  (3, 4, 5)
  """

  client: Any  # [E]
  layer: Any  # [L, E]
  down: Any  # [E, F, R]
  up: Any  # [E, R, F]
  activation: Activation = Activation.RELU

  PLACES = ('generator',)
  FROZEN = ('activation',)

  def generate(self) -> dict[str, Any]:
    e = self.client + self.layer
    node = Bottleneck(
      jnp.einsum('le,efr->lfr', e, self.down),
      jnp.einsum('le,erf->lrf', e, self.up),
      activation=self.activation,
    )
    return {'layers': {'mlp': {'down_proj': {'output': node}}}}


class Factored(NamedTuple):
  """B_i = s_i t_i of a Kronecker sum, in every layer; see `Kronecker`.

  >>> one = Factored(jnp.ones((2, 4, 3, 1)), jnp.ones((2, 4, 1, 2)))
  >>> one.weight(jnp.ones((4, 4, 4))).shape
  (2, 12, 8)
  """

  s: Any  # [L, n, D / n, r]
  t: Any  # [L, n, r, F / n]

  def weight(self, rule: Any) -> jax.Array:
    """Returns sum_i rule_i (x) s_i t_i, [L, D, F]."""
    b = jnp.einsum('lidr,lirf->lidf', self.s, self.t)
    whole = jnp.einsum('iab,lidf->ladbf', rule, b)
    layers, n, d, m, f = whole.shape
    return whole.reshape(layers, n * d, m * f)


class Kronecker(NamedTuple):
  """Compacter: bottlenecks whose matrices are sums of Kronecker products.

  Karimi Mahabadi et al. 2021, arXiv 2106.04647:

      W_l = sum_{i <= n} A_i (x) (s_li t_li)

  The n matrices A_i [n, n] are shared by all layers, places and both matrices
  of a bottleneck; s and t are of each. `places` maps 'mlp' and 'self_attn' to
  the pair (down, up).

  >>> part = lambda *s: jnp.ones((3, 2, *s))
  >>> pair = Factored(part(2, 1), part(1, 1)), Factored(part(1, 1), part(1, 2))
  >>> node = Kronecker(jnp.ones((2, 2, 2)), {'mlp': pair}, {}, {})
  >>> node.generate()['layers']['mlp']['down_proj']['output'].up.shape
  (3, 2, 4)
  """

  rule: Any  # A [n, n, n]
  places: dict[str, tuple[Factored, Factored]]
  down_bias: dict[str, Any]  # [L, R]
  up_bias: dict[str, Any]  # [L, F]
  activation: Activation = Activation.GELU_TANH

  PLACES = ('generator',)
  FROZEN = ('activation',)

  def generate(self) -> dict[str, Any]:
    modules = {'mlp': 'down_proj', 'self_attn': 'o_proj'}
    layers = {}
    for place, (down, up) in self.places.items():
      node = Bottleneck(
        down.weight(self.rule),
        up.weight(self.rule),
        self.down_bias.get(place),
        self.up_bias.get(place),
        activation=self.activation,
      )
      layers[place] = {modules[place]: {'output': node}}
    return {'layers': layers}
