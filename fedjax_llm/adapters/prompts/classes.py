"""Adapters of a dual encoder that classifies images by names of classes.

Each builder returns an `Adapter` with one node at 'scores' (`nodes.scores`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.made import Attended
from fedjax_llm.nodes.prompt_experts import Heads, PromptExperts
from fedjax_llm.nodes.prompt_groups import PromptGroups
from fedjax_llm.nodes.scores import (
  Context,
  Domains,
  Generated,
  Reweighted,
  Visual,
)
from fedjax_llm.nodes.visual_pool import GrowingPool, VisualPool
from fedjax_llm.types import Adapter, Base, Error, Key

# Of rows and queries, as in CoOp and in all methods here.
_SPREAD = 0.02


def context(length: int = 16, spread: float = _SPREAD) -> Adapter:
  """Returns `length` trained rows in front of every class name.

  Zhou et al. 2022, arXiv 2109.01134 (CoOp), one context for all classes with
  the class name at the end. See `nodes.Context`.

  Args:
    length: P; each row takes one of the text tower's positions.
    spread: the standard deviation of the start.

  Raises:
    Error: a length below one; from `init`, a base without two towers.

  >>> start = lambda: context(2).init(jax.random.key(0), sizes(4, 3, 2))
  >>> jax.eval_shape(start)['scores'].rows.shape
  (2, 4)
  """
  draws.at_least(length=length)

  def start(key: Key, base: Base):
    rows = _normal(key, spread, length, text_width(base))
    return {'scores': Context(rows)}

  return Adapter(start, merge, fold)


def visual_prompt(length: int = 8, spread: float = _SPREAD) -> Adapter:
  """Returns `length` trained rows among the patches of every image.

  Jia et al. 2022, arXiv 2203.12119 (VPT-shallow). See `nodes.Visual`.

  Args:
    length: P.
    spread: the standard deviation of the start.

  Raises:
    Error: a length below one; from `init`, a base without two towers.

  >>> start = lambda: visual_prompt(2).init(jax.random.key(0), sizes(4, 3, 2))
  >>> jax.eval_shape(start)['scores'].rows.shape
  (2, 3)
  """
  draws.at_least(length=length)

  def start(key: Key, base: Base):
    rows = _normal(key, spread, length, _kernel(base, 'visual').shape[0])
    return {'scores': Visual(rows)}

  return Adapter(start, merge, fold)


def feature_attention() -> Adapter:
  """Returns an adapter that weights the features of images.

  Lu et al. 2023, arXiv 2302.13485 (FedCLIP). See `nodes.Reweighted`. Both
  layers start uniform in +-1 / sqrt(E), PyTorch's default.

  Raises:
    Error: from `init`, a base without two towers.

  >>> start = lambda: feature_attention().init(
  ...   jax.random.key(0), sizes(4, 3, 2))
  >>> jax.eval_shape(start)['scores'].first.kernel.shape
  (2, 2)
  """

  def start(key: Key, base: Base):
    size, keys = features(base), jax.random.split(key)
    return {'scores': Reweighted(*(draws.affine(k, size, size) for k in keys))}

  return Adapter(start, merge, fold)


def generated_context(
  length: int = 4, heads: int = 4, expansion: int = 4
) -> Adapter:
  """Returns a network that makes a context from the names of the classes.

  Qiu et al. 2024, arXiv 2310.06123 (FedTPG). See `nodes.Generated` and
  `nodes.Attended`; keys and values read E features of a class name. The network
  is trained and sent; it works on any list of classes.

  Args:
    length: P, the number of queries and rows.
    heads: H, which divides the width of the text tower.
    expansion: M / D of the perceptron.

  Raises:
    Error: a size below one; from `init`, heads that do not divide the width, a
      base without two towers.

  >>> start = lambda: generated_context(3, 2).init(
  ...   jax.random.key(0), sizes(4, 3, 2))
  >>> jax.eval_shape(start)['scores'].net.key.shape
  (2, 2, 2)
  """
  draws.at_least(length=length, heads=heads, expansion=expansion)

  def start(key: Key, base: Base):
    width, size = text_width(base), features(base)
    if width % heads:
      raise Error(
        f'adapter.heads is {heads}, which does not divide the {width} features '
        'of the text tower.'
      )
    keys, inner = jax.random.split(key, 7), expansion * width
    part = lambda key, size: draws.uniform(
      key, (heads, size, width // heads), size**-0.5
    )
    norm = lambda size: Affine(jnp.ones(size), jnp.zeros(size))
    net = Attended(
      queries=_normal(keys[0], _SPREAD, length, width),
      query=part(keys[1], width),
      key=part(keys[2], size),
      value=part(keys[3], size),
      out=draws.affine(keys[4], width, width),
      inner=draws.affine(keys[5], width, 2 * inner),
      last=draws.affine(keys[6], inner, width),
      norms=(norm(width), norm(size), norm(width)),
    )
    return {'scores': Generated(net)}

  return Adapter(start, merge, fold)


def domain_context(
  length: int = 16, num_classes: int = 2, temperature: float = 0.01
) -> Adapter:
  """Returns the part of FedAPT without clients: a context for each class.

  Su et al. 2024, arXiv 2211.07864. `recipes.fed_apt` adds the clients' keys and
  the query. See `nodes.Domains`.

  Args:
    length: P.
    num_classes: C of the task.
    temperature: of the clients' shares of an image; to 0: only the nearest.

  Raises:
    Error: a size below one, a temperature that is not above 0; from `init`, a
      base without two towers.

  >>> start = lambda: domain_context(2, 5).init(
  ...   jax.random.key(0), sizes(4, 3, 2))
  >>> node = jax.eval_shape(start)['scores']
  >>> node.meta.shape, node.query.shape
  ((5, 2, 4), (2, 0))
  """
  draws.at_least(length=length, num_classes=num_classes)
  if temperature <= 0:
    raise Error(f'adapter.temperature is {temperature}; it must be above 0.')

  def start(key: Key, base: Base):
    width = text_width(base)
    node = Domains(
      meta=_normal(key, _SPREAD, num_classes, length, width),
      query=jnp.zeros((features(base), 0)),
      keys=jnp.zeros((0, length, width)),
      temperature=jnp.float32(temperature),
    )
    return {'scores': node}

  return Adapter(start, merge, fold)


def gated_context(length: int = 16, size: int = 128, heads: int = 8) -> Adapter:
  """Returns a context with a gate to contexts of others, still without others.

  Luo et al. 2025, arXiv 2410.10114 (pFedMoAP). `recipes.p_fed_moap` adds the
  others. See `nodes.PromptExperts`. The layers start uniform in +-1 / sqrt(d).

  Args:
    length: P.
    size: d of the gate, a divisor of the E features of the towers.
    heads: H, a divisor of d.

  Raises:
    Error: a size below one, heads that do not divide the size; from `init`, a
      size that does not divide E, a base without two towers.

  >>> start = lambda: gated_context(2, 2, 1).init(
  ...   jax.random.key(0), sizes(4, 3, 6))
  >>> jax.eval_shape(start)['scores'].heads.query.shape
  (2, 1, 2)
  """
  draws.at_least(length=length, size=size, heads=heads)
  if size % heads:
    raise Error(
      f'adapter.heads is {heads}, which does not divide adapter.size={size}.'
    )

  def start(key: Key, base: Base):
    common = features(base)
    if common % size:
      raise Error(
        f'adapter.size is {size}, which does not divide the {common} features '
        'of the towers.'
      )
    keys, each = jax.random.split(key, 9), size // heads
    part = lambda i, *shape: draws.uniform(keys[i], shape, size**-0.5)
    inner = (part(2 * i, size, heads, each) for i in range(3))
    biases = (part(2 * i + 1, heads, each) for i in range(3))
    layers = [x for pair in zip(inner, biases) for x in pair]
    gate = Heads._make([*layers, part(6, heads, each, size), part(7, size)])
    width = text_width(base)
    node = PromptExperts(
      rows=_normal(keys[8], _SPREAD, length, width),
      others=jnp.zeros((0, length, width)),
      present=jnp.zeros(0),
      heads=gate,
      share=jnp.float32(0.5),
    )
    return {'scores': node}

  return Adapter(start, merge, fold)


def prompt_groups(
  groups: int = 5,
  length: int = 2,
  image_length: int = 2,
  spread: float = _SPREAD,
) -> Adapter:
  """Returns pairs of a context of class names and a prompt of images.

  Bo et al. 2025, arXiv 2511.00480 (FedMGP): 5 groups of 2 and 2 rows. See
  `nodes.PromptGroups`. One group is a context with a visual prompt.

  Args:
    groups: G.
    length: P, rows in front of every class name.
    image_length: Q, rows among the patches of every image.
    spread: the standard deviation of the start.

  Raises:
    Error: a size below one; from `init`, a base without two towers.

  >>> start = lambda: prompt_groups(3, 2).init(
  ...   jax.random.key(0), sizes(4, 5, 2))
  >>> node = jax.eval_shape(start)['scores']
  >>> node.rows.shape, node.visual.shape
  ((3, 2, 4), (3, 2, 5))
  """
  draws.at_least(groups=groups, length=length, image_length=image_length)

  def start(key: Key, base: Base):
    keys, width = jax.random.split(key), _kernel(base, 'visual').shape[0]
    node = PromptGroups(
      rows=_normal(keys[0], spread, groups, length, text_width(base)),
      visual=_normal(keys[1], spread, groups, image_length, width),
      share=jnp.full(groups, 1 / groups),
    )
    return {'scores': node}

  return Adapter(start, merge, fold)


def visual_pool(
  size: int = 10, length: int = 8, num_classes: int = 2
) -> Adapter:
  """Returns a pool of visual prompts with keys, and a classifier's head.

  Halbe et al. 2023, arXiv 2306.09970 (HePCo). See `nodes.VisualPool`. Prompts
  and keys start uniform in 0..1, as in the authors' program; the sizes are
  ours.

  Args:
    size: N, the number of prompts.
    length: Q, rows among the patches of every image.
    num_classes: C of the task.

  Raises:
    Error: a size below one; from `init`, a base without two towers.

  >>> start = lambda: visual_pool(3, 2, 5).init(
  ...   jax.random.key(0), sizes(4, 6, 2))
  >>> node = jax.eval_shape(start)['scores']
  >>> node.rows.shape, node.keys.shape, node.head.kernel.shape
  ((3, 2, 6), (3, 2), (2, 5))
  """
  draws.at_least(size=size, length=length, num_classes=num_classes)

  def start(key: Key, base: Base):
    keys, width = jax.random.split(key, 3), _kernel(base, 'visual').shape[0]
    node = VisualPool(
      rows=jax.random.uniform(keys[0], (size, length, width)),
      keys=jax.random.uniform(keys[1], (size, features(base))),
      head=draws.affine(keys[2], features(base), num_classes),
    )
    return {'scores': node}

  return Adapter(start, merge, fold)


def growing_pool(
  size: int = 100, length: int = 8, num_classes: int = 2, num_tasks: int = 10
) -> Adapter:
  """Returns a pool whose prompts become active task by task.

  Smith et al. 2023, arXiv 2211.13218 (CODA-Prompt); Bagwe et al. 2023, arXiv
  2307.04869 (Fed-CPrompt). See `nodes.GrowingPool`. Prompts, keys and attention
  start uniform in 0..1, as in the authors' program without a penalty of
  orthogonality. The first size / num_tasks prompts are active.

  Args:
    size: N, the number of prompts.
    length: Q, rows among the patches of every image.
    num_classes: C of the task.
    num_tasks: a divisor of N.

  Raises:
    Error: a size below one, tasks that do not divide the prompts; from `init`,
      a base without two towers.

  >>> start = lambda: growing_pool(6, 2, 5, 3).init(
  ...   jax.random.key(0), sizes(4, 6, 2))
  >>> node = jax.eval_shape(start)['scores']
  >>> node.rows.shape, node.attention.shape, node.head.kernel.shape
  ((6, 2, 6), (6, 2), (2, 5))
  """
  draws.at_least(
    size=size, length=length, num_classes=num_classes, num_tasks=num_tasks
  )
  if size % num_tasks:
    raise Error(
      f'adapter.num_tasks is {num_tasks}, which does not divide '
      f'adapter.size={size}.'
    )

  def start(key: Key, base: Base):
    keys, common = jax.random.split(key, 4), features(base)
    width = _kernel(base, 'visual').shape[0]
    draw = lambda i, *shape: jax.random.uniform(keys[i], (size, *shape))
    node = GrowingPool(
      rows=draw(0, length, width),
      keys=draw(1, common),
      attention=draw(2, common),
      head=draws.affine(keys[3], common, num_classes),
      active=jnp.int32(size // num_tasks),
    )
    return {'scores': node}

  return Adapter(start, merge, fold)


def sizes(text: int, image: int, common: int) -> Base:
  """Returns the projections of a dual encoder of these widths, all ones.

  >>> text_width(sizes(4, 3, 2)), features(sizes(4, 3, 2))
  (4, 2)
  """
  one = lambda width: {'kernel': jnp.ones((width, common))}
  return {'text_projection': one(text), 'visual_projection': one(image)}


def text_width(base: Base) -> int:
  """Returns D of the text tower, the width of its token embeddings.

  >>> text_width(sizes(4, 3, 2))
  4
  """
  return _kernel(base, 'text').shape[0]


def features(base: Base) -> int:
  """Returns E, the number of features that both towers share.

  >>> features(sizes(4, 3, 2))
  2
  """
  return _kernel(base, 'text').shape[1]


def _kernel(base: Base, tower: str) -> Any:
  kernel = base.get(f'{tower}_projection', {}).get('kernel')
  if kernel is None:
    raise Error(
      f'the model has no {tower}_projection: this adapter is for a dual '
      'encoder of images and texts.'
    )
  return kernel


def _normal(key: Key, spread: float, *shape: int) -> jax.Array:
  return spread * jax.random.normal(key, shape, jnp.float32)
