"""Rules that choose a new basis of the factors, or align clients' bases.

Builders return an `Aggregator`.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.low_rank.by_node import (
  NOTHING,
  Seen,
  by_node,
  moved_to_mean,
  per_client,
)
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits


def flexlora(*, split: str = 'b') -> Aggregator:
  """Returns FlexLoRA: the best factors of the server's rank of a mean product.

      s a b = SVD_R(sum_k w_k s_k a_k b_k)

  Columns come in the order of their singular values, so a client of rank r
  that holds the first r receives the best product of rank r (Bai et al. 2024,
  arXiv 2402.11505, section 3.2). The product is never formed:
  `low_rank.svd_round`. Its `split` is 'b' in the paper, 'a' in NVIDIA FLARE's
  HLoRA aggregator.

  Raises:
    Error: `split` is another word; from the round, a factor that is
      frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> new = flexlora().aggregate(sent, (), server, jax.random.key(0))[0].assign
  >>> round((new.a * new.b).item(), 4), round(abs(new.a.item()), 4)
  (7.0, 1.0)
  """
  low_rank.check_split('flexlora', split)

  def rule(seen: Seen) -> Aggregate:
    best = low_rank.svd_round(
      low_rank.stack(seen.nodes, seen.weight),
      seen.server.a.shape[-1],
      scale=seen.server.scale,
      split=split,
    )
    return Aggregate(NOTHING, LowRank(best.a, best.b, None))

  return by_node('flexlora', rule, Traits(changes_basis=True), assigns=True)


def fedsvd(*, every: int = 1) -> Aggregator:
  """Returns FedSVD: the product of the means, factored by its SVD.

      s a b = U S V':   a <- U,   b <- S V' / s

  of a = mean a_k and b = mean b_k. Clients train b alone, so the mean product
  is kept exactly while a follows its directions, with orthonormal columns (Lee
  et al. 2025, arXiv 2505.12805; there A is our a transposed).

  Args:
    every: rounds between two factorisations; the rounds between take the means
      (the authors' code has such a period).

  Raises:
    Error: `every` below one; from the round, a factor that is frozen or
      private: share a and leave it untrained (`scopes.untrained`).

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> rule, server = fedsvd(), node(2, 0)
  >>> state = rule.init(server, None)
  >>> sent = received(server, [node(2, 1), node(2, 5)])
  >>> new = rule.aggregate(sent, state, server, jax.random.key(0))[0].assign
  >>> round(abs(new.a.item()), 4), round(abs(new.b.item()), 4)
  (1.0, 6.0)
  """
  if every < 1:
    raise Error(f'fedsvd: every={every} must be at least 1.')

  def rule(seen: Seen, count: jax.Array) -> Aggregate:
    now = seen.served()
    best = low_rank.svd_round(now, now.a.shape[-1])
    turn = (count + 1) % every == 0
    pick = lambda new, old: jnp.where(turn, new, old)
    return Aggregate(
      NOTHING, LowRank(pick(best.a, now.a), pick(best.b, now.b), None)
    )

  return _counting('fedsvd', rule, Traits(changes_basis=True), assigns=True)


def fedrot(*, strength: float = 1.0, first: str = 'a') -> Aggregator:
  """Returns FedRot-LoRA: the mean of factors rotated onto the server's.

      U S V' = svd(a_k' a)  or  svd(b_k b'),   R_k = U V' (a rotation),
      R_k <- nearest rotation of (1 - strength) I + strength R_k
      a <- sum_k w_k a_k R_k,   b <- sum_k w_k R_k' b_k

  where a and b are the server's factors before the round. A client's product
  a_k b_k stays as it is, and the mean loses less of it (Zhang et al. 2026,
  arXiv 2602.23638). As in the authors' code, rounds alternate between the
  factors to align, a reflection is made a rotation by the last singular vector,
  and there is no rotation in the first round, where b was zero. For clients of
  one rank.

  Args:
    strength: lambda; 0 is the mean of the factors.
    first: the factor aligned in round 1 (the second), 'a' or 'b'.

  Raises:
    Error: a strength not in [0, 1]; `first` is another word; from the round, a
      factor that is frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> server = LowRank(jnp.eye(2), jnp.zeros((2, 2)), jnp.float32(1))
  >>> turned = LowRank(jnp.array([[0.0, -1], [1, 0]]), jnp.eye(2), server.scale)
  >>> sent, count = received(server, [turned]), jnp.int32(1)
  >>> new, _ = fedrot().aggregate(sent, count, server, jax.random.key(0))
  >>> jnp.round(server.a + new.delta.a).tolist()  # turned back
  [[1.0, 0.0], [0.0, 1.0]]
  """
  if not 0 <= strength <= 1:
    raise Error(f'fedrot: strength={strength} must be from 0 to 1.')
  if first not in ('a', 'b'):
    raise Error(f"fedrot: first={first!r} is neither 'a' nor 'b'.")
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def rule(seen: Seen, count: jax.Array) -> Aggregate:
    nodes, server = seen.nodes, seen.server
    by_a = low_rank.dot(t(nodes.a), server.a)  # [K, ..., R, R]
    by_b = low_rank.dot(nodes.b, t(server.b))
    turn = _rotation(jnp.where((count % 2 == 1) == (first == 'a'), by_a, by_b))
    same = jnp.eye(turn.shape[-1])
    if strength < 1:
      turn = _rotation((1 - strength) * same + strength * turn)
    turn = jnp.where(count == 0, same, turn)
    nodes = nodes._replace(
      a=low_rank.dot(nodes.a, turn), b=low_rank.dot(t(turn), nodes.b)
    )
    share = per_client(seen.weight, nodes.scale)
    return Aggregate(moved_to_mean(seen, nodes, share))

  return _counting('fedrot', rule, Traits(), assigns=True)


def _rotation(m: jax.Array) -> jax.Array:
  """Returns the rotation nearest to m, [..., R, R]."""

  def nearest(x):
    u, _, v = jnp.linalg.svd(x)
    sign = jnp.sign(jnp.linalg.det(low_rank.dot(u, v)))
    last = jnp.arange(x.shape[-1]) == x.shape[-1] - 1
    return low_rank.dot(u * jnp.where(last, sign, 1.0), v)

  return linalg.each(nearest, m)


def _counting(name, rule, traits, *, assigns) -> Aggregator:
  """Returns an aggregator of a rule that also takes the number of rounds."""

  def init(params, key):
    del params, key
    return jnp.int32(0)

  def aggregate(uploads, count, params, key):
    inner = by_node(
      name, lambda seen: rule(seen, count), traits, assigns=assigns
    )
    result, _ = inner.aggregate(uploads, (), params, key)
    return result, count + jnp.any(counted(uploads))

  return Aggregator(init, aggregate, traits, weights=by_weight)
