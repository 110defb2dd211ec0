"""A choice of the rows that a client trains on, by a score, inside the round.

`choosing` wraps any algorithm: the score is computed under the parameters that
the server sends, before local training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  Base,
  Cohort,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
)

# (base, params, batch [B, ...], key) -> (score [B], count [B]); a row of count
# zero is padding.
Score = Callable[[Base, Params, Any, Key], tuple[jax.Array, jax.Array]]


def by_loss(loss: Loss) -> Score:
  """Returns the token mean of each row as its score, of a loss by rows.

  >>> from fedjax_llm.types import LossSum
  >>> loss = lambda base, p, x, key: LossSum(x, jnp.float32([2, 0]), x)
  >>> by_loss(loss)(None, {}, jnp.float32([6, 0]), None)[0].tolist()
  [3.0, 0.0]
  """

  def score(base, params, batch, key):
    sums = loss(base, params, batch, key)
    return sums.total / jnp.maximum(sums.count, 1.0), sums.count

  return score


def by_gradient(loss: Loss) -> Score:
  """Returns the norm of the gradient of each row's token mean as its score.

  The gradient is that of the floating leaves. Rows come one after another.

  >>> from fedjax_llm.types import LossSum
  >>> loss = lambda base, p, x, key: LossSum(p['w'] * x, x * 0 + 1, x)
  >>> score = by_gradient(loss)
  >>> score(None, {'w': jnp.ones(())}, jnp.float32([3, -4]), None)[0].tolist()
  [3.0, 4.0]
  """

  def score(base, params, batch, key):
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    trained = jax.tree.map(lambda x: x if is_float(x) else None, params)

    def one(row):
      def mean(trained):
        whole = jax.tree.map(lambda x: x[None], row)
        sums = loss(base, tree.merge(trained, params), whole, key)
        total, count = jnp.sum(sums.total), jnp.sum(sums.count)
        return total / jnp.maximum(count, 1.0), count

      slope, count = jax.grad(mean, has_aux=True)(trained)
      return tree.norm(slope), count

    return jax.lax.map(one, jax.tree.map(jnp.asarray, batch))

  return score


def choosing(
  algorithm: FederatedAlgorithm, score: Score, pool: int
) -> FederatedAlgorithm:
  """Returns the algorithm on the rows of the largest scores.

  A cohort holds `pool` times as many steps as are trained, [K, pool S, B, ...];
  of its pool S B rows each client keeps the S B of the largest score, in their
  order. The score is that of the served model, the same for all clients; it is
  a client's own business and is not sent. Metrics: 'data/examples_offered' and
  'data/examples_kept', rows of this round's clients.

  Args:
    algorithm: any.
    score: of a batch; of equal scores the first rows are kept.
    pool: candidates for each row that is kept.

  >>> from fedjax_llm.types import RoundInfo, ServerState
  >>> def round(state, cohort, base, data):  # shows the rows
  ...   return cohort.batches, (), RoundInfo(None, None, None, None, {})
  >>> served = lambda params, state: params
  >>> inner = FederatedAlgorithm(None, None, round, served)
  >>> score = lambda base, params, x, key: (x, jnp.ones_like(x))
  >>> state = ServerState(0, {}, (), (), jax.random.key(0))
  >>> rows = jnp.float32([[[3.0], [9.0], [1.0], [7.0]]])  # [K, pool S, B]
  >>> cohort = Cohort(jnp.arange(1), rows, jnp.ones(1), jnp.ones(1) > 0)
  >>> choosing(inner, score, 2).round(state, cohort)[0].tolist()
  [[[9.0], [7.0]]]
  """

  def chosen(state, cohort: Cohort, base) -> tuple[Cohort, dict[str, Any]]:
    batches = jax.tree.map(jnp.asarray, cohort.batches)
    num, steps, rows = jax.tree.leaves(batches)[0].shape[:3]
    params = algorithm.personal(state.params, None)
    key = jax.random.fold_in(state.key, state.round)

    def one(batch):
      return score(base, params, batch, key)

    flat = jax.tree.map(lambda x: x.reshape(num * steps, *x.shape[2:]), batches)
    value, count = jax.lax.map(one, flat)  # [K pool S, B]
    there = count.reshape(num, -1) > 0
    value = jnp.where(there, value.reshape(num, -1), -jnp.inf)
    size = steps // pool * rows
    best = jnp.argsort(-value, axis=1, stable=True)[:, :size]
    best = jnp.sort(best, axis=1)  # the order of the stream

    def pick(x):
      x = x.reshape(num, steps * rows, *x.shape[3:])
      x = jax.vmap(lambda one, index: one[index])(x, best)
      return x.reshape(num, steps // pool, rows, *x.shape[2:])

    kept = jnp.take_along_axis(there, best, axis=1)
    valid = jnp.asarray(cohort.valid)[:, None]
    metrics = {
      'data/examples_offered': jnp.sum(there & valid),
      'data/examples_kept': jnp.sum(kept & valid),
    }
    return cohort._replace(batches=jax.tree.map(pick, batches)), metrics

  def with_metrics(info, metrics):
    return info._replace(metrics={**info.metrics, **metrics})

  def round(state, cohort, base=None, data=None):
    cohort, metrics = chosen(state, cohort, base)
    state, states, info = algorithm.round(state, cohort, base, data)
    return state, states, with_metrics(info, metrics)

  def train(state, cohort, base=None):
    assert algorithm.train is not None
    cohort, metrics = chosen(state, cohort, base)
    uploads, states, info = algorithm.train(state, cohort, base)
    return uploads, states, with_metrics(info, metrics)

  halves = algorithm.train is not None
  return algorithm._replace(round=round, train=train if halves else None)
