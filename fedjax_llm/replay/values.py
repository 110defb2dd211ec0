"""The values of clients in one round: games over the set of participants.

A game is a function `value(masks [M, K]) -> [M]`: the score of the outcome if
only the clients of each mask take part. `of_round` returns the game of a round;
`leave_one_out` and `shapley` compute values of any game.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.types import (
  Base,
  Cohort,
  Error,
  FederatedAlgorithm,
  Params,
  ServerState,
)

Game = Callable[[np.ndarray], np.ndarray]  # masks [M, K] bool -> [M] float64

_ORDER = 311  # purpose of the random stream: orders in which clients join


class Values(NamedTuple):
  """Values of the K rows of a cohort; padding rows have 0."""

  value: np.ndarray  # [K] float64
  margin: np.ndarray  # [K] half of the 95 % interval, 0 where exact
  none: float  # the game's value without clients
  all: float  # the game's value with all clients
  num_subsets: int  # the number of subsets of clients that were evaluated


def of_round(
  algorithm: FederatedAlgorithm,
  state: ServerState,
  cohort: Cohort,
  base: Base,
  score: Callable[[Base, Params], jax.Array],
  *,
  at_once: int = 8,
  at_most: int = 256,
) -> Game:
  """Returns the game of one round: the score of the model after it.

  A client outside of a mask is one that did not report. One program computes
  all masks of a call: local training does not depend on who reports, so under
  `vmap` over masks it is computed once, and only aggregation, server step and
  score are computed a mask.

  Args:
    algorithm: any algorithm, also with streamed or nonlinear rules.
    state: the server's state before the round.
    cohort: the cohort of the round, with the states of its clients. Rows that
      are not valid never take part.
    base: the frozen weights.
    score: `(base, params) -> [...]`; its sum, taken in float64, is the value,
      and higher is better. An example is the negative loss of each held-out
      row.
    at_once: the number of masks scored together.
    at_most: the number of masks a program; for more masks the program runs
      again, training included. Memory holds that many adapters.

  >>> import jax.numpy as jnp
  >>> from fedjax_llm import recipes, types
  >>> def train(base, start, state, batch, masks, context):
  ...   return types.ClientOutput(batch, masks)
  >>> method = recipes.compose(
  ...   types.LocalUpdate(lambda params: (), train), measure=None)
  >>> steps = jnp.array([1.0, 3.0])  # what each client adds to the model
  >>> cohort = Cohort(jnp.arange(2), steps, jnp.ones(2), jnp.ones(2) > 0)
  >>> state = method.init(jax.random.key(0), jnp.float32(0))
  >>> game = of_round(method, state, cohort, None, lambda base, x: x)
  >>> game(np.array([[0, 0], [1, 0], [0, 1], [1, 1]], bool)).tolist()
  [0.0, 1.0, 3.0, 2.0]
  """

  @jax.jit
  def scores(masks, state, cohort, base):
    def served(mask):
      some = cohort._replace(valid=cohort.valid & mask)
      new, _, _ = algorithm.round(state, some, base)
      return algorithm.personal(new.params, None)

    return jax.lax.map(
      lambda params: score(base, params),
      jax.vmap(served)(masks),
      batch_size=at_once,
    )

  def value(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks, bool)
    num, size = len(masks), min(len(masks), at_most)
    # The last part is padded, so that all parts share one program.
    parts = [np.arange(at, at + size) % num for at in range(0, num, size)]
    sums = [
      np.asarray(scores(masks[part], state, cohort, base), np.float64)
      for part in parts
    ]
    return np.concatenate([x.reshape(size, -1).sum(1) for x in sums])[:num]

  return value


def leave_one_out(game: Game, present: Any) -> Values:
  """Returns each client's leave-one-out value: v(all) - v(all without k).

  Args:
    game: a function of masks.
    present: [K], true for the clients that take part.

  >>> found = leave_one_out(lambda masks: masks.sum(1) ** 2.0, [1, 1, 1])
  >>> found.value.tolist()
  [5.0, 5.0, 5.0]
  """
  present, players = _players(present)
  masks = np.repeat(present[None], len(players) + 2, 0)
  masks[np.arange(len(players)), players] = False
  masks[-2] = False
  worth = _evaluated(game, masks)
  value = np.zeros(len(present))
  value[players] = worth[-1] - worth[:-2]
  return Values(
    value, np.zeros_like(value), float(worth[-2]), float(worth[-1]), len(masks)
  )


def shapley(
  game: Game, present: Any, *, num_permutations: int = 200, seed: int = 0
) -> Values:
  """Returns Shapley values: mean contributions over the orders of joining.

      phi_k = E over orders of v(those before k, and k) - v(those before k)

  Shapley 1953; for data, Ghorbani and Zou 2019, arXiv 1904.02868, algorithm 1
  without truncation. Values add up to v(all) - v(none), and clients with equal
  contributions have equal values. The mean over `num_permutations` random
  orders has the 95 % interval +- 1.96 standard errors. Where n clients have so
  few subsets that these orders might see all 2^n, the values are computed from
  all of them, exactly.

  Args:
    game: a function of masks; it is called once, with each subset once.
    present: [K], true for the clients that take part.
    num_permutations: the number of random orders.
    seed: the seed of the orders.

  Raises:
    Error: `num_permutations` is below 2.

  >>> found = shapley(lambda masks: masks.sum(1) ** 2.0, [1, 1, 1, 0])
  >>> found.value.tolist(), found.num_subsets
  ([3.0, 3.0, 3.0, 0.0], 8)
  """
  if num_permutations < 2:
    raise Error(
      f'num_permutations is {num_permutations}: an interval needs 2 or more.'
    )
  present, players = _players(present)
  num = len(players)
  if 2**num <= num_permutations * max(num - 1, 0) + 2:
    return _all_subsets(game, present, players)
  rng = np.random.default_rng((seed, _ORDER))
  orders = np.stack([rng.permutation(num) for _ in range(num_permutations)])
  place = np.argsort(orders, axis=1)  # [P, n], the position of each client
  joined = place[:, None, :] < np.arange(num + 1)[:, None]  # [P, n + 1, n]
  masks = np.zeros((num_permutations, num + 1, len(present)), bool)
  masks[..., players] = joined
  flat, back = np.unique(
    masks.reshape(-1, len(present)), axis=0, return_inverse=True
  )
  worth = _evaluated(game, flat)[back.ravel()].reshape(masks.shape[:2])
  gains = np.diff(worth, axis=1)  # [P, n] in the order of joining
  gains = np.take_along_axis(gains, place, axis=1)  # by client
  value, margin = np.zeros(len(present)), np.zeros(len(present))
  value[players] = gains.mean(0)
  error = gains.std(0, ddof=1) / math.sqrt(num_permutations)
  margin[players] = 1.96 * error
  return Values(
    value, margin, float(worth[0, 0]), float(worth[0, -1]), len(flat)
  )


def _all_subsets(
  game: Game, present: np.ndarray, players: np.ndarray
) -> Values:
  """Returns exact Shapley values, from all subsets.

  phi_k = sum_S |S|! (n - |S| - 1)! / n! (v(S and k) - v(S)), k not in S
  """
  num = len(players)
  subsets = np.array(list(itertools.product([False, True], repeat=num)))
  masks = np.zeros((len(subsets), len(present)), bool)
  masks[:, players] = subsets
  worth = _evaluated(game, masks)
  value = np.zeros(len(present))
  before = subsets.sum(1)
  for k, player in enumerate(players):
    # Subsets are binary numbers: adding client k adds a power of two.
    without = np.flatnonzero(~subsets[:, k])
    gains = worth[without + 2 ** (num - 1 - k)] - worth[without]
    share = [1 / (num * math.comb(num - 1, int(s))) for s in before[without]]
    value[player] = np.dot(share, gains)
  return Values(
    value, np.zeros_like(value), float(worth[0]), float(worth[-1]), len(worth)
  )


def _players(present: Any) -> tuple[np.ndarray, np.ndarray]:
  present = np.asarray(present, bool)
  players = np.flatnonzero(present)
  if not len(players):
    raise Error('nobody takes part, so nobody has a value.')
  return present, players


def _evaluated(game: Game, masks: np.ndarray) -> np.ndarray:
  return np.asarray(game(masks), np.float64)
