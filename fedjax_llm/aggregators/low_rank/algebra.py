"""Low-rank algebra: functions on stacks of products s_k a_k b_k of factors.

Most return a `LowRank` node; only `dense` makes a matrix of [D, F].

A stack of `LowRank` nodes has a of [K, ..., D, R], b of [K, ..., R, F] and
scale of [K, ...]; the dots are the layers, and everything is batched over them.
A weight [K] sums to one (`tree.normalise`). All is computed in float32 with
full-precision products: accelerators would round the factors to TF32 or
bfloat16.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error


def is_node(x: object) -> bool:
  """Returns True for a `LowRank` node."""
  return isinstance(x, LowRank)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns x @ y in float32, batched, in full precision."""
  wide = lambda z: z.astype(jnp.float32)
  return jnp.matmul(wide(x), wide(y), precision=jax.lax.Precision.HIGHEST)


def _transpose(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _of(weight: jax.Array, stacked: jax.Array) -> jax.Array:
  """Reshapes a weight [K] to broadcast against [K, ...]."""
  return weight.reshape((-1,) + (1,) * (stacked.ndim - 1))


def _side_by_side(a: jax.Array) -> jax.Array:
  """Concatenates factors a [K, ..., D, R] to [..., D, K R]."""
  a = jnp.moveaxis(a, 0, -2)
  return a.reshape(*a.shape[:-2], -1)


def _one_over_other(b: jax.Array) -> jax.Array:
  """Concatenates factors b [K, ..., R, F] to [..., K R, F]."""
  b = jnp.moveaxis(b, 0, -3)
  return b.reshape(*b.shape[:-3], -1, b.shape[-1])


# ------------------------------------------------------------------- stacks --


def stack(nodes: LowRank, weight: jax.Array) -> LowRank:
  """Returns one node with the exact product sum_k w_k s_k a_k b_k.

      a = [a_1 ... a_K]    [..., D, K R]
      b = [w_1 s_1 b_1; ...; w_K s_K b_K]    [..., K R, F],    scale = 1

  The aggregation of FLoRA (Wang et al. 2024, arXiv 2409.05976, section 3.2),
  with scales that may differ between clients.

  >>> nodes = LowRank(jnp.array([[[1.0]], [[2.0]]]),  # [K, D, R]
  ...                 jnp.array([[[3.0]], [[5.0]]]), jnp.array([1.0, 0.5]))
  >>> dense(stack(nodes, jnp.array([0.5, 0.5])))  # (3 + 5) / 2
  Array([[4.]], dtype=float32)
  """
  factor = _of(weight, nodes.scale) * nodes.scale
  b = nodes.b.astype(jnp.float32) * factor[..., None, None]
  return LowRank(
    a=_side_by_side(nodes.a.astype(jnp.float32)),
    b=_one_over_other(b),
    scale=jnp.ones_like(nodes.scale[0]),
  )


def mean(nodes: LowRank, weight: jax.Array) -> LowRank:
  """Returns the means of the factors, sum_k w_k a_k and sum_k w_k b_k (FedIT).

  The product of the means is not the mean of the products: see `residual`. The
  scale is that of the first client: scales are never averaged.
  """
  a, b = tree.weighted_sum((nodes.a, nodes.b), weight)
  return LowRank(a, b, nodes.scale[0])


def residual(
  nodes: LowRank, weight: jax.Array, served: LowRank | None = None
) -> LowRank:
  """Returns the error of served factors: sum_k w_k s_k a_k b_k - s a b.

  The result is a node. With s b'_k = s_k b_k it is

      sum_k w_k (a_k - a)(b'_k - b) + a (sum_k w_k b'_k - b)
        + (sum_k w_k a_k - a) b

  times s. Where a and b are the means the last two terms vanish and the first
  is the weighted covariance of the factors between clients, of rank at most
  (K - 1) R; no two large numbers are subtracted. `served=None` takes the means
  and returns K R columns, otherwise there are (K + 2) R.
  """
  exact = served is None
  served = mean(nodes, weight) if exact else served
  a_k, b_k = nodes.a.astype(jnp.float32), nodes.b.astype(jnp.float32)
  if not exact:
    b_k = b_k * (nodes.scale / served.scale)[..., None, None]
  da, db = a_k - served.a, b_k - served.b
  a = _side_by_side(da)
  b = _one_over_other(db * _of(weight, db))
  if not exact:
    mean_a, mean_b = tree.weighted_sum((da, db), weight)
    a = jnp.concatenate([a, served.a, mean_a], -1)
    b = jnp.concatenate([b, mean_b, served.b], -2)
  return LowRank(a, b, served.scale)


# -------------------------------------------------------------------- nodes --


def dense(node: LowRank) -> jax.Array:
  """Returns scale a b, [..., D, F], without the node's residual."""
  return dot(node.a, node.b) * node.scale[..., None, None]


def svd_round(
  node: LowRank,
  rank: int,
  *,
  scale: jax.Array | None = None,
  split: str = 'b',
) -> LowRank:
  """Returns the nearest product of a rank in Frobenius norm (Eckart, Young).

  It takes the QR of either factor and an SVD of the small matrix between. A
  factor with a side no longer than the node's rank stays as it is, so no matrix
  exceeds the smaller of both. The first r columns of the result are the best
  product of rank r for every r <= `rank`, so they serve clients of any rank.

  Args:
    node: usually a `stack`, rank Q = K R.
    rank: columns of the result; zeros fill those beyond the sides.
    scale: of the result, [...]; that of the node if None.
    split: the factor that takes the singular values: 'b' (a has orthonormal
      columns, as in FlexLoRA, arXiv 2402.11505), 'a', or 'both' (a root each).

  Raises:
    Error: `split` is another word; a rank below one.

  >>> node = LowRank(jnp.eye(2), jnp.diag(jnp.array([3.0, 1.0])), jnp.ones(()))
  >>> dense(svd_round(node, 1)).round(4).tolist()
  [[3.0, 0.0], [0.0, 0.0]]
  """
  check_split('svd_round', split)
  if rank < 1:
    raise Error(f'svd_round: rank={rank} must be at least 1.')
  scale = node.scale if scale is None else scale
  ratio = (node.scale / scale)[..., None, None]
  u, s, v = svd(node._replace(b=node.b.astype(jnp.float32) * ratio), rank)
  s = s[..., :rank]
  if split == 'both':
    root = jnp.sqrt(s)
    a, b = u * root[..., None, :], v * root[..., :, None]
  elif split == 'a':
    a, b = u * s[..., None, :], v
  else:
    a, b = u, v * s[..., :, None]
  more = (0, rank - a.shape[-1])
  lead = [(0, 0)] * (a.ndim - 2)
  return LowRank(
    jnp.pad(a, [*lead, (0, 0), more]),
    jnp.pad(b, [*lead, more, (0, 0)]),
    jnp.asarray(scale),
  )


def svd(node: LowRank, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns u, s, v of a b without the scale, and all its singular values.

  u is [..., D, r], v [..., r, F] with r = min(rank, Q), s is [..., Q], where Q
  is the smallest of the node's rank and the sides. Computed as `svd_round`.

  >>> node = LowRank(jnp.eye(2), jnp.diag(jnp.array([3.0, 1.0])), jnp.ones(()))
  >>> u, s, v = svd(node, 1)
  >>> u.shape, s.tolist(), v.shape
  ((2, 1), [3.0, 1.0], (1, 2))
  """
  q_a, r_a = _qr(node.a.astype(jnp.float32))
  q_b, r_b = _qr(_transpose(node.b).astype(jnp.float32))
  u, s, v = linalg.svd(dot(r_a, _transpose(r_b)))
  u, v = u[..., :rank], _transpose(v)[..., :rank]
  u = u if q_a is None else dot(q_a, u)
  v = v if q_b is None else dot(q_b, v)
  return u, s, _transpose(v)


def join(*nodes: LowRank) -> LowRank:
  """Returns one node with the sum of the nodes' products, of scale one.

  >>> one = LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(3))
  >>> dense(join(one, one)).tolist()
  [[6.0, 6.0], [6.0, 6.0]]
  """
  b = [x.b.astype(jnp.float32) * x.scale[..., None, None] for x in nodes]
  return LowRank(
    jnp.concatenate([x.a.astype(jnp.float32) for x in nodes], -1),
    jnp.concatenate(b, -2),
    jnp.ones_like(nodes[0].scale),
  )


def check_split(name: str, split: str) -> None:
  """Raises `Error` if `split` is not 'a', 'b' or 'both'."""
  if split not in ('a', 'b', 'both'):
    raise Error(f"{name}: split={split!r} is none of 'a', 'b', 'both'.")


def _qr(x: jax.Array) -> tuple[jax.Array | None, jax.Array]:
  """Returns x = q r; q is None, the identity, if r would not be smaller."""
  if x.shape[-1] >= x.shape[-2]:
    return None, x
  return linalg.qr(x)


def _grams(node: LowRank) -> tuple[jax.Array, jax.Array]:
  return dot(_transpose(node.a), node.a), dot(node.b, _transpose(node.b))


def fro_norm(node: LowRank) -> jax.Array:
  """Returns ||scale a b||_F = |scale| sqrt(tr((a'a)(b b'))), [...].

  >>> node = LowRank(jnp.ones((4, 1)), jnp.ones((1, 9)), jnp.float32(-2.0))
  >>> float(fro_norm(node))
  12.0
  """
  aa, bb = _grams(node)
  square = jnp.sum(aa * bb, axis=(-1, -2))
  return jnp.abs(node.scale) * tree.root(jnp.maximum(square, 0.0))


def effective_rank(node: LowRank) -> jax.Array:
  """Returns (sum_i s_i^2)^2 / sum_i s_i^4 of a b's singular values, [...].

  The participation ratio: r for r equal singular values, 1 if one dominates,
  0 for a product that is zero. It is computed from Gram matrices.

  >>> node = LowRank(jnp.eye(5), 3 * jnp.eye(5), jnp.ones(()))
  >>> round(float(effective_rank(node)), 4)
  5.0
  """
  aa, bb = _grams(node)
  # Normalised first: the fourth powers would leave float32's range.
  aa, bb = (
    g / jnp.maximum(_trace(g), 1e-30)[..., None, None] for g in (aa, bb)
  )
  both = dot(aa, bb)
  second = jnp.sum(both * _transpose(both), axis=(-1, -2))
  some = second > 0
  return jnp.where(
    some, jnp.square(_trace(both)) / jnp.where(some, second, 1.0), 0.0
  )


def _trace(x: jax.Array) -> jax.Array:
  return jnp.trace(x, axis1=-2, axis2=-1)


def ridge(
  nodes: LowRank, weight: jax.Array, served: LowRank, penalty: float
) -> jax.Array:
  """Returns the correction c that brings a (b + c) nearest the mean product.

      min_c || sum_k w_k a_k b_k - a (b + c) ||^2 + penalty ||c||^2
      c = (a'a + penalty I)^-1 a' (sum_k w_k a_k b_k - a b)    [..., R, F]

  The closed form of LoRA-FAIR's server problem (Bian et al. 2025, arXiv
  2411.14961, section 4.2) in squared Frobenius norms. Scales that differ
  between clients are taken relative to the served one. It is computed through
  matrices of [R, K R] and [R, R].

  Raises:
    Error: a penalty that is not positive: a'a may be singular.
  """
  if not penalty > 0:
    raise Error(f'ridge: penalty={penalty} must be positive.')
  missed = residual(nodes, weight, served)
  a_t = _transpose(served.a)
  right = dot(dot(a_t, missed.a), missed.b)
  gram = dot(a_t, served.a) + penalty * jnp.eye(a_t.shape[-2])
  return linalg.solve(gram, right)
