"""Rules that factor a sum of products anew: SVD, energy cuts, QR, sketches.

Builders return an `Aggregator`. The number of columns is static: columns that a
rule cuts off are zero.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.low_rank.by_node import (
  NOTHING,
  Seen,
  by_node,
  grown,
)
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits


def raflora(
  *, weighted: bool = True, keep_unheld: bool = True, split: str = 'both'
) -> Aggregator:
  """Returns raFLoRA: each rank-one product over its holders, then the SVD.

      s a b = SVD_R(sum_i sum_{k: r_k > i} v_ki s_k a_k[:, i] b_k[i]),
      v_ki = w_k / sum_{j: r_j > i} w_j

  (arXiv 2602.13486, algorithm 1.) The paper splits the ranks at the ranks of
  the federation's clients and averages each part over the clients that hold it;
  all columns of a part have the same holders, so the sum runs over columns
  here. Equal ranks are FlexLoRA. Where FlexLoRA counts a missing column as
  zero, and columns of few clients shrink from round to round, here they do not.

  Args:
    weighted: by the clients' weights; False, every client the same.
    keep_unheld: columns that no client of the round holds enter with the
      server's value. The paper's rule for them is not known; False leaves them
      out, as a third party's code does.
    split: the factor that takes the singular values: 'both' (a root each, as in
      the paper), 'a' or 'b'.

  Raises:
    Error: `split` is another word; from the round, a factor that is frozen or
      private.

  >>> from fedjax_llm.aggregators import received
  >>> start = LowRank(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.float32(1))
  >>> ends = [start._replace(a=jnp.eye(2), b=jnp.diag(jnp.array([4.0, x])))
  ...         for x in (2.0, 0.0)]
  >>> sent, rule = received(start, ends, ranks=[2, 1]), raflora()
  >>> new = rule.aggregate(sent, (), start, jax.random.key(0))[0].assign
  >>> jnp.diagonal(new.a @ new.b).round().tolist()  # the small client is heard
  [4.0, 2.0]
  """
  low_rank.check_split('raflora', split)

  def rule(seen: Seen) -> Aggregate:
    nodes = seen.nodes
    holds = seen.held * seen.weight.reshape(-1, *[1] * (seen.held.ndim - 1))
    total = jnp.sum(holds, axis=0)  # [..., R]
    share = holds / jnp.where(total > 0, total, 1.0)  # [K, ..., R]
    ones = jnp.ones_like(seen.weight)
    summed = low_rank.stack(nodes._replace(b=nodes.b * share[..., None]), ones)
    if keep_unheld:
      server = seen.server
      mine = jnp.where(total > 0, 0.0, 1.0)
      own = LowRank(server.a, server.b * mine[..., None], server.scale)
      summed = low_rank.join(summed, own)
    return _rounded(seen, summed, split)

  return by_node(
    'raflora',
    rule,
    Traits(changes_basis=True),
    weighted=weighted,
    assigns=True,
  )


def florist(*, energy: float = 0.9) -> Aggregator:
  """Returns FLoRIST: the stack's singular directions of most of its energy.

      U S V' = sum_k w_k s_k a_k b_k,
      p = min{p: sum_{i<=p} S_i^2 >= energy sum_i S_i^2},
      s a b = U_p S_p V_p',    a with the singular values

  (arXiv 2506.09199.) p is chosen for each matrix, and columns beyond it are
  zero. The server holds the R columns of its adapter, so p is R at most: with R
  of at least the sum of the clients' ranks, energy=1 is the exact mean product,
  as FLoRA's, without a change of the base.

  Args:
    energy: tau; the paper sets it for each task, near 0.9.

  Raises:
    Error: an energy not above 0 or above 1; from the round, a factor that is
      frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> start = LowRank(jnp.eye(2), jnp.zeros((2, 2)), jnp.float32(1))
  >>> end = start._replace(b=jnp.diag(jnp.array([3.0, 1.0])))
  >>> sent, rule = received(start, [end]), florist(energy=0.9)
  >>> new = rule.aggregate(sent, (), start, jax.random.key(0))[0].assign
  >>> (new.a @ new.b).round().tolist()  # 9 of 10 parts of the energy
  [[3.0, 0.0], [0.0, 0.0]]
  """
  _check_energy('florist', energy)

  def rule(seen: Seen) -> Aggregate:
    rank = seen.server.a.shape[-1]
    summed = low_rank.stack(seen.nodes, seen.weight)
    u, s, v = low_rank.svd(summed, rank)
    s = jnp.where(_most(s, energy), s, 0.0)[..., :rank]
    v = jnp.where(s[..., None] > 0, v, 0.0)
    a = u * (s / seen.server.scale[..., None])[..., None, :]
    return Aggregate(NOTHING, _filled(a, v, rank))

  return by_node('florist', rule, Traits(changes_basis=True), assigns=True)


def fedmomentum(*, energy: float = 0.9999) -> Aggregator:
  """Returns FedMomentum: the best product stays, the next goes into the base.

      U S V' = sum_k w_k s_k a_k b_k,
      s a = U_R sqrt(S_R),  b = sqrt(S_R) V_R',  of the R largest,
      W0 <- W0 + U_q S_q V_q' of the others up to the share `energy` of sum S^2

  As in a third party's reading of the method (FedLLM-Factory), which leaves the
  adapter's scale out of the change of the base; here it is in it. The SVD is
  exact (the sketch there has as many columns as the stack). With energy=1 the
  weights served are exactly the mean of the clients'. The download is billed as
  if all directions of the stack beyond R were sent.

  Raises:
    Error: an energy not above 0 or above 1; from the round, a factor that is
      frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> start = LowRank(jnp.ones((2, 1)), jnp.zeros((1, 2)), jnp.float32(1))
  >>> ends = [start._replace(a=a[:, None], b=x * a[None])
  ...         for a, x in zip(jnp.eye(2), (6.0, 2.0))]
  >>> rule, key = fedmomentum(), jax.random.key(0)
  >>> new = rule.aggregate(received(start, ends), rule.init(start, key),
  ...                      start, key)[0].assign
  >>> [x.round().tolist() for x in (new.a @ new.b, new.residual)]
  [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
  """
  _check_energy('fedmomentum', energy)

  def rule(seen: Seen) -> Aggregate:
    rank = seen.server.a.shape[-1]
    summed = low_rank.stack(seen.nodes, seen.weight)
    u, s, v = low_rank.svd(summed, summed.a.shape[-1])
    kept = jnp.where(_most(s, energy), s, 0.0)
    root = jnp.sqrt(s[..., :rank] / seen.server.scale[..., None])
    new = _filled(
      u[..., :rank] * root[..., None, :], v[..., :rank, :] * root[..., None],
      rank,
    )  # fmt: skip
    rest = LowRank(
      u[..., rank:],
      v[..., rank:, :] * kept[..., rank:, None],
      jnp.ones_like(seen.server.scale),
    )
    change = grown(seen.server, low_rank.dense(rest))
    return Aggregate(NOTHING, new._replace(residual=change))

  def rank_down(held):
    return jnp.maximum(jnp.sum(held, axis=(0, -1)) - held.shape[-1], 0)

  return by_node(
    'fedmomentum',
    rule,
    Traits(changes_basis=True, writes_residual=True),
    assigns=True,
    rank_down=rank_down,
  )


def ilora() -> Aggregator:
  """Returns ILoRA's rule: a truncated QR factorisation of the mean product.

      Q T = (sum_k w_k s_k a_k b_k)',   b <- Q[:, :R]',   s a <- T[:R]'

  (arXiv 2511.16069; there B is our b transposed.) Without pivots the first R
  columns of Q span the first R outputs of the product: it is not the best
  product of that rank, which FlexLoRA keeps. The product is not formed: b' =
  Q_1 T_1 of the stack, and T_1 a' = Q_2 T, so that Q = Q_1 Q_2.

  Raises:
    Error: from the round, a factor that is frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> new = ilora().aggregate(sent, (), server, jax.random.key(0))[0].assign
  >>> round((new.a * new.b).item(), 4), round(abs(new.b.item()), 4)
  (7.0, 1.0)
  """
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def rule(seen: Seen) -> Aggregate:
    rank = seen.server.a.shape[-1]
    summed = low_rank.stack(seen.nodes, seen.weight)
    q_1, t_1 = linalg.qr(t(summed.b))
    q_2, rows = linalg.qr(low_rank.dot(t_1, t(summed.a)))
    # The diagonal of T is not negative, so that the factorisation is unique.
    diagonal = jnp.diagonal(rows, axis1=-2, axis2=-1)[..., None, :rank]
    sign = jnp.where(diagonal < 0, -1.0, 1.0)
    b = t(low_rank.dot(q_1, q_2[..., :rank]) * sign)
    a = t(rows)[..., :rank] * sign / seen.server.scale[..., None, None]
    return Aggregate(NOTHING, _filled(a, b, rank))

  return by_node('ilora', rule, Traits(changes_basis=True), assigns=True)


def fedask(*, sketch: int | None = None) -> Aggregator:
  """Returns FedASK's rule, without noise: the SVD from a sketch in two passes.

      Y = sum_k w_k s_k b_k' (a_k' O),   Q = qr(Y),   O [D, sketch] normal,
      P = sum_k w_k s_k a_k (b_k Q),     U S V' = P Q',
      s a = U_R sqrt(S_R),  b = sqrt(S_R) V_R'

  (arXiv 2507.09990, and the authors' code: O is drawn once for all rounds.) In
  both passes clients send sums of skinny matrices, which a secure sum may
  carry. It is exact, FlexLoRA's, once `sketch` reaches the rank of the mean
  product.

  Args:
    sketch: columns of the sketch; None takes R, as the authors' settings do.

  Raises:
    Error: `sketch` below one; from the round, a factor that is frozen or
      private.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> rule, key = fedask(), jax.random.key(0)
  >>> new = rule.aggregate(sent, rule.init(server, key), server, key)[0].assign
  >>> round((new.a * new.b).item(), 4)
  7.0
  """
  if sketch is not None and sketch < 1:
    raise Error(f'fedask: sketch={sketch} must be at least 1.')
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def rule(seen: Seen) -> Aggregate:
    summed = low_rank.stack(seen.nodes, seen.weight)
    *lead, rows, rank = seen.server.a.shape
    size = rank if sketch is None else sketch
    size = min(size, rows, summed.b.shape[-1])
    drawn = jax.random.normal(seen.key, (*lead, rows, size))
    first = low_rank.dot(t(summed.b), low_rank.dot(t(summed.a), drawn))
    q, _ = linalg.qr(first)
    second = low_rank.dot(summed.a, low_rank.dot(summed.b, q))
    return _rounded(seen, LowRank(second, t(q), summed.scale), 'both')

  inner = by_node('fedask', rule, Traits(changes_basis=True), assigns=True)

  def init(params, key):
    inner.init(params, key)  # refuses parameters without factors
    nodes = jax.tree.leaves(params, is_leaf=low_rank.is_node)
    counts = [
      x.b.size // x.b.shape[-2] * (sketch or x.b.shape[-2]) * 4
      for x in filter(low_rank.is_node, nodes)
    ]
    return jax.random.key_data(key), jnp.array(counts, jnp.int32)

  def aggregate(uploads, state, params, key):
    del key  # the same sketch in every round
    first = jax.random.wrap_key_data(state[0])
    result, _ = inner.aggregate(uploads, (), params, first)
    return result, state

  def num_bytes(state, seen):  # Q, in float32
    return state[1], seen

  return inner._replace(
    init=init, aggregate=aggregate, num_bytes=num_bytes, weights=by_weight
  )


# -------------------------------------------------------------------- parts --


def _rounded(seen: Seen, summed: LowRank, split: str) -> Aggregate:
  best = low_rank.svd_round(
    summed, seen.server.a.shape[-1], scale=seen.server.scale, split=split
  )
  return Aggregate(NOTHING, LowRank(best.a, best.b, None))


def _filled(a: jax.Array, b: jax.Array, rank: int) -> LowRank:
  """Returns factors of `rank` columns, with zeros beyond those of a and b."""
  more, lead = (0, rank - a.shape[-1]), [(0, 0)] * (a.ndim - 2)
  return LowRank(
    jnp.pad(a, [*lead, (0, 0), more]), jnp.pad(b, [*lead, more, (0, 0)]), None
  )


def _most(s: jax.Array, energy: float) -> jax.Array:
  """Returns True for the fewest values [..., Q] with that share of sum s^2."""
  square = jnp.square(s)
  before = jnp.cumsum(square, axis=-1) - square
  return before < energy * jnp.sum(square, axis=-1, keepdims=True)


def _check_energy(name: str, energy: float) -> None:
  if not 0 < energy <= 1:
    raise Error(f'{name}: energy={energy} must be above 0 and at most 1.')
