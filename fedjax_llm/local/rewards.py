"""Rewards by rule for sampled replies, computed from tokens on the devices.

A rule is `(Replies) -> [M] float32`. `exact` compares the answer, `ended`
checks the form of a reply.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ['Replies', 'ended', 'exact', 'weighted']


class Replies(NamedTuple):
  """Sampled replies and the recorded ones, as tokens with -1 after their end.

  >>> Replies(*[jnp.full((1, 2), -1)] * 2, jnp.array([True])).ended.shape
  (1,)
  """

  tokens: Any  # [M, N] int32, without the token that ends a reply
  answer: Any  # [M, A] int32, the recorded reply
  ended: Any  # [M] bool, whether a token has ended the sampled reply


Rule = Callable[[Replies], jax.Array]  # -> [M]


def _after(tokens: jax.Array, marker: Sequence[int]) -> jax.Array:
  """Returns the tokens after the last marker, [M, N]; none without a marker."""
  if not len(marker):
    return tokens
  num = tokens.shape[1]
  size = len(marker)
  wide = jnp.pad(tokens, ((0, 0), (0, size)), constant_values=-1)
  hits = jnp.stack(
    [wide[:, j : j + num] == token for j, token in enumerate(marker)]
  ).all(0)  # [M, N]
  place = jnp.max(jnp.where(hits, jnp.arange(num), -1), axis=1)
  start = jnp.where(place >= 0, place + size, num)
  index = start[:, None] + jnp.arange(num)
  picked = jnp.take_along_axis(wide, jnp.minimum(index, num), axis=1)
  return jnp.where(index < num, picked, -1)


def exact(marker: Sequence[int] = ()) -> Rule:
  """Returns 1 for replies whose answer equals the recorded one, 0 for others.

  The answer is what follows the last `marker` (tokens), in both replies: none
  where the marker is missing, and then there is no reward. Without a marker it
  is the whole reply.

  >>> replies = Replies(
  ...   tokens=jnp.array([[5, 9, 7, -1], [5, 6, 7, -1]]),
  ...   answer=jnp.array([[9, 7], [9, 7]]), ended=jnp.ones(2, bool))
  >>> exact(marker=[9])(replies).tolist(), exact()(replies).tolist()
  ([1.0, 0.0], [0.0, 0.0])
  """

  def rule(replies: Replies) -> jax.Array:
    mine, recorded = (
      _after(jnp.asarray(x), marker) for x in (replies.tokens, replies.answer)
    )
    width = max(mine.shape[1], recorded.shape[1])
    fill = lambda x: jnp.pad(
      x, ((0, 0), (0, width - x.shape[1])), constant_values=-1
    )
    same = jnp.all(fill(mine) == fill(recorded), axis=1)
    some = jnp.any(mine >= 0, axis=1)
    return (same & some).astype(jnp.float32)

  return rule


def ended(marker: Sequence[int] = ()) -> Rule:
  """Returns 1 for replies that end by themselves and hold the marker once.

  >>> replies = Replies(
  ...   tokens=jnp.array([[5, 9], [9, 9], [9, 5]]),
  ...   answer=jnp.zeros((3, 1)), ended=jnp.array([True, True, False]))
  >>> ended(marker=[9])(replies).tolist()
  [1.0, 0.0, 0.0]
  """

  def rule(replies: Replies) -> jax.Array:
    good = jnp.asarray(replies.ended)
    if len(marker):
      tokens = jnp.asarray(replies.tokens)
      wide = jnp.pad(tokens, ((0, 0), (0, len(marker))), constant_values=-1)
      num = tokens.shape[1]
      hits = jnp.stack(
        [wide[:, j : j + num] == token for j, token in enumerate(marker)]
      ).all(0)
      good &= jnp.sum(hits, axis=1) == 1
    return good.astype(jnp.float32)

  return rule


def weighted(rules: Sequence[tuple[float, Rule]]) -> Rule:
  """Returns the sum of rules, each times its weight.

  >>> replies = Replies(*[jnp.array([[5]])] * 2, jnp.array([False]))
  >>> rule = weighted([(8.0, exact()), (1.0, ended())])
  >>> rule(replies).tolist()
  [8.0]
  """
  return lambda replies: sum(
    (weight * rule(replies) for weight, rule in rules),
    start=jnp.zeros(jnp.shape(replies.tokens)[0], jnp.float32),
  )
