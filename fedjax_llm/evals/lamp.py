"""Recovers the texts of a gradient with a prior of language: LAMP.

Matching gradients (`matching`) finds the tokens of a text more easily than
their order. LAMP (Balunovic et al. 2022, arXiv 2202.08827) reorders them
between its continuous steps, and keeps the order that a language model and the
gradient prefer together. `lamp` is the attack, `discrete` its reordering.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.evals import matching
from fedjax_llm.types import Error

MOVES = ('token', 'sequence', 'prefix', 'swap')  # as they take turns


class Reordered(NamedTuple):
  """The outcome of a discrete step.

  >>> Reordered(inputs=None, values=None).values is None
  True
  """

  inputs: jax.Array  # [B, T, D]
  values: jax.Array  # [B] after the step of each row


def orders(
  length: int,
  num: int,
  rng: np.random.Generator,
  *,
  first: int = 0,
  last: int = 0,
) -> np.ndarray:
  """Returns candidate orders of the places of a text, [num, T] int32.

  The first is the order as it is. The others are in turn the move of a token,
  of a sequence, of a prefix to the end, and the swap of two tokens; places are
  drawn uniformly, as in the authors' program, and some draws change nothing.

  Args:
    length: T.
    num: of the candidates.
    rng: draws them.
    first: places at the start that stay, such as a first special token.
    last: places at the end that stay.

  Raises:
    Error: no candidate, or fewer than two places that move.

  >>> drawn = orders(5, 9, np.random.default_rng(0), first=1)
  >>> drawn[0].tolist(), sorted(drawn[3].tolist()), drawn[:, 0].any().item()
  ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], False)
  """
  free = length - first - last
  if num < 1 or free < 2 or first < 0 or last < 0:
    raise Error(
      f'orders: {num=} must be at least 1, and {length=} less {first=} and '
      f'{last=} at least 2.'
    )

  def drawn(kind: str) -> list[int]:
    places = list(range(free))
    if kind == 'swap':
      i, j = rng.integers(free, size=2)
      places[i], places[j] = places[j], places[i]
      return places
    if kind == 'prefix':
      i = int(rng.integers(free))
      return places[i:] + places[:i]
    begin, end = sorted(rng.integers(free + 1, size=2))
    if kind == 'token':  # before one of all places, its own among them
      begin, to = int(rng.integers(free)), int(rng.integers(free + 1))
      end, to = begin + 1, to - (to > begin)
    else:
      to = int(rng.integers(free + 1 - (end - begin)))
    rest = places[:begin] + places[end:]
    return rest[:to] + places[begin:end] + rest[to:]

  result = np.tile(np.arange(length, dtype=np.int32), (num, 1))
  for i in range(1, num):
    moved = drawn(MOVES[(i - 1) % len(MOVES)])
    result[i, first : length - last] = first + np.array(moved)
  return result


def discrete(
  value: Callable[[jax.Array], jax.Array], inputs: jax.Array, order: Any
) -> Reordered:
  """Returns the inputs in the best of some orders, row after row.

      x_b <- x_b[o],  o = arg min_c value(x with x_b[order_bc] in row b)

  The first order of each row is the one that it has, so the value never rises.
  Values that are not finite are never chosen before it.

  Args:
    value: from inputs [B, T, D] to [], such as the distance of gradients plus
      a multiple of a language model's loss.
    inputs: [B, T, D].
    order: [B, C, T] int, of `orders`.

  >>> inputs = jnp.array([[[3.0], [1.0], [2.0]]])  # is to be ascending
  >>> value = lambda x: -jnp.sum(x[0, :, 0] * jnp.arange(3))
  >>> swap = np.array([[[0, 1, 2], [1, 0, 2], [1, 2, 0]]])
  >>> discrete(value, inputs, swap).inputs.ravel().tolist()
  [1.0, 2.0, 3.0]
  """
  order = jnp.asarray(order)

  def row(b, carry):
    x, values = carry
    each = jax.lax.map(lambda o: value(x.at[b].set(x[b][o])), order[b])
    best = jnp.argmin(jnp.where(jnp.isfinite(each), each, jnp.inf))
    return x.at[b].set(x[b][order[b, best]]), values.at[b].set(each[best])

  none = jnp.zeros(inputs.shape[0], jnp.float32)
  return Reordered(*jax.lax.fori_loop(0, len(inputs), row, (inputs, none)))


def lamp(
  gradient: Callable[[Any], Any],
  seen: Any,
  start: jax.Array,
  prior: Callable[[jax.Array], jax.Array],
  table: jax.Array,
  *,
  prior_weight: float = 0.2,
  kind: str = 'cosine',
  lengths: float = 1.0,
  steps: int = 2000,
  every: int = 75,
  burn_in: float = 0.1,
  num_orders: int = 200,
  first: int = 0,
  last: int = 0,
  learning_rate: float = 0.01,
  decay: float = 0.89,
  seed: int = 0,
) -> matching.Recovered:
  """Returns inputs whose gradient was seen and whose tokens are likely.

  Continuous steps are those of `matching.recovered`, by Adam on

      D(x) + lengths (mean_t ||x_t|| - mean_v ||e_v||)^2

  with D the distance of the gradients ('cosine' divided by the number of
  leaves) and e_v the rows of the table. After a share `burn_in` of them every
  `every`-th one is followed by a `discrete` step on

      D(x) + prior_weight * prior(tokens nearest to x by cosine)

  The result is the inputs of the least continuous loss. Defaults are those of
  the authors' program for the cosine: 200 orders a row, the rate times `decay`
  every 50 steps.

  Args:
    gradient: from inputs [B, T, D] to the gradient that the client sent.
    seen: the client's gradient.
    start: [B, T, D].
    prior: from tokens [B, T] to [], the mean loss of a language model in nats.
    table: the embeddings [V, D].
    prior_weight: 0 leaves the choice of the order to the gradient.
    kind: 'cosine' or 'squared', see `matching.distance`.
    lengths: the weight of the regulariser.
    steps, every, burn_in, num_orders: see above.
    first, last: places that are not reordered.
    learning_rate, decay: of Adam.
    seed: draws the orders.

  Raises:
    Error: a number out of range; as `orders` and `matching.distance`.

  >>> table, seen = jnp.eye(3), {'w': jnp.eye(3)[jnp.array([[2, 0]])]}
  >>> flat = lambda tokens: jnp.float32(0)
  >>> result = lamp(lambda x: {'w': x}, seen, 0.5 * jnp.ones((1, 2, 3)), flat,
  ...               table, steps=60, every=20, num_orders=3, learning_rate=0.1)
  >>> matching.nearest(result.inputs, table).tolist()
  [[2, 0]]
  """
  for name, number in (('steps', steps), ('every', every)):
    if number < 1:
      raise Error(f'lamp: {name}={number} must be at least 1.')
  if not 0 <= burn_in <= 1:
    raise Error(f'lamp: burn_in={burn_in} must be from 0 to 1.')
  rng = np.random.default_rng(seed)
  parts = len(jax.tree.leaves(seen)) if kind == 'cosine' else 1
  length = jnp.mean(jnp.linalg.norm(table, axis=-1))
  rate = optax.exponential_decay(learning_rate, 50, decay, staircase=True)
  optimizer = optax.adam(rate)

  def away(x):
    return matching.distance(seen, gradient(x), kind) / parts

  def loss(x):
    gap = jnp.mean(jnp.linalg.norm(x + 1e-12, axis=-1)) - length
    return away(x) + lengths * gap**2

  def value(x):
    tokens = matching.nearest(x, table)
    return away(x) + prior_weight * prior(tokens)

  @jax.jit
  def descend(num, carry):
    def step(_, carry):
      x, state, best, least = carry
      now, slope = jax.value_and_grad(loss)(x)
      best = jnp.where(now <= least, x, best)
      updates, state = optimizer.update(slope, state, x)
      new = optax.apply_updates(x, updates)
      return new, state, best, jnp.minimum(now, least)

    return jax.lax.fori_loop(0, num, step, carry)

  reorder = jax.jit(lambda x, order: discrete(value, x, order).inputs)
  start = jnp.asarray(start, jnp.float32)
  carry = start, optimizer.init(start), start, jnp.float32(jnp.inf)
  begin = int(burn_in * steps)
  stops = list(range(begin + 1, steps, every))
  done = 0
  for stop in [*stops, steps]:
    carry = descend(stop - done, carry)
    done = stop
    if stop < steps:
      rows = [
        orders(x.shape[0], num_orders, rng, first=first, last=last)
        for x in start
      ]
      carry = (reorder(carry[0], np.stack(rows)), *carry[1:])
  x, _, best, least = carry
  best = jnp.where(loss(x) <= least, x, best)
  return matching.Recovered(best, away(best) * parts)
