"""The adapter of C2A: bottlenecks that depend on classes and texts.

`c2a` returns an `Adapter`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.bottleneck import kernel_of
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts.draws import affine, at_least
from fedjax_llm.nodes.customised import Customised
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def c2a(
  size: int = 16,
  embedding: int = 8,
  factors: int = 32,
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns bottlenecks that one network makes from classes and texts.

  See `nodes.Customised` (Kim et al. 2023, Findings of ACL). Sizes and start are
  those of the authors' program: lower and higher normal with deviation 0.01,
  embeddings of layers normal, the two layers of classes and texts uniform in
  +-1 / sqrt of their inputs, biases zero, the classes uniform. The adapted
  model does not start as the base. It is for encoders that classify: a causal
  model would see the tokens that it predicts.

  Args:
    size: R, the features of the bottleneck.
    embedding: E, the size of the embeddings.
    factors: C, the rank of the network's matrix.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one; from `init`, a model without a classifier or
      without layers of this kind.

  >>> kernel = {'kernel': jnp.ones((2, 6, 6))}
  >>> base = {'layers': {'mlp': {'down_proj': kernel},
  ...                    'self_attn': {'o_proj': kernel}},
  ...         'classifier': {'kernel': jnp.ones((6, 3))}}
  >>> node = c2a(4, 5, 2).init(jax.random.key(0), base)['generator']
  >>> node.lower.shape, node.labels.shape
  ((20, 2), (3,))
  """
  at_least(size=size, embedding=embedding, factors=factors)

  def start(key: Key, base: Base) -> Params:
    number, _, width = kernel_of(base, 'mlp', 'down_proj').shape
    kernel_of(base, 'self_attn', 'o_proj')
    classes = num_classes(base)
    keys = jax.random.split(key, 5)
    small = lambda i, *shape: 0.01 * jax.random.normal(keys[i], shape)
    node = Customised(
      lower=small(0, embedding * size, factors),
      higher=small(1, factors, width),
      bias=jnp.zeros(size * width),
      layer=jax.random.normal(keys[2], (number, embedding)),
      classes=affine(keys[3], classes, embedding),
      text=affine(keys[4], width, embedding),
      down_bias=jnp.zeros(size),
      up_bias=jnp.zeros(width),
      labels=jnp.full(classes, 1 / classes),
    )
    return {'generator': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def num_classes(base: Base) -> int:
  """Returns the number of classes of a classifier's head.

  Raises:
    Error: the model has none.

  >>> num_classes({'classifier': {'kernel': jnp.ones((6, 3))}})
  3
  """
  head: Any = base.get('classifier', {})
  if 'kernel' not in head:
    raise Error(
      'adapter.name=c2a reads the distribution of classes, and the model has '
      'no classifier: set task.name=classification.'
    )
  return head['kernel'].shape[-1]
