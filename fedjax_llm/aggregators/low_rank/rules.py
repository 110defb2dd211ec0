"""Rules on whole factors: exact, corrected, and for clients of mixed ranks.

Builders return an `Aggregator`.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.low_rank.by_node import (
  NOTHING,
  Seen,
  by_node,
  grown,
  moved_to_mean,
  per_client,
)
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits, known


def fedex(
  *, weighted: bool = False, residual_rank: int | None = None
) -> Aggregator:
  """Returns FedEx-LoRA: the mean of the factors, with its error in the base.

      a = mean a_k,  b = mean b_k,  W0 <- W0 + s (mean a_k b_k - a b)

  so that the effective weights are exactly the mean of the clients' effective
  weights (Singhal et al. 2025, arXiv 2410.09432, section 4). The residual has
  rank (K - 1) R at most. A client receives the residuals of all rounds since it
  last took part, as factors of their ranks or as one matrix where that is less;
  its state records the ranks received. The rule is exact while the server adds
  the mean as it is (`server.sgd(1.0)`) and downloads are not compressed.

  Args:
    weighted: by the clients' weights; False, every client the same, as in the
      authors' code.
    residual_rank: keep only the best product of that rank of the residual;
      None keeps all of it.

  Raises:
    Error: `residual_rank` below one; from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, rule = node(1, 0), fedex()
  >>> sent = received(server, [node(1, 2), node(3, 4)])
  >>> key = jax.random.key(0)
  >>> new, _ = rule.aggregate(sent, rule.init(server, key), server, key)
  >>> tree.add(server, new.delta).a.item(), tree.add(server, new.delta).b.item()
  (2.0, 3.0)
  >>> new.assign.residual.item()  # (1 * 2 + 3 * 4) / 2 - 2 * 3
  1.0
  """
  if residual_rank is not None and residual_rank < 1:
    raise Error(f'fedex: residual_rank={residual_rank} must be at least 1.')

  def rule(seen: Seen) -> Aggregate:
    missed = low_rank.residual(seen.nodes, seen.weight, seen.served())
    if residual_rank is not None:
      missed = low_rank.svd_round(missed, residual_rank)
    change = grown(seen.server, low_rank.dense(missed))
    return Aggregate(seen.update, NOTHING._replace(residual=change))

  def rank_down(held):
    # A covariance of n clients spans n - 1 directions, each of R columns.
    num_clients = jnp.sum(jnp.any(held, axis=-1), axis=0)
    rank = jnp.maximum(num_clients - 1, 0) * held.shape[-1]
    return rank if residual_rank is None else jnp.minimum(rank, residual_rank)

  return by_node(
    'fedex',
    rule,
    Traits(writes_residual=True),
    weighted=weighted,
    rank_down=rank_down,
  )


def flora() -> Aggregator:
  """Returns FLoRA: the stacked product goes into the base; factors start anew.

      W0 <- W0 + sum_k w_k s_k a_k b_k,   a ~ U(+-1/sqrt(D)),   b = 0

  exact for any mix of ranks (Wang et al. 2024, arXiv 2409.05976, section 3.2).
  The download is the stack, with the sum of the clients' ranks as its rank, and
  the stacks of the rounds that a client missed, or one dense change where that
  is less. The new a is drawn from the round's key, as in `adapters.lora`.

  Raises:
    Error: from the round, a factor that is frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, rule, key = node(1, 0), flora(), jax.random.key(0)
  >>> sent = received(server, [node(1, 2), node(3, 4)])
  >>> state = rule.init(server, key)
  >>> new = rule.aggregate(sent, state, server, key)[0].assign
  >>> new.residual.item(), new.b.item()  # (1 * 2 + 3 * 4) / 2
  (7.0, 0.0)
  """

  def rule(seen: Seen) -> Aggregate:
    change = low_rank.dense(low_rank.stack(seen.nodes, seen.weight))
    a, b = seen.server.a, seen.server.b
    bound = a.shape[-2] ** -0.5
    fresh = jax.random.uniform(seen.key, a.shape, jnp.float32, -bound, bound)
    new = LowRank(fresh, jnp.zeros_like(b), None, grown(seen.server, change))
    return Aggregate(NOTHING, new)

  return by_node(
    'flora',
    rule,
    Traits(changes_basis=True, writes_residual=True),
    assigns=True,
    rank_down=lambda held: jnp.sum(held, axis=(0, -1)),
  )


def lora_fair(*, penalty: float = 0.01) -> Aggregator:
  """Returns LoRA-FAIR: mean factors, with b corrected to the mean product.

      a = mean a_k,   b = mean b_k + c,
      c = argmin ||mean a_k b_k - a (mean b_k + c)||^2 + penalty ||c||^2

  (Bian et al. 2025, arXiv 2411.14961, section 4.) The paper does not fix the
  distance; in squared Frobenius norms c has the closed form of
  `low_rank.ridge`, through matrices of the size of the rank. Kernels here are
  (in, out), so this b is the paper's B transposed.

  Args:
    penalty: lambda, on factors without the scale.

  Raises:
    Error: `penalty` is not positive; from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> rule = lora_fair(penalty=1e-6)
  >>> key = jax.random.key(0)
  >>> new, _ = rule.aggregate(sent, rule.init(server, key), server, key)
  >>> round(new.delta.b.item(), 3)  # a is 2 and the mean product 7
  3.5
  """
  if known(penalty) and not penalty > 0:
    raise Error(f'lora_fair: penalty={penalty} must be positive.')

  def rule(seen: Seen) -> Aggregate:
    if seen.update.b is None:  # frozen: there is nothing to correct
      return Aggregate(seen.update)
    better = low_rank.ridge(seen.nodes, seen.weight, seen.served(), penalty)
    return Aggregate(seen.update._replace(b=seen.update.b + better))

  return by_node('lora_fair', rule, Traits())


def zero_padding(
  *, weighted: bool = True, keep_unheld: bool = True
) -> Aggregator:
  """Returns the mean of whole factors, with zeros for clients' missing ranks.

      a = sum_k w_k [a_k 0],   b = sum_k w_k [b_k; 0]

  A client without a rank counts with the value zero, as in papers that pad; in
  `masked_mean('weight')` it counts with no change. With full ranks it is the
  mean.

  Args:
    weighted: by the clients' weights; False counts all clients the same.
    keep_unheld: ranks that no client of the round holds keep the server's
      value. False is the papers' formula, which sets them to zero in both
      factors; their gradients are then zero too, so they never come back.

  Raises:
    Error: from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda x: LowRank(jnp.full((1, 2), x), jnp.zeros((2, 1)), 1.0)
  >>> sent = received(node(1.0), [node(4.0), node(8.0)], ranks=[1, 2])
  >>> new, _ = zero_padding().aggregate(sent, (), node(1.0), jax.random.key(0))
  >>> tree.add(node(1.0).a, new.delta.a).tolist()
  [[6.0, 4.0]]
  """

  def rule(seen: Seen) -> Aggregate:
    share = per_client(seen.weight, seen.nodes.scale)
    held = seen.held if keep_unheld else None
    return Aggregate(moved_to_mean(seen, seen.nodes, share, held))

  return by_node('zero_padding', rule, Traits(), weighted=weighted)


def norm_weighted(
  *, per: str = 'client', keep_unheld: bool = True
) -> Aggregator:
  """Returns HetLoRA's mean, weighted by the norms of the clients' products.

      p_k = ||s_k a_k b_k||_F / sum_j ||s_j a_j b_j||_F,
      a = sum_k p_k a_k,   b = sum_k p_k b_k

  of factors that are padded with zeros to the server's rank (Cho et al. 2024,
  arXiv 2401.06432, section 3.2). The paper does not define the range of the
  norm: 'client' takes all products of a client together, 'target' each layer of
  each target by itself. The weights of the round apply where all products are
  zero, and, with 'target', on leaves outside of `LowRank` nodes and in metrics.

  Args:
    per: 'client' or 'target'.
    keep_unheld: ranks that no client with a share holds keep the server's
        value. False is the paper's formula, which sets them to zero permanently
        (see `zero_padding`).

  Raises:
    Error: `per` is another word; from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 1), node(1, 3)])
  >>> rule = norm_weighted()
  >>> key = jax.random.key(0)
  >>> new, _ = rule.aggregate(sent, rule.init(server, key), server, key)
  >>> new.delta.b.item()  # 1 / 4 * 1 + 3 / 4 * 3
  2.5
  """
  if per not in ('client', 'target'):
    raise Error(f"norm_weighted: per={per!r} is neither 'client' nor 'target'.")

  def rule(seen: Seen) -> Aggregate:
    nodes = seen.nodes
    share = per_client(seen.weight, nodes.scale)  # [K, ...]
    if per == 'target':
      norms = jnp.where(share > 0, low_rank.fro_norm(nodes), 0.0)
      total = jnp.sum(norms, axis=0)
      some = total > 0
      share = jnp.where(some, norms / jnp.where(some, total, 1.0), share)
    held = seen.held if keep_unheld else None
    return Aggregate(moved_to_mean(seen, nodes, share, held))

  inner = by_node('norm_weighted', rule, Traits())
  if per == 'target':
    return inner

  def weights(uploads):
    nodes = jax.tree.leaves(tree.whole(uploads), is_leaf=low_rank.is_node)
    square = sum(
      jnp.sum(
        jnp.square(low_rank.fro_norm(x)).reshape(x.scale.shape[0], -1), axis=1
      )
      for x in nodes
      if low_rank.is_node(x)
    )
    norms = jnp.where(counted(uploads), tree.root(jnp.asarray(square)), 0.0)
    return jnp.where(jnp.sum(norms) > 0, norms, by_weight(uploads))

  def aggregate(uploads, state, params, key):
    own = uploads._replace(weight=weights(uploads))
    return inner.aggregate(own, state, params, key)

  return inner._replace(aggregate=aggregate, weights=weights)


def replication(*, weighted: bool = True) -> Aggregator:
  """Returns the mean, with missing ranks copied from the largest clients.

      a_k[:, i] <- sum_{j in top} w_j a_j[:, i] / sum_{j in top} w_j

  for every column i that client k does not hold, the rows of b likewise; then
  the weighted mean. `top` are the clients that hold the most ranks (Byun and
  Lee 2025, arXiv 2406.17477, with clients of two sizes: there it is the mean
  over the holders). Ranks that no client holds keep the server's value.

  Raises:
    Error: from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda x: LowRank(jnp.full((1, 2), x), jnp.zeros((2, 1)), 1.0)
  >>> sent = received(node(1.0), [node(4.0), node(8.0)], ranks=[1, 2])
  >>> new, _ = replication().aggregate(sent, (), node(1.0), jax.random.key(0))
  >>> tree.add(node(1.0).a, new.delta.a).tolist()
  [[6.0, 8.0]]
  """

  def rule(seen: Seen) -> Aggregate:
    held = seen.held
    count = jnp.sum(held, axis=-1)  # [K, ...]
    top = count == jnp.max(count, axis=0)  # held is False for those left out
    share = jnp.where(top, per_client(seen.weight, count), 0.0)
    share = share / jnp.maximum(jnp.sum(share, axis=0), 1e-30)

    def filled(whole, old, mask):
      replica = jnp.sum(share[..., None, None] * whole, axis=0)
      owned = jnp.any(mask, axis=0)
      return jnp.where(mask, whole, jnp.where(owned, replica, old))

    nodes = seen.nodes._replace(
      a=filled(seen.nodes.a, seen.server.a, held[..., None, :]),
      b=filled(seen.nodes.b, seen.server.b, held[..., :, None]),
    )
    return Aggregate(moved_to_mean(seen, nodes, per_client(seen.weight, count)))

  return by_node('replication', rule, Traits(), weighted=weighted)
