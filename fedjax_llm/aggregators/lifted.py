"""Rules made from one function of a user.

`from_rule` returns an `Aggregator`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.checks import as_function, first_difference, traced
from fedjax_llm.types import Aggregate, Aggregator, Error, Update


def from_rule(fn: Callable[[Update, jax.Array], Update]) -> Aggregator:
  """Returns an aggregator from a function `fn(update, weight) -> delta`.

  `update` is the whole tree of stacked leaves [K, ...], `None` for leaves that
  are not trained; `weight` [K] is float32 and sums to one, with zeros on the
  rows left out (those rows hold zeros). The delta has the structure of the
  update without its first axis. A rule of single leaves uses `jax.tree.map`. In
  a round with no weight above zero the delta is zero for every `fn`.

  A mean of updates scaled down to the median norm:

  >>> def bounded_mean(update, weight):
  ...   norms = jax.vmap(tree.norm)(update)  # [K]
  ...   seen = jnp.where(weight > 0, norms, jnp.nan)
  ...   bound = jnp.nanmedian(seen)
  ...   shrink = jnp.minimum(1.0, bound / jnp.maximum(norms, 1e-12))
  ...   return tree.weighted_sum(update, weight * shrink)
  >>> from fedjax_llm.types import Uploads
  >>> rule = from_rule(bounded_mean)
  >>> uploads = Uploads({'w': jnp.array([1.0, 2.0, 90.0])}, None, None,
  ...                   jnp.ones(3), jnp.ones(3, bool))
  >>> params = {'w': jnp.float32(0)}
  >>> result, _ = rule.aggregate(uploads, (), params, None)
  >>> round(float(result.delta['w']), 4)
  1.6667

  A rule that factorises uses `fedjax_llm.linalg`: `jnp.linalg.svd`, `qr`,
  `eigh` and `solve` of a stack of matrices can deadlock on a CPU with few
  cores. The largest direction of the mean matrix of each layer:

  >>> from fedjax_llm import linalg
  >>> def first_direction(update, weight):
  ...   def leaf(x):  # [K, L, D, F]
  ...     u, s, v = linalg.svd(tree.weighted_sum(x, weight))
  ...     return s[..., :1, None] * u[..., :1] @ v[..., :1, :]
  ...   return jax.tree.map(leaf, update)
  >>> matrices = jnp.stack([jnp.diag(jnp.array([4.0, 1.0]))] * 2)[:, None]
  >>> uploads = uploads._replace(
  ...   update=matrices, weight=jnp.ones(2), valid=jnp.ones(2, bool))
  >>> result, _ = from_rule(first_direction).aggregate(uploads, (), None, None)
  >>> jnp.round(result.delta[0]).tolist()
  [[4.0, 0.0], [0.0, 0.0]]

  Raises:
    Error: `fn` is not a function of two arguments; from the round, the function
      returns another structure or other shapes, or reads the value of a traced
      array in Python.
  """
  as_function(fn)
  name = getattr(fn, '__name__', repr(fn))

  def init(params, key):
    del params, key
    return ()

  def aggregate(uploads, state, params, key):
    del params, key
    update, weight = uploads.update, by_weight(uploads)
    delta = traced(f'from_rule: {name}', fn, update, tree.normalise(weight))
    wanted = jax.eval_shape(lambda: tree.take(update, 0))
    problem = first_difference(delta, wanted)
    if problem:
      raise Error(
        f'from_rule: {name} must return an update without its client axis, '
        f'but {problem}.'
      )
    some_weight = jnp.any(weight > 0)
    delta = jax.tree.map(
      lambda d, u: jnp.where(some_weight, jnp.asarray(d, u.dtype), 0).astype(
        u.dtype
      ),
      delta,
      update,
    )
    return Aggregate(delta), state

  return Aggregator(init, aggregate, weights=by_weight)
