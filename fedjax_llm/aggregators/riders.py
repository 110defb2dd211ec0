"""A rule that leaves out free riders, by the spread of their updates.

A client that did not train sends zeros, the broadcast change of the last round
or noise: the entries of its update spread otherwise than those of clients that
trained.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.averaging import as_stack, mean
from fedjax_llm.aggregators.weights import counted
from fedjax_llm.checks import as_rule
from fedjax_llm.types import Aggregator, AnyAggregator, Error, known


def without_free_riders(
  inner: AnyAggregator | None = None, *, threshold: float = 3.5
) -> Aggregator:
  """Returns a rule on the clients whose updates spread like the others'.

      s_k = std of the entries of u_k that client k trained
      (Lin et al. 2019, arXiv 1911.12560, there of all entries)
      z_k = 0.6745 (s_k - med s) / med |s - med s|

  Clients with |z_k| > threshold are left out. It is the statistic STD of the
  paper without its autoencoder, with the score and the threshold 3.5 of
  Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993). It finds a
  minority of free riders; a client that sends the update of an honest one is
  not found. Entries outside of the masks, zeros of smaller ranks or of layers
  that a client does not train, are not read.

  Args:
    inner: the rule on the others; `mean()` if None.
    threshold: above 0.

  Raises:
    Error: a threshold that is not above 0.

  >>> from fedjax_llm.types import Uploads
  >>> update = jnp.array([[1.0, -1], [1.1, -1.1], [0.9, -0.9], [0, 0]])
  >>> ones = jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = without_free_riders()
  >>> rule.aggregate(uploads, (), jnp.zeros(2), None)[0].delta.round(3).tolist()
  [1.0, -1.0]
  """
  if known(threshold) and not threshold > 0:
    raise Error(f'without_free_riders: threshold={threshold} must be above 0.')
  rule = as_stack(as_rule(inner or mean(), 'without_free_riders: inner'))

  def honest(uploads):
    here = counted(uploads)
    trained = None if uploads.masks is None else uploads.masks.trained
    return here & (jnp.abs(scores(uploads.update, here, trained)) <= threshold)

  def kept(uploads):
    stays = honest(uploads)
    return uploads._replace(
      update=tree.where(stays, uploads.update, tree.zeros_like(uploads.update)),
      weight=jnp.where(stays, uploads.weight, 0),
      valid=jnp.asarray(uploads.valid) & stays,
    )

  def aggregate(uploads, state, params, key):
    return rule.aggregate(kept(uploads), state, params, key)

  weights: Any = rule.weights
  return rule._replace(
    aggregate=aggregate,
    weights=weights and (lambda uploads: weights(kept(uploads))),
  )


def scores(update: Any, here: jax.Array, trained: Any = None) -> jax.Array:
  """Returns z_k of each client, [K], of the clients `here` [K] bool.

  `trained` are their masks, [K, ...] booleans; None: all entries.

  >>> stack = {'w': jnp.array([[1.0, -1], [2.0, -2], [3.0, -3], [9.0, -9]])}
  >>> scores(stack, jnp.array([True, True, True, False])).tolist()[1]
  0.0
  """
  flat = tree.ravel(update)  # [K, P]
  on = jnp.ones_like(flat)
  if trained is not None:
    same = tree.like(trained, update)
    none = lambda x: x is None
    on = tree.ravel(jax.tree.map(_wide, update, same, is_leaf=none))
  num = jnp.maximum(jnp.sum(on, axis=1, keepdims=True), 1)
  away = on * (flat - jnp.sum(on * flat, axis=1, keepdims=True) / num)
  spread = jnp.sqrt(jnp.sum(away**2, axis=1) / num[:, 0])
  middle = _median(spread, here)
  distance = _median(jnp.abs(spread - middle), here)
  # Spreads that are equal but for rounding are no outliers.
  return (
    0.6745 * (spread - middle) / jnp.maximum(distance, 1e-4 * middle + 1e-30)
  )


def _wide(leaf: Any, mask: Any) -> Any:
  """Returns a mask in the shape of its leaf; without one all is trained."""
  if leaf is None or mask is None:
    return None if leaf is None else jnp.ones(leaf.shape)
  return jnp.broadcast_to(tree.rows(jnp.asarray(mask), leaf), leaf.shape)


def _median(values: jax.Array, here: jax.Array) -> jax.Array:
  """Returns the median of the values that are here."""
  order = jnp.sort(jnp.where(here, values, jnp.inf))
  num = jnp.maximum(jnp.sum(here), 1)
  middle = order[jnp.array([(num - 1) // 2, num // 2])]
  return jnp.where(jnp.any(here), jnp.mean(middle), 0.0)
