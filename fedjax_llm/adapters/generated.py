"""Bottlenecks of shared parameters, and gates of features.

`hyper_adapter` (a hypernetwork of all layers), `compacter` (sums of Kronecker
products) and `feature_gate` return an `Adapter`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.bottleneck import activation_of, kernel_of
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts.draws import affine, at_least
from fedjax_llm.nodes.gate import Gate
from fedjax_llm.nodes.made import Factored, Hyper, Kronecker
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def hyper_adapter(
  size: int = 16,
  embedding: int = 8,
  activation: str = 'relu',
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns bottlenecks of all layers from one hypernetwork.

      down_l = reshape((client + layer_l) @ D),   up_l = (client + layer_l) @ U

  See `nodes.Hyper` (Karimi Mahabadi et al. 2021, arXiv 2106.04489). The
  embeddings start normal, D with entries of variance 1 / (E F), U at zero: the
  adapted model starts as the base. 2 E F R + (L + 1) E numbers are trained.

  Args:
    size: R, the features of the bottleneck.
    embedding: E, the size of the embeddings.
    activation: see `bottleneck`.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one, an unknown activation; from `init`, a model without
      layers of this kind.

  >>> kernel = jnp.ones((2, 6, 4))
  >>> base = {'layers': {'mlp': {'down_proj': {'kernel': kernel}}}}
  >>> node = hyper_adapter(3, 5).init(jax.random.key(0), base)['generator']
  >>> node.layer.shape, node.down.shape
  ((2, 5), (5, 4, 3))
  """
  at_least(size=size, embedding=embedding)
  kind = activation_of(activation)

  def start(key: Key, base: Base) -> Params:
    number, _, width = kernel_of(base, 'mlp', 'down_proj').shape
    one, two, three = jax.random.split(key, 3)
    node = Hyper(
      client=jax.random.normal(one, (embedding,)),
      layer=jax.random.normal(two, (number, embedding)),
      down=jax.random.normal(three, (embedding, width, size))
      * (embedding * width) ** -0.5,
      up=jnp.zeros((embedding, size, width), jnp.float32),
      activation=kind,
    )
    return {'generator': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def compacter(
  size: int = 16,
  num: int = 4,
  rank: int = 1,
  form: Literal['houlsby', 'pfeiffer'] = 'houlsby',
  activation: str = 'gelu_tanh',
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns Compacter: bottlenecks of sums of Kronecker products.

      W_l = sum_{i <= n} A_i (x) (s_li t_li)

  See `nodes.Kronecker` (Karimi Mahabadi et al. 2021, arXiv 2106.04647). A is
  normal with variance 1 / n, the factors of `down` are uniform in +-1 / sqrt of
  their inputs, and t of `up` and the biases are zero: the adapted model starts
  as the base.

  Args:
    size: R, the features of the bottleneck.
    num: n, which divides R and the width of the model.
    rank: r of the products s t.
    form: 'houlsby' behind attention and perceptron, as in the paper, or
      'pfeiffer' behind the perceptron.
    activation: see `bottleneck`.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one, an unknown form or activation, sides that `num`
      does not divide; from `init`, a model without layers of this kind.

  >>> kernel = jnp.ones((2, 6, 4))
  >>> base = {'layers': {'mlp': {'down_proj': {'kernel': kernel}}}}
  >>> params = compacter(6, num=2, form='pfeiffer').init(
  ...   jax.random.key(0), base)
  >>> params['generator'].places['mlp'][0].s.shape
  (2, 2, 2, 1)
  """
  at_least(size=size, num=num, rank=rank)
  if form not in ('houlsby', 'pfeiffer'):
    raise Error(f'adapter.form is {form!r}; it must be houlsby or pfeiffer.')
  kind = activation_of(activation)

  def start(key: Key, base: Base) -> Params:
    where = {'mlp': 'down_proj', 'self_attn': 'o_proj'}
    if form == 'pfeiffer':
      del where['self_attn']
    places, low, high = {}, {}, {}
    for index, (place, module) in enumerate(where.items()):
      number, _, width = kernel_of(base, place, module).shape
      if size % num or width % num:
        raise Error(
          f'adapter.num is {num}, which does not divide adapter.size={size} '
          f'and the {width} features of the model.'
        )
      keys = jax.random.split(jax.random.fold_in(key, index), 3)
      draw = lambda key, d, f, number=number: jax.random.uniform(
        key, (number, num, d, f), jnp.float32, -(d**-0.5), d**-0.5
      )
      places[place] = (
        Factored(
          draw(keys[0], width // num, rank), draw(keys[1], rank, size // num)
        ),
        Factored(
          draw(keys[2], size // num, rank),
          jnp.zeros((number, num, rank, width // num), jnp.float32),
        ),
      )
      low[place] = jnp.zeros((number, size), jnp.float32)
      high[place] = jnp.zeros((number, width), jnp.float32)
    rule = jax.random.normal(jax.random.fold_in(key, 2), (num, num, num))
    node = Kronecker(rule * num**-0.5, places, low, high, kind)
    return {'generator': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def feature_gate(
  size: int = 16,
  module: str = 'mlp/down_proj',
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns gates of the features behind a module, in every layer.

      y' = y * softmax(tanh(y W1 + b1) W2 + b2)

  See `nodes.Gate` (FedCLIP, Lu et al. 2023, arXiv 2302.13485). The gated model
  does not start as the base: its features get weights that sum to one.

  Args:
    size: R, the features between the layers.
    module: a module of the layers.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one; from `init`, a model without this module.

  >>> kernel = jnp.ones((2, 6, 4))
  >>> base = {'layers': {'mlp': {'down_proj': {'kernel': kernel}}}}
  >>> params = feature_gate(3).init(jax.random.key(0), base)
  >>> params['layers']['mlp']['down_proj']['output'].inner.kernel.shape
  (2, 4, 3)
  """
  at_least(size=size)

  def start(key: Key, base: Base) -> Params:
    path = module.split('/')
    *lead, _, width = kernel_of(base, *path).shape
    one, two = jax.random.split(key)
    inner = affine(one, width, size, *lead)
    tree: Any = {'output': Gate(inner, affine(two, size, width, *lead))}
    for name in reversed(path):
      tree = {name: tree}
    return {'layers': tree}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)
