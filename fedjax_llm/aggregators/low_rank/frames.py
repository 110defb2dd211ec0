"""Rules that average in a common frame, or choose the weights of the means.

Builders return an `Aggregator`.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.low_rank.by_node import NOTHING, Seen, by_node
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits

HIGHEST = jax.lax.Precision.HIGHEST


def glora(
  *, frame: int | None = None, weighted: bool = True, split: str = 'b'
) -> Aggregator:
  """Returns GLoRA: the mean in a consensus frame of the clients' outputs.

      U_k = orthonormal basis of b_k's rows,
      U = left vectors of [U_1 ... U_K] / sqrt(K), the `frame` largest,
      s a b = SVD_R((sum_k w_k s_k a_k (b_k U)) U')

  (arXiv 2605.06733.) U spans the leading directions of the mean projector
  1/K sum_k U_k U_k'. The result depends on the clients' products alone, not on
  their factors: (a G, G^-1 b) gives the same. A frame that holds all U_k makes
  it the exact mean product, rounded to rank R. The paper leaves open, as far as
  it is known, the weights of the projectors (here clients count the same), a
  frame of one side or two (here the outputs) and the rounding (here the SVD).

  Args:
    frame: columns of U; None takes R.
    weighted: by the clients' weights; False, every client the same.
    split: the factor that takes the singular values, as in `svd_round`.

  Raises:
    Error: `frame` below one, another `split`; from the round, a factor that is
      frozen or private.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> new = glora().aggregate(sent, (), server, jax.random.key(0))[0].assign
  >>> round((new.a * new.b).item(), 4)
  7.0
  """
  low_rank.check_split('glora', split)
  if frame is not None and frame < 1:
    raise Error(f'glora: frame={frame} must be at least 1.')

  def rule(seen: Seen) -> Aggregate:
    rank = seen.server.a.shape[-1]
    counts = jnp.any(seen.held, axis=-1)[..., None, None]
    basis = jnp.where(counts, _basis(seen.nodes.b), 0.0)  # [K, ..., F, R]
    num = jnp.sum(counts, axis=0).astype(jnp.float32)
    side = jnp.moveaxis(basis, 0, -2)
    side = side.reshape(*side.shape[:-2], -1) / jnp.sqrt(jnp.maximum(num, 1))
    u, _, _ = linalg.svd(side)
    u = u[..., : rank if frame is None else frame]  # [..., F, frame]
    summed = low_rank.stack(seen.nodes, seen.weight)
    left = low_rank.dot(summed.a, low_rank.dot(summed.b, u))
    inside = LowRank(left, jnp.swapaxes(u, -1, -2), summed.scale)
    best = low_rank.svd_round(
      inside, rank, scale=seen.server.scale, split=split
    )
    return Aggregate(NOTHING, LowRank(best.a, best.b, None))

  return by_node(
    'glora',
    rule,
    Traits(changes_basis=True),
    weighted=weighted,
    assigns=True,
  )


def _basis(b: jax.Array) -> jax.Array:
  """Returns orthonormal columns [..., F, R] that span b's rows, else zero."""
  q, r = linalg.qr(jnp.swapaxes(b, -1, -2).astype(jnp.float32))
  u, s, _ = linalg.svd(r)
  some = s > 1e-5 * jnp.max(s, axis=-1, keepdims=True)
  return jnp.where(some[..., None, :], low_rank.dot(q, u), 0.0)


def flora_na(*, weighted: bool = True, sweeps: int = 5) -> Aggregator:
  """Returns FLoRA-NA: means with weights nearest to the mean product.

      a = sum_k q_k a_k,   b = sum_k p_k b_k,
      (p, q) = argmin ||a b - sum_k w_k a_k b_k||_F,   from p = q = w

  (arXiv 2509.26399.) The paper does not give its solver, nor the range of p and
  q; here each matrix has its own, from alternating least squares with a
  small pull to the last iterate, so the error never grows: it is at most that
  of the means and at least that of the best product of rank R. Clients' Gram
  matrices [K R, K R] are all that the solver sees. The bytes are FedIT's.

  Args:
    weighted: w by the clients' weights; False, every client the same.
    sweeps: solutions for p and for q; 0 is the mean of the factors.

  Raises:
    Error: negative `sweeps`; from the round, a private factor.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda a, b: LowRank(*jnp.float32([[[a]], [[b]]]), jnp.float32(1))
  >>> server, sent = node(1, 0), received(node(1, 0), [node(1, 2), node(3, 4)])
  >>> new, _ = flora_na().aggregate(sent, (), server, jax.random.key(0))
  >>> a, b = server.a + new.delta.a, server.b + new.delta.b
  >>> round((a * b).item(), 3)  # the mean product; the means give 2 * 3
  7.0
  """
  if sweeps < 0:
    raise Error(f'flora_na: sweeps={sweeps} must not be negative.')

  def rule(seen: Seen) -> Aggregate:
    nodes, server, update = seen.nodes, seen.server, seen.update
    lead = server.a.shape[:-2]
    share = jnp.broadcast_to(seen.weight, (*lead, len(seen.weight)))
    ratio = jnp.moveaxis(nodes.scale / server.scale, 0, -1)
    goal = share * ratio  # [..., K]
    by_a = _gram(jnp.swapaxes(nodes.a, -1, -2))
    by_b = _gram(nodes.b)
    p = q = share
    for _ in range(sweeps):
      if update.b is not None:
        p = _solved(by_b, by_a, q, p, goal)
      if update.a is not None:
        q = _solved(by_a, by_b, p, q, goal)
    mixed = lambda x, weight: jnp.einsum(
      'k...ij,...k->...ij', x.astype(jnp.float32), weight, precision=HIGHEST
    )
    a = None if update.a is None else mixed(nodes.a, q) - server.a
    b = None if update.b is None else mixed(nodes.b, p) - server.b
    return Aggregate(LowRank(a, b, None))

  return by_node('flora_na', rule, Traits(), weighted=weighted)


def _gram(rows: jax.Array) -> jax.Array:
  """Returns inner products [..., K, R, K, R] of rows [K, ..., R, n]."""
  num, rank = rows.shape[0], rows.shape[-2]
  flat = jnp.moveaxis(rows, 0, -3)
  flat = flat.reshape(*flat.shape[:-3], num * rank, flat.shape[-1])
  gram = low_rank.dot(flat, jnp.swapaxes(flat, -1, -2))
  return gram.reshape(*gram.shape[:-2], num, rank, num, rank)


def _solved(mine, other, fixed, last, goal) -> jax.Array:
  """Returns the weights [..., K] of one factor for fixed ones of the other."""
  einsum = lambda *args: jnp.einsum(*args, precision=HIGHEST)
  across = einsum('...u,...urws->...rws', fixed, other)  # its mean by each
  inner = einsum('...rws,...w->...rs', across, fixed)
  left = einsum('...rs,...vrws->...vw', inner, mine)
  right = einsum('...rws,...vrws,...w->...v', across, mine, goal)
  here = last != 0  # clients left out have no weight
  both = here[..., :, None] & here[..., None, :]
  left = jnp.where(both, left, 0.0)
  size = left.shape[-1]
  pull = 1e-6 * jnp.trace(left, axis1=-2, axis2=-1)[..., None] / size + 1e-30
  eye = jnp.eye(size)
  left = left + jnp.where(here, pull, 1.0)[..., None] * eye
  right = jnp.where(here, right + pull * last, 0.0)
  return linalg.solve(left, right[..., None])[..., 0]
