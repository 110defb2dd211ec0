"""What an adapter's leaves say about the weights beside them.

LowRank(a, b, scale)    W + scale * a @ b
an array                W + array
Dense(value)            value: it takes the place of W
Dora(direction, m)      the direction of W + scale * a @ b, of the length m

Experts                 no change of W at all: it depends on the token

Any other named tuple with a method `factors() -> LowRank` acts as those
factors do. Fields that nobody trains are named by its attribute `FROZEN`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import Base, Error, Experts, LowRank, Params


class Dense(NamedTuple):
  """A weight that is trained whole, as the head of a classifier.

  >>> Dense(jnp.ones(2)).value.shape
  (2,)
  """

  value: Any


class Dora(NamedTuple):
  """W' = m V / ||V||, V = W + scale * a @ b: see `dora`.

  >>> node = Dora(LowRank(None, None, None), magnitude=jnp.ones(3))
  >>> node.magnitude.shape
  (3,)
  """

  direction: LowRank
  magnitude: Any  # m [..., F]


class Amended(NamedTuple):
  """A quantised weight, which nothing can be written into, and what is added.

  The change stays a matrix of its own in the base: x @ weight + x @ change.
  """

  weight: Any  # has a `qvalue`
  change: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


def add(weight: Any, delta: Any) -> Any:
  """The weight with a dense change written in, or beside it if quantised."""
  if isinstance(weight, Amended):
    return weight._replace(change=weight.change + delta)
  if hasattr(weight, 'qvalue'):
    return Amended(weight, jnp.asarray(delta))
  return (weight + delta).astype(weight.dtype)


def factors(leaf: Any) -> LowRank | None:
  """The factors of a leaf that is a low-rank change, whatever its parts are."""
  if isinstance(leaf, LowRank):
    return leaf
  found = getattr(leaf, 'factors', None)
  return None if found is None else found()


def is_node(leaf: Any) -> bool:
  """Whether a leaf says something about a whole matrix through its parts."""
  known = isinstance(leaf, LowRank | Dora | Experts)
  return known or hasattr(leaf, 'factors')


def as_low_rank(params: Params) -> Params:
  """Every node that acts as factors, as those factors.

  >>> from fedjax_llm.adapters.low_rank import lora
  >>> base = {'q': {'kernel': jnp.ones((4, 3))}}
  >>> params = lora(rank=2, targets=['q']).init(jax.random.key(0), base)
  >>> as_low_rank(params)['q'] is params['q']  # LoRA is factors already
  True
  """

  def node(x):
    found = factors(x)
    return x if found is None else found

  return jax.tree.map(node, params, is_leaf=is_node)


def gain(weight: jax.Array, node: Dora) -> jax.Array:
  """m / ||W + scale * a @ b|| for each output feature, [..., F].

  Through products with the factors, so that clients in a `vmap` share W: the
  matrix of none of them is ever formed. The norm has no gradient.
  """
  highest = jax.lax.Precision.HIGHEST
  dot = lambda x, y: jnp.matmul(x, y, precision=highest)
  a, b, scale, residual = node.direction
  wide = weight.astype(jnp.float32)
  if residual is not None:
    wide = wide + residual
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  b = b * scale[..., None, None]
  across = jnp.swapaxes(a, -1, -2)
  cross = 2 * dot(across, wide) + dot(dot(across, a), b)
  square = jnp.sum(jnp.square(wide), -2) + jnp.sum(b * cross, -2)
  norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
  return node.magnitude / jax.lax.stop_gradient(norm)


def product(leaf: Any) -> jax.Array:
  """The change of the weight, scale * a @ b + residual: [..., D, F].

  >>> a, b = jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)
  >>> node = LowRank(a, b, jnp.float32(5))
  >>> product(node).tolist()
  [[30.0]]
  """
  node = factors(leaf)
  assert node is not None
  delta = jnp.matmul(node.a, node.b, precision=jax.lax.Precision.HIGHEST)
  delta = delta * node.scale[..., None, None]
  return delta if node.residual is None else delta + node.residual


def merge(base: Base, params: Params) -> Base:
  """The base with every change written into its weights.

  Raises:
    Error: experts, whose change depends on the token.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.ones((1, 2, 2))}}}
  >>> node = LowRank(jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2)), jnp.ones(1))
  >>> merge(base, {'layers': {'q_proj': node}})['layers']['q_proj']['kernel']
  Array([[[2., 2.],
          [2., 2.]]], dtype=float32)
  >>> head = {'score': {'kernel': jnp.ones((2, 1)), 'bias': jnp.ones(1)}}
  >>> merge(head, {'score': {'bias': Dense(jnp.zeros(1))}})['score']['bias']
  Array([0.], dtype=float32)
  """

  def written(weight, leaf):
    if isinstance(leaf, Dense):
      return weight if leaf.value is None else leaf.value.astype(weight.dtype)
    if isinstance(leaf, Experts):
      raise Error(
        'which experts act depends on the token, so they cannot be written '
        'into a weight: what everybody is served has the shared expert alone.'
      )
    if isinstance(leaf, Dora):
      turned = (weight + product(leaf.direction)) * gain(weight, leaf)[
        ..., None, :
      ]
      return turned.astype(weight.dtype)
    return add(weight, leaf if factors(leaf) is None else product(leaf))

  return _write(base, params, written)


def fold(base: Base, params: Params) -> tuple[Base, Params]:
  """Moves the residuals into the base: done once a round, outside `vmap`.

  >>> one = jnp.ones((1, 1))
  >>> node = LowRank(one, one, scale=1.0, residual=4 * one)
  >>> base, params = fold({'q': {'kernel': one}}, {'q': node})
  >>> base['q']['kernel'].tolist(), params['q'].residual
  ([[5.0]], None)
  """

  def written(weight, leaf):
    leaf = leaf.direction if isinstance(leaf, Dora) else leaf
    leaf = leaf.shared if isinstance(leaf, Experts) else leaf
    if not isinstance(leaf, LowRank) or leaf.residual is None:
      return weight
    return add(weight, leaf.residual)

  is_low_rank = lambda x: isinstance(x, LowRank)
  bare = jax.tree.map(
    lambda x: x._replace(residual=None) if is_low_rank(x) else x,
    params,
    is_leaf=is_low_rank,
  )
  return _write(base, params, written), bare


def overlay(base: Base, params: Params) -> tuple[Base, Params]:
  """Puts every `Dense` leaf in the place of its weight, and out of the params.

  For the forward pass: low-rank leaves stay beside their weights.

  Raises:
    Error: a leaf that has no weight of its shape in the base.

  >>> base, params = {'bias': jnp.ones(2)}, {'bias': Dense(jnp.zeros(2))}
  >>> overlay(base, params)
  ({'bias': Array([0., 0.], dtype=float32)}, {'bias': None})
  """
  found = []

  def take(path, leaf):
    if not isinstance(leaf, Dense):
      return leaf
    if leaf.value is not None:
      found.append((tuple(key.key for key in path), leaf.value))
    return None

  is_leaf = lambda x: isinstance(x, LowRank | Dense)
  rest = jax.tree_util.tree_map_with_path(take, params, is_leaf=is_leaf)
  for path, value in found:
    base = _put(base, path, path, value)
  return base, rest


def _put(base: Any, path: tuple, left: tuple, value: Any) -> Any:
  if not left:
    if getattr(base, 'shape', None) != value.shape:
      raise Error(
        f'The adapter has {list(value.shape)} at {"/".join(path)}, but the '
        f'model has {list(getattr(base, "shape", []))} there.'
      )
    return value
  if not isinstance(base, Mapping) or left[0] not in base:
    raise Error(f'The adapter has {"/".join(path)}, which the model lacks.')
  return {**base, left[0]: _put(base[left[0]], path, left[1:], value)}


# Of a module, the weight that a leaf without a name is about.
_MAIN = ('kernel', 'scale', 'embedding')


def _write(base: Any, params: Any, written: Callable[[Any, Any], Any]) -> Any:
  """`written(weight, leaf)` in the place of every weight beside a leaf."""
  if params is None:
    return base
  if isinstance(params, Mapping):
    below = {n: _write(base[n], params[n], written) for n in params}
    return {**base, **below}
  if isinstance(base, Mapping):
    main = next(name for name in _MAIN if name in base)
    return {**base, main: written(base[main], params)}
  return written(base, params)
