"""Random directions in parameter space, drawn again from their keys.

`draw` returns a direction z, `moved` a point p + c z, `combined` a point
p + sum_j c_j z_j. None of them keeps a direction that it no longer needs: a
direction costs the bytes of its key.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Error, Key, Params

DISTRIBUTIONS = ('normal', 'rademacher', 'sphere')


def check(distribution: str, who: str) -> None:
  """Raises `Error` for a distribution that `draw` does not know.

  >>> check('cube', 'two_point')
  Traceback (most recent call last):
  fedjax_llm.types.Error: two_point: distribution='cube' is none of normal, \
rademacher, sphere.
  """
  if distribution not in DISTRIBUTIONS:
    raise Error(
      f'{who}: distribution={distribution!r} is none of '
      f'{", ".join(DISTRIBUTIONS)}.'
    )


def draw(key: Key, like: Params, distribution: str = 'normal') -> Params:
  """Returns a random direction z with E[z z'] = I, float32 leaves.

  A leaf's numbers depend on the key and on the leaf's name alone, so a part of
  a tree gets the same numbers as in the whole tree (not on the 'sphere').

  Args:
    key: of this direction.
    like: the shapes; absent leaves stay absent.
    distribution: 'normal': N(0, 1); 'rademacher': +1 or -1; 'sphere': uniform
      on the sphere of radius sqrt(P) over the P entries of all leaves.

  >>> like = {'w': jnp.zeros((2, 3)), 'frozen': None}
  >>> z = draw(jax.random.key(0), like, 'sphere')
  >>> z['frozen'], round(float(jnp.sum(z['w'] ** 2)), 4)
  (None, 6.0)
  >>> jnp.unique(abs(draw(jax.random.key(0), like, 'rademacher')['w']))
  Array([1.], dtype=float32)
  """
  z = jax.tree_util.tree_map_with_path(
    lambda path, x: draw_leaf(key, tree.path_name(path), x, distribution), like
  )
  if distribution != 'sphere':
    return z
  size = sum(x.size for x in jax.tree.leaves(z))
  return tree.scale(z, jnp.sqrt(jnp.float32(size)) / tree.norm(z))


def draw_leaf(
  key: Key, name: str, like: jax.Array, distribution: str = 'normal'
) -> jax.Array:
  """Returns the numbers of the leaf `name` in a direction, float32.

  >>> z = draw(jax.random.key(0), {'w': jnp.zeros(3)})['w']
  >>> bool((z == draw_leaf(jax.random.key(0), 'w', jnp.zeros(3))).all())
  True
  """
  own = jax.random.fold_in(key, zlib.crc32(name.encode()))
  if distribution == 'rademacher':
    return jax.random.rademacher(own, jnp.shape(like), jnp.float32)
  return jax.random.normal(own, jnp.shape(like), jnp.float32)


def moved(
  point: Params,
  key: Key,
  size: Any,
  distribution: str = 'normal',
  mask: Any = None,
) -> Params:
  """Returns p + size z, each leaf in its dtype; z is zero outside of `mask`.

  >>> point = {'w': jnp.ones(2)}
  >>> jax.tree.map(lambda x: x.tolist(), moved(point, jax.random.key(0), 0.0))
  {'w': [1.0, 1.0]}
  """
  z = draw(key, point, distribution)
  if mask is not None:
    z = tree.apply_mask(z, mask)
  return jax.tree.map(
    lambda p, d: (p.astype(jnp.float32) + size * d).astype(p.dtype), point, z
  )


def combined(
  point: Params,
  keys: Key,
  coefficients: jax.Array,
  distribution: str = 'normal',
  mask: Any = None,
) -> Params:
  """Returns p + sum_j c_j z_j in the order of j, each leaf in its dtype.

  The sum is float32 and one direction exists at a time; one with a coefficient
  of zero is not drawn (under `vmap` it is).

  Args:
    point: p.
    keys: [J], of the directions.
    coefficients: c, [J].
    distribution: see `draw`.
    mask: the entries that a direction has; all if None.

  >>> keys = jax.random.split(jax.random.key(0), 2)
  >>> there = combined({'w': jnp.zeros(3)}, keys, jnp.array([2.0, 0.0]))
  >>> z = draw(keys[0], {'w': jnp.zeros(3)})
  >>> bool(jnp.allclose(there['w'], 2 * z['w']))
  True
  """
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), point)

  def add(j, now):
    step = lambda now: moved(now, keys[j], coefficients[j], distribution, mask)
    return jax.lax.cond(coefficients[j] != 0, step, lambda now: now, now)

  wide = jax.lax.fori_loop(0, len(keys), add, wide)
  return jax.tree.map(lambda x, p: x.astype(p.dtype), wide, point)
