"""Soft prompts from few or shared parameters, and pools of prompts.

`projected_prompt`, `generated_prompt`, `prompt_pool` and `grouped_prompt`
return an `Adapter`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.grouped import Grouped
from fedjax_llm.nodes.made import Attended, LowDimensional
from fedjax_llm.nodes.pool import Pool, unit
from fedjax_llm.types import Adapter, Base, Error, Key, Params

Modules = str | list[str] | tuple[str, ...]


def projected_prompt(
  length: int = 16,
  dimension: int = 500,
  scale: float = 1.0,
  modules_to_save: Modules = (),
) -> Adapter:
  """Returns a soft prompt of `dimension` trained numbers in a random subspace.

      P = P0 + reshape(z @ A)

  Sun et al. 2022, arXiv 2201.03514. P0 are the embeddings of random tokens, the
  entries of A are normal with standard deviation scale / sqrt(dimension) from
  the run's seed, and z starts at zero. Only z is trained and sent.

  Args:
    length: P, the number of rows.
    dimension: d, the size of z.
    scale: the standard deviation of a row's change for a z of normal entries.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one.

  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> node = projected_prompt(3, 7).init(jax.random.key(0), base)['inputs']
  >>> node.z.shape, node.basis.shape, node.plain().rows.shape
  ((7,), (7, 12), (3, 4))
  """
  draws.at_least(length=length, dimension=dimension)

  def start(key: Key, base: Base) -> Params:
    table, keys = draws.embedding(base), jax.random.split(key)
    tokens = jax.random.randint(keys[0], (length,), 0, table.shape[0])
    basis = jax.random.normal(keys[1], (dimension, length * table.shape[1]))
    node = LowDimensional(
      z=jnp.zeros(dimension, jnp.float32),
      basis=basis * (scale / dimension**0.5),
      start=table[tokens].astype(jnp.float32),
    )
    return {'inputs': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def generated_prompt(
  length: int = 4,
  heads: int = 4,
  expansion: int = 4,
  num_client_rows: int = 0,
  modules_to_save: Modules = (),
  *,
  context: Any = None,
) -> Adapter:
  """Returns a prompt that a network computes from embeddings of classes.

  See `nodes.Attended` (FedTPG, Qiu et al. 2024, arXiv 2310.06123). Queries are
  normal with standard deviation 0.02; the network is trained and sent.

  Args:
    length: P, the number of queries and of rows.
    heads: H, which divides the width of the model.
    expansion: M / D of the perceptron.
    num_client_rows: trained rows of the context, which a scope may keep with
      the client as its descriptor.
    modules_to_save: see `lora`.
    context: [C, D], frozen rows such as embeddings of class names.

  Raises:
    Error: a size below one; from `init`, heads that do not divide the width, or
      no context at all.

  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> params = generated_prompt(3, 2, num_client_rows=2).init(
  ...   jax.random.key(0), base)
  >>> params['inputs'].plain().rows.shape
  (3, 4)
  """
  draws.at_least(length=length, heads=heads, expansion=expansion)

  def start(key: Key, base: Base) -> Params:
    width = draws.embedding(base).shape[1]
    if width % heads:
      raise Error(
        f'adapter.heads is {heads}, which does not divide the {width} features '
        'of the model.'
      )
    if context is None and not num_client_rows:
      raise Error(
        'a generated prompt needs a context: pass context=..., or set '
        'adapter.num_client_rows.'
      )
    keys, inner = jax.random.split(key, 8), expansion * width
    part = lambda key: draws.uniform(
      key, (heads, width, width // heads), width**-0.5
    )
    norm = lambda: Affine(jnp.ones(width), jnp.zeros(width))
    client = None
    if num_client_rows:
      client = jax.random.normal(keys[7], (num_client_rows, width))
    node = Attended(
      queries=0.02 * jax.random.normal(keys[0], (length, width)),
      query=part(keys[1]),
      key=part(keys[2]),
      value=part(keys[3]),
      out=draws.affine(keys[4], width, width),
      inner=draws.affine(keys[5], width, 2 * inner),
      last=draws.affine(keys[6], inner, width),
      norms=(norm(), norm(), norm()),
      context=None if context is None else jnp.asarray(context, jnp.float32),
      client=client,
    )
    return {'inputs': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def prompt_pool(
  length: int = 5,
  size: int = 10,
  top: int = 5,
  modules_to_save: Modules = (),
) -> Adapter:
  """Returns a pool of `size` prompts, of which each text takes the `top` best.

  See `nodes.Pool` (L2P, Wang et al. 2022, arXiv 2112.08654). Rows and keys
  start uniform in [0, 0.01]. Keys get gradients only from a loss on
  `nodes.Choice`.

  Args:
    length: P, the rows of one prompt; a text has top * length rows in front.
    size: N, the number of prompts.
    top: K, the number that a text takes.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one, or a `top` above `size`.

  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> node = prompt_pool(2, size=6, top=3).init(jax.random.key(0), base)
  >>> node['inputs'].rows.shape, node['inputs'].length()
  ((6, 2, 4), 6)
  """
  draws.at_least(length=length, size=size, top=top)
  if top > size:
    raise Error(f'adapter.top is {top}, above the {size} prompts of the pool.')

  def start(key: Key, base: Base) -> Params:
    width, keys = draws.embedding(base).shape[1], jax.random.split(key)
    draw = lambda key, *shape: jax.random.uniform(key, shape, maxval=0.01)
    node = Pool(
      rows=draw(keys[0], size, length, width),
      keys=draw(keys[1], size, width),
      top=jnp.zeros(top, jnp.int8),
    )
    return {'inputs': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def grouped_prompt(
  length: int = 4,
  size: int = 20,
  group_length: int = 1,
  modules_to_save: Modules = (),
) -> Adapter:
  """Returns a prompt of rows that texts share, and rows of their group.

  See `nodes.Grouped` (SGPT, Deng et al. 2024, arXiv 2310.18285). Shared rows
  start at zero, those of groups uniform in +-0.0625, keys of norm one and
  orthogonal (as far as D allows). Keys get gradients only from a loss on
  `nodes.Choice`.

  Args:
    length: P, the shared rows.
    size: G, the number of groups.
    group_length: Q, the rows of a group.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one.

  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> node = grouped_prompt(2, size=3).init(jax.random.key(0), base)['inputs']
  >>> node.groups.shape, (node.keys @ node.keys.T).round(3).tolist()[0]
  ((3, 1, 4), [1.0, 0.0, 0.0])
  """
  draws.at_least(length=length, size=size, group_length=group_length)

  def start(key: Key, base: Base) -> Params:
    width, keys = draws.embedding(base).shape[1], jax.random.split(key)
    made = jax.nn.initializers.orthogonal()(keys[1], (size, width))
    node = Grouped(
      shared=jnp.zeros((length, width)),
      groups=draws.uniform(keys[0], (size, group_length, width), 0.0625),
      keys=unit(made),
      share=jnp.ones(size),
    )
    return {'inputs': node}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)
