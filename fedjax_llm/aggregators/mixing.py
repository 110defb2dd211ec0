"""Rules that mix clients in other ways than by one mean.

Functions of a stack of K trees return a matrix [K, K] of weights, whose rows
sum to one, and `mix` applies it: row k is the mixture for client k. `mixed` is
a rule with such a matrix, for methods with one version a client.
`matched_mean` is a rule for sets of prompt rows, in which order means nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.nodes import Prompt
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  Update,
  known,
)


def mix(stack: Update, matrix: jax.Array) -> Update:
  """Returns sum_j W_kj x_j for every k: a stack of K mixtures.

  >>> stack = {'w': jnp.array([[1.0], [3.0]])}
  >>> mix(stack, jnp.array([[1.0, 0.0], [0.5, 0.5]]))['w'].tolist()
  [[1.0], [2.0]]
  """
  return jax.vmap(lambda row: tree.weighted_sum(stack, row))(matrix)


def clustered(cluster: Any, weight: Any) -> jax.Array:
  """Returns W_kj = w_j [c_j = c_k] / sum_i w_i [c_i = c_k], [K, K].

  A row without any weight in its cluster is zero.

  >>> clustered(jnp.array([0, 1, 0]), jnp.array([1.0, 2.0, 3.0]))[0].tolist()
  [0.25, 0.0, 0.75]
  """
  cluster = jnp.asarray(cluster)
  return _rows((cluster[:, None] == cluster) * jnp.asarray(weight))


def graph(adjacency: Any, weight: Any, own: float = 1.0) -> jax.Array:
  """Returns W = rows of (A + own * I) diag(w), each divided by its sum.

  `adjacency` A [K, K] holds weights of edges, 0 for none.

  >>> chain = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
  >>> graph(chain, jnp.ones(3))[0].tolist()
  [0.5, 0.5, 0.0]
  """
  adjacency = jnp.asarray(adjacency)
  loops = own * jnp.eye(adjacency.shape[0])
  return _rows((adjacency + loops) * jnp.asarray(weight))


def attention(stack: Update, weight: Any, temperature: float = 1.0):
  """Returns W_kj proportional to w_j exp(cos(x_k, x_j) / temperature), [K, K].

  Cosines are those of whole trees. A tree of zeros has the cosine 0 with all.

  >>> stack = {'w': jnp.array([[1.0, 0.0], [0.0, 2.0]])}
  >>> matrix = attention(stack, jnp.ones(2), temperature=0.1)
  >>> jnp.round(matrix, 4).tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  if known(temperature) and temperature <= 0:
    raise Error(f'attention: temperature={temperature} must be above 0.')
  flat = tree.ravel(stack)
  norm = jnp.sqrt(jnp.sum(flat**2, -1, keepdims=True))
  flat = flat / jnp.where(norm > 0, norm, 1.0)
  cosine = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
  return _rows(jnp.exp((cosine - 1) / temperature) * jnp.asarray(weight))


def nearest(stack: Update, weight: Any, num: int) -> jax.Array:
  """Returns W_kj = 1 / num for the `num` trees nearest to x_k, [K, K].

  Distances are Euclidean, x_k is its own nearest, and trees of weight zero are
  nobody's neighbours. With fewer trees than `num`, all of them count.

  >>> stack = {'w': jnp.array([[0.0], [1.0], [9.0]])}
  >>> nearest(stack, jnp.ones(3), num=2)[0].tolist()
  [0.5, 0.5, 0.0]
  """
  if num < 1:
    raise Error(f'nearest: num={num} must be at least 1.')
  here = jnp.asarray(weight) > 0
  far = jnp.where(here, tree.squared_distances(stack), jnp.inf)
  far = jnp.where(jnp.eye(len(far), dtype=bool) & here, -1.0, far)
  place = jnp.argsort(jnp.argsort(far, axis=-1), axis=-1)
  return _rows(((place < num) & here).astype(jnp.float32))


def mixed(matrix: Callable[[Update, jax.Array, jax.Array], Any]) -> Aggregator:
  """Returns a rule on one version of the parameters a client, [N, ...] a leaf.

      theta_k <- sum_j W_kj theta_j   over the clients j of the round

  where theta_j is the row of client j at the end of its training, and
  `matrix(stack, weight, ids) -> W [K, K]` is one of the functions above. A row
  whose client took no part keeps its value, and so does one whose row of W is
  zero. `recipes.rows` gives every client its row.

  >>> from fedjax_llm.types import Masks, Uploads
  >>> params = {'w': jnp.array([[1.0], [2.0], [3.0]])}  # N = 3
  >>> update = {'w': jnp.zeros((2, 3, 1)).at[0, 2].set(5.0)}
  >>> uploads = Uploads(
  ...   update, tree.broadcast(params, 2), Masks(None, None), jnp.ones(2),
  ...   jnp.ones(2, bool), ids=jnp.array([2, 0]))
  >>> rule = mixed(lambda stack, weight, ids: clustered(0 * ids, weight))
  >>> result, _ = rule.aggregate(uploads, (), params, None)
  >>> (params['w'] + result.delta['w']).ravel().tolist()  # (8 + 1) / 2
  [4.5, 2.0, 4.5]
  """

  def aggregate(uploads, state, params, key):
    del key
    weight = by_weight(uploads)
    ids = jnp.maximum(uploads.ids, 0)
    number = jnp.arange(len(ids))
    own = lambda x: x[number, ids]
    stack = tree.map_present(
      lambda u, s: own(s) + own(u), uploads.update,
      tree.like(uploads.start, uploads.update),
    )  # fmt: skip
    weights = matrix(stack, weight, uploads.ids)
    acts = (weight > 0) & (jnp.sum(weights, -1) > 0)
    to = jnp.where(acts, uploads.ids, jax.tree.leaves(params)[0].shape[0])

    def moved(new, p):
      change = (new - p[ids]).astype(p.dtype)
      return jnp.zeros_like(p).at[to].set(change, mode='drop')

    delta = tree.map_present(moved, mix(stack, weights), params)
    return Aggregate(delta), state

  return Aggregator(lambda params, key: (), aggregate, weights=by_weight)


def _rows(matrix: Any) -> jax.Array:
  total = jnp.sum(matrix, -1, keepdims=True)
  return jnp.asarray(matrix / jnp.where(total > 0, total, 1.0), jnp.float32)


# ---------------------------------------------------------------- matching --


def distances(rows: jax.Array, others: jax.Array) -> jax.Array:
  """Returns squared distances of rows [P, D] and others [Q, D], [P, Q].

  >>> distances(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])).tolist()
  [[25.0]]
  """
  return jnp.sum((rows[:, None] - others) ** 2, -1)


def hungarian(cost: Any) -> np.ndarray:
  """Returns the column that each row takes in the cheapest matching, [P].

  It is exact and runs on the host (`scipy.optimize.linear_sum_assignment`).

  >>> hungarian([[1.0, 0.0], [0.0, 5.0]]).tolist()
  [1, 0]
  """
  import scipy.optimize

  return scipy.optimize.linear_sum_assignment(np.asarray(cost, float))[1]


def sinkhorn(
  cost: jax.Array, temperature: float = 0.02, steps: int = 100
) -> jax.Array:
  """Returns the plan [P, P] of regularised optimal transport, rows sum to one.

      min_T sum_ij T_ij cost_ij + e sum_ij T_ij log T_ij,   T 1 = 1,  T' 1 = 1

  with e = temperature * the mean cost, so that the scale of the costs does not
  matter (Cuturi 2013, arXiv 1306.0895, in logarithms). For a small temperature
  it is the permutation of `hungarian`, if that is unique. It can be traced.

  >>> sinkhorn(jnp.array([[1.0, 0.0], [0.0, 5.0]])).round(3).tolist()
  [[0.0, 1.0], [1.0, 0.0]]
  """
  mean = jnp.mean(cost)
  score = -cost / (temperature * jnp.where(mean > 0, mean, 1.0))

  def step(_, log_plan):
    over = lambda axis: jax.nn.logsumexp(log_plan, axis, keepdims=True)
    log_plan = log_plan - over(0)
    return log_plan - jax.nn.logsumexp(log_plan, 1, keepdims=True)

  return jnp.exp(jax.lax.fori_loop(0, steps, step, score))


def matched_mean(temperature: float = 0.02, steps: int = 100) -> Aggregator:
  """Returns the weighted mean after a matching of each client's prompt rows.

      T_k = sinkhorn(||theta_i - omega_kj||^2),
      theta_i <- sum_k w_k sum_j T_k,ij omega_kj

  where omega_k are the rows of a `Prompt` at the end of client k's training and
  theta those of the server. The order of a client's rows then changes nothing
  (for rows that are far from each other, on the scale of the temperature).
  Other leaves are averaged as they are, so without a prompt it is a `mean`.

  Raises:
    Error: a temperature that is not above 0, fewer than one step.

  >>> from fedjax_llm.aggregators import received
  >>> start = Prompt(jnp.array([[0.0, 4.0], [4.0, 0.0]]))
  >>> ends = [start, Prompt(start.rows[::-1])]  # the same set
  >>> rule = matched_mean()
  >>> result, _ = rule.aggregate(received(start, ends), (), start, None)
  >>> jnp.abs(result.delta.rows).round(4).tolist()
  [[0.0, 0.0], [0.0, 0.0]]
  """
  if known(temperature) and temperature <= 0:
    raise Error(f'matched_mean: temperature={temperature} must be above 0.')
  if steps < 1:
    raise Error(f'matched_mean: steps={steps} must be at least 1.')
  is_prompt = lambda x: isinstance(x, Prompt)

  def aggregate(uploads, state, params, key):
    del key
    weight = tree.normalise(by_weight(uploads))

    def node(p, update, start):
      if not is_prompt(p):
        return tree.weighted_sum(update, weight)
      # A client's whole rows, what it did not train included.
      ends = (start.rows + update.rows).astype(jnp.float32)

      def matched(end):
        plan = sinkhorn(distances(p.rows, end), temperature, steps)
        return jnp.matmul(plan, end, precision=jax.lax.Precision.HIGHEST)

      moved = jax.vmap(matched)(ends) - p.rows
      return Prompt(tree.weighted_sum(moved, weight))

    delta = jax.tree.map(
      node, params, uploads.update, uploads.start, is_leaf=is_prompt
    )
    like = lambda d, p: d.astype(p.dtype)
    return Aggregate(tree.map_present(like, delta, params)), state

  return Aggregator(lambda params, key: (), aggregate, weights=by_weight)
