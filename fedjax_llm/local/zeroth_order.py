"""Gradients without backpropagation: along random directions.

A `Slope` estimates a directional derivative <grad L(p), z>; `along` makes a
`Gradient` of it, sum_i slope_i z_i / n. Directions are drawn from keys whenever
they are needed and never stored.

Let g be the true gradient, P the number of entries and E[z z'] = I. One exact
slope along a normal direction has E[slope z] = g and

    E ||slope z - g||^2 = (P + 1) ||g||^2,

along signs ('rademacher') or on the sphere (P - 1) ||g||^2; n directions divide
this by n. So the steps that these methods need grow with the dimension.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.nodes import directions as basis
from fedjax_llm.types import Error, Gradient, Key, LossSum, Params, known

Value = tuple[jax.Array, LossSum]
Function = Callable[[Params], Value]  # a loss of the trained parameters


class Slope(NamedTuple):
  """An estimate of the derivative of a function along a direction.

  `begin(function, point) -> begun` is computed once for all directions of a
  point; `along(function, point, begun, key, distribution, mask) -> (slope [],
  LossSum)` estimates <grad, z> for the direction z of the key, which is zero
  outside of the mask.
  """

  begin: Callable[[Function, Params], Any]
  along: Callable[..., Value]


def two_point(eps: float = 1e-3) -> Slope:
  """Returns the central difference (L(p + eps z) - L(p - eps z)) / (2 eps).

  SPSA (Spall 1992) as in MeZO (Malladi et al. 2023, arXiv 2305.17333). Two
  forward passes a direction; exact for a quadratic.

  Raises:
    Error: `eps` is not positive.

  >>> square = lambda p: (p['w'] ** 2, LossSum(p['w'] ** 2, *jnp.ones(2)))
  >>> at, key = {'w': jnp.float32(3)}, jax.random.key(0)
  >>> slope, _ = two_point(0.1).along(square, at, (), key, 'rademacher', None)
  >>> round(abs(float(slope)), 3)
  6.0
  """
  _positive(eps, 'two_point')

  def along(function, point, begun, key, distribution, mask):
    del begun
    above, sums = function(basis.moved(point, key, eps, distribution, mask))
    # Drawn again after the first pass, so that no direction waits for it.
    key, above = jax.lax.optimization_barrier((key, above))
    below, more = function(basis.moved(point, key, -eps, distribution, mask))
    middle = jax.tree.map(lambda x, y: 0.5 * (x + y), sums, more)
    return (above - below) / (2 * eps), middle

  return Slope(_nothing, along)


def one_point(eps: float = 1e-3) -> Slope:
  """Returns L(p + eps z) / eps: one forward pass, of large variance.

  Flaxman et al. 2005, arXiv cs/0408007, lemma 2.1: its mean is the slope of the
  smoothed loss, but its variance holds (L / eps)^2.

  Raises:
    Error: `eps` is not positive.

  >>> four = lambda p: (jnp.float32(4), LossSum(*jnp.ones(3)))
  >>> at, key = {'w': jnp.float32(3)}, jax.random.key(0)
  >>> float(one_point(0.5).along(four, at, (), key, 'normal', None)[0])
  8.0
  """
  _positive(eps, 'one_point')

  def along(function, point, begun, key, distribution, mask):
    del begun
    value, sums = function(basis.moved(point, key, eps, distribution, mask))
    return value / eps, sums

  return Slope(_nothing, along)


def forward_difference(eps: float = 1e-3) -> Slope:
  """Returns (L(p + eps z) - L(p)) / eps; L(p) is computed once for all z.

  Raises:
    Error: `eps` is not positive.

  >>> line = lambda p: (5 * p['w'], LossSum(*jnp.ones(3)))
  >>> at, key = {'w': jnp.float32(3)}, jax.random.key(0)
  >>> slope = forward_difference(0.5)
  >>> begun = slope.begin(line, at)
  >>> abs(float(slope.along(line, at, begun, key, 'rademacher', None)[0]))
  5.0
  """
  _positive(eps, 'forward_difference')

  def along(function, point, begun, key, distribution, mask):
    here, sums = begun
    there, _ = function(basis.moved(point, key, eps, distribution, mask))
    return (there - here) / eps, sums

  return Slope(lambda function, point: function(point), along)


def forward_mode() -> Slope:
  """Returns the exact slope <grad L(p), z> by forward-mode differentiation.

  Baydin et al. 2022, arXiv 2202.08587: one pass that carries the value and its
  derivative, about twice the activations of inference and no backward pass.

  >>> square = lambda p: (p['w'] ** 2, LossSum(p['w'] ** 2, *jnp.ones(2)))
  >>> at, key = {'w': jnp.float32(3)}, jax.random.key(0)
  >>> slope, _ = forward_mode().along(square, at, (), key, 'rademacher', None)
  >>> abs(float(slope))
  6.0
  """

  def along(function, point, begun, key, distribution, mask):
    del begun
    z = basis.draw(key, point, distribution)
    if mask is not None:
      z = tree.apply_mask(z, mask)
    z = jax.tree.map(lambda d, p: d.astype(p.dtype), z, point)
    _, slope, sums = jax.jvp(function, (point,), (z,), has_aux=True)
    return slope, sums

  return Slope(_nothing, along)


def slopes(
  slope: Slope,
  function: Function,
  point: Params,
  keys: Key,
  distribution: str = 'normal',
  mask: Any = None,
) -> Value:
  """Returns the slopes [n] along the directions of `keys`, and mean sums.

  The directions come one after another: memory is that of one.

  >>> line = lambda p: (5 * p['w'], LossSum(*jnp.ones(3)))
  >>> keys = jax.random.split(jax.random.key(0), 4)
  >>> at = {'w': jnp.float32(3)}
  >>> abs(slopes(forward_mode(), line, at, keys, 'rademacher')[0]).tolist()
  [5.0, 5.0, 5.0, 5.0]
  """
  begun = slope.begin(function, point)

  def one(key):
    return slope.along(function, point, begun, key, distribution, mask)

  each, sums = jax.lax.map(one, keys)
  return each, jax.tree.map(lambda x: jnp.mean(x, 0), sums)


def along(
  slope: Slope, *, directions: int = 1, distribution: str = 'normal'
) -> Gradient:
  """Returns a `Gradient`: the mean of slope_i z_i over random directions.

  Args:
    slope: the estimate of a directional derivative (`two_point`, ...).
    directions: n.
    distribution: of the directions, see `nodes.directions.draw`.

  Raises:
    Error: fewer than one direction; an unknown distribution.

  >>> loss = lambda base, p, batch, key: LossSum(p['w'] ** 2, *jnp.ones(2))
  >>> start = {'w': jnp.float32(3)}
  >>> estimate = along(two_point(0.1), distribution='rademacher')
  >>> grads, _ = estimate(loss, None, start, start, None, jax.random.key(0))
  >>> round(float(grads['w']), 3)  # in one dimension signs cancel
  6.0
  """
  if directions < 1:
    raise Error(f'along: directions={directions} must be at least 1.')
  basis.check(distribution, 'along')

  def gradient(loss, base, trained, start, batch, key):
    def function(point):
      return mean_loss(loss, base, point, start, batch, key)

    keys = jax.random.split(key, directions)
    each, sums = slopes(slope, function, trained, keys, distribution)
    keys, each = jax.lax.optimization_barrier((keys, each))
    zeros = tree.zeros_like(trained, jnp.float32)
    grads = basis.combined(zeros, keys, each / directions, distribution)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained), sums

  return gradient


def _nothing(function: Function, point: Params) -> Any:
  del function, point
  return ()


def _positive(eps: Any, who: str) -> None:
  if known(eps) and not eps > 0:
    raise Error(f'{who}: eps={eps} must be above 0.')
