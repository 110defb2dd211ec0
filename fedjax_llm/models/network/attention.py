"""Attention: one function with several implementations.

    blocked   a block of queries at a time: T x T numbers are never stored
    xla       `jax.nn.dot_product_attention`
    cudnn     the same by cuDNN's fused kernel: on GPU, in half precision
    splash    the Pallas kernel of TPUs

All compute softmax(cap(scale * q k^T)) v over the visible keys, with the
softmax in float32 for queries and keys of any dtype.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fedjax_llm.types import Error

IMPLEMENTATIONS = ('blocked', 'xla', 'cudnn', 'splash')

# A finite stand-in for minus infinity: a row without any key stays finite.
MASKED = -1e30

GROUPS = 4  # loops over blocks of queries


class Places(NamedTuple):
  """Positions and segments of tokens, both [B, T] int32; segment 0: padding."""

  positions: Any
  segments: Any


def visible(
  queries: Places, keys: Places, window, causal: bool, shared: int = 0
) -> jax.Array:
  """Returns the mask of the keys that each query may read, bool [B, T, S].

  A query reads keys of the same text, at no later position, and fewer than
  `window` positions back (0: the whole text). Positions are used, not indices,
  so a cache may have gaps. The first `shared` keys are visible to every text.
  """
  same = queries.segments[:, :, None] == keys.segments[:, None, :]
  distance = queries.positions[:, :, None] - keys.positions[:, None, :]
  seen = same & (keys.segments > 0)[:, None, :]
  if shared:
    seen |= np.arange(keys.segments.shape[1]) < shared
  if causal:
    seen &= distance >= 0
  if window is not None:
    seen &= (distance < window) | (jnp.asarray(window) == 0)
  return seen


def softcapped(x, cap: float):
  """Returns cap * tanh(x / cap), or x for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def buckets(distance, num: int, largest: int = 128) -> jax.Array:
  """Returns the bucket of each distance of a key from its query, int32.

  Half of the buckets are for keys in front of their query, half for those
  behind; half of these hold one distance each, the others grow with its
  logarithm up to `largest` (T5, arXiv:1910.10683, as MPNet uses them).

  >>> buckets(jnp.array([0, -1, 1, -300]), 32).tolist()
  [0, 1, 17, 15]
  """
  half = num // 2
  exact = half // 2
  far = jnp.abs(distance)
  ratio = jnp.log(jnp.maximum(far, 1) / exact) / math.log(largest / exact)
  grown = exact + (ratio * (half - exact)).astype(jnp.int32)
  near = jnp.where(far < exact, far, jnp.minimum(grown, half - 1))
  return near + jnp.where(distance > 0, half, 0)


def _of_distances(table, queries: Places, keys: Places) -> jax.Array:
  """Returns the scores [B, H, T, S] of the distances of keys to queries."""
  distance = keys.positions[:, None, :] - queries.positions[:, :, None]
  scores = jnp.take(table, buckets(distance, table.shape[0]), axis=0)
  return jnp.moveaxis(scores.astype(jnp.float32), -1, 1)


def choose(
  implementation: str,
  *,
  softcap: float = 0.0,
  distances: bool = False,
  mixed_windows: bool = False,
  compute_dtype: Any = jnp.float32,
  backend: str | None = None,
) -> str:
  """Returns the name of the implementation to use, resolving 'auto'.

  'auto' is 'xla' on accelerators if the model has no soft cap, else 'blocked'.
  `distances` is True if distances have scores, `mixed_windows` if layers differ
  in their window; `backend` defaults to that of jax.

  Raises:
    Error: an unknown implementation, or one that does not support this backend,
      this dtype, a soft cap or mixed windows.

  >>> choose('auto', backend='cpu'), choose('auto', backend='gpu')
  ('blocked', 'xla')
  """
  backend = jax.default_backend() if backend is None else backend
  if implementation == 'auto':
    return 'blocked' if backend == 'cpu' or softcap else 'xla'
  if implementation not in IMPLEMENTATIONS:
    raise Error(
      f'attention={implementation!r} is not one of auto, '
      f'{", ".join(IMPLEMENTATIONS)}.'
    )
  needs = {'cudnn': 'gpu', 'splash': 'tpu'}.get(implementation, backend)
  dtype = jnp.dtype(compute_dtype).name
  why = None
  if backend != needs:
    why = f'runs on {needs.upper()} only, and this is {backend.upper()}'
  elif implementation == 'cudnn' and dtype not in ('bfloat16', 'float16'):
    why = f'computes in bfloat16 or float16, and compute_dtype is {dtype}'
  elif implementation in ('xla', 'cudnn') and softcap:
    why = f'has no soft cap, and the scores of this model have one ({softcap})'
  elif implementation in ('splash', 'cudnn') and distances:
    why = 'has no scores of distances, and this model has them'
  elif implementation == 'splash' and mixed_windows:
    why = 'has one window, and the layers of this model have several'
  if why is not None:
    raise Error(f'attention={implementation!r} {why}: use auto.')
  return implementation


def attention(
  q,
  k,
  v,
  queries: Places,
  keys: Places,
  *,
  window=None,
  causal: bool = True,
  scale: float | None = None,
  softcap: float = 0.0,
  implementation: str = 'blocked',
  block: int = 128,
  shared: int = 0,
  ahead: int = 0,
  distances: Any = None,
  cached: bool = False,
) -> jax.Array:
  """Computes softmax(cap(scale * q k^T) + bias) v over the visible keys.

  `scale` defaults to 1 / sqrt(head_dim); cap is `softcapped`.

  `q` [B, T, H, head_dim]; `k`, `v` [B, S, KV, head_dim] where H is a multiple
  of KV: the query heads of one group share their keys, which are never
  repeated. `window` is None, an int or a traced scalar. A query without a
  visible key (padding) gets a finite value without meaning.

  `implementation` is checked by `choose`. 'blocked' takes `block` queries at a
  time, against the keys up to their own end and no further back than the
  window, and recomputes the weights in the backward pass. 'blocked' and
  'splash' need rows with tokens in the order of their positions; 'splash' needs
  a constant `window`. Rows of up to `block` tokens are one block.

  The first `shared` keys are prompt rows, visible to every text, with segment 0
  so that each query sees them once; the first `ahead` of them have no query, so
  that S = ahead + T in self-attention. `cached`: 'blocked' gets `k` and `v` as
  a cache holds them, [B, KV, S, head_dim].

  `distances` [buckets, H] are scores that are added by the distance of the key
  (`buckets`).

  >>> x = jnp.ones([1, 3, 2, 4])
  >>> places = Places(jnp.arange(3)[None], jnp.ones([1, 3], jnp.int32))
  >>> attention(x, x, x, places, places, implementation='xla').shape
  (1, 3, 2, 4)
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  same = {'window': window, 'causal': causal, 'scale': scale}
  if implementation == 'blocked':
    same = {**same, 'softcap': softcap, 'shared': shared}
    same.update(distances=distances, block=block, ahead=ahead, cached=cached)
    return _blocked(q, k, v, queries, keys, **same)
  if implementation == 'splash':
    if shared:
      raise Error(
        "attention='splash' has no prompt rows that several texts see: use "
        'auto.'
      )
    return splash(q, k, v, queries, keys, softcap=softcap, **same)
  if implementation not in IMPLEMENTATIONS or softcap:
    raise Error(f'attention={implementation!r} cannot do this ({softcap=}).')
  seen = visible(queries, keys, window, causal, shared)[:, None]
  fused: Any = implementation
  bias = None
  if distances is not None:
    bias = _of_distances(distances, queries, keys)
  return jax.nn.dot_product_attention(
    q, k, v, bias=bias, mask=seen, scale=scale, implementation=fused
  )


def _heads_first(
  q,
  k,
  v,
  queries,
  keys,
  *,
  window,
  causal,
  scale,
  softcap,
  shared,
  distances,
):
  """Computes attention of q [B, KV, G, T, D] to k, v [B, KV, S, D].

  Divides by the sum of the weights after the product, so that the weights are
  the only T x S array that is written.
  """
  scores = jnp.einsum(
    'bkgtd,bksd->bkgts', q * scale, k, preferred_element_type=jnp.float32
  )
  seen = visible(queries, keys, window, causal, shared)[:, None, None]
  scores = softcapped(scores, softcap)
  if distances is not None:
    bias = _of_distances(distances, queries, keys)
    scores = scores + bias.reshape(scores.shape)
  # A sum and no selection, so that it is fused with the product: next to MASKED
  # a finite score is rounded away.
  scores = scores + jnp.where(seen, 0.0, MASKED)
  largest = scores.max(-1, keepdims=True)
  # The normalised weights do not depend on the subtracted maximum.
  weights = jnp.exp(scores - _kept(jax.lax.stop_gradient(largest)))
  total = _kept(weights.sum(-1, keepdims=True))
  out = jnp.einsum(
    'bkgts,bksd->bkgtd',
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return _divided(out, total).astype(v.dtype)


@jax.custom_jvp
def _divided(out, total):
  """Returns out [..., D] / total [..., 1].

  In a backward pass the sum of products is a contraction, as in `layers.norm`.
  """
  return out / total


@_divided.defjvp
def _divided_jvp(primals, tangents):
  (out, total), (t, moved) = primals, tangents
  y = _kept(out / total)
  precision = jax.lax.Precision.HIGHEST
  product = jnp.einsum('...d,...->...d', y, moved[..., 0], precision=precision)
  return y, (t - product) / total


# Saved for the backward pass of a block: everything but the T x S arrays.
_kept = functools.partial(checkpoint_name, name='attention')
_again = functools.partial(
  jax.checkpoint,
  prevent_cse=False,
  policy=jax.checkpoint_policies.save_only_these_names('attention'),
)


def _blocked(
  q,
  k,
  v,
  queries,
  keys,
  *,
  window,
  block,
  causal,
  shared,
  ahead,
  cached=False,
  **settings,
):
  if not cached:
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
  length, heads, size = q.shape[1], k.shape[1], k.shape[2]
  settings.update(window=window, causal=causal, shared=shared)
  attend = functools.partial(_heads_first, **settings)
  q = jnp.moveaxis(q.reshape(*q.shape[:2], heads, -1, q.shape[-1]), 1, 3)

  def merged(out):
    out = jnp.moveaxis(out, 3, 1)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])

  if length <= block:
    return merged(attend(q, k, v, queries, keys))
  num = -(-length // block)

  def split(x, axis):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, num * block - length)
    x = jnp.pad(x, pad)
    x = x.reshape(*x.shape[:axis], num, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  blocks = split(q, 3), jax.tree.map(lambda x: split(x, 1), queries)
  # The slots of a cache may hold tokens in any order.
  ordered = causal and length == size - ahead
  back = int(window) if ordered and isinstance(window, int | np.integer) else 0
  reach = min(block + back - 1, size) if back else size

  def near(index, block_of_q, places):
    """Computes one block against the keys of its window and the shared keys."""
    start = jnp.clip(ahead + index * block - back + 1, 0, size - reach)

    def cut(x, axis):
      part = jax.lax.dynamic_slice_in_dim(x, start, reach, axis)
      if not shared:
        return part
      front = jax.lax.slice_in_dim(x, 0, shared, axis=axis)
      return jnp.concatenate([front, part], axis)

    own = jax.tree.map(lambda x: cut(x, 1), keys)
    return attend(block_of_q, cut(k, 2), cut(v, 2), places, own)

  def upto(end):
    """Returns a function that computes one block against keys before `end`."""
    own = jax.tree.map(lambda x: x[:, :end], keys)
    return lambda _, block_of_q, places: attend(
      block_of_q, k[:, :, :end], v[:, :, :end], places, own
    )

  # Loops, since a compiler may run unrolled blocks at the same time; their
  # bodies are recomputed in the backward pass, since the weights of all blocks
  # together are T x T numbers. A few loops, each up to its own last key, skip
  # most of the keys that the causal mask hides.
  groups = 1 if reach < size or not ordered else min(GROUPS, num)
  out = []
  for group in range(groups):
    part = slice(num * group // groups, num * (group + 1) // groups)
    end = min(ahead + part.stop * block, size) if ordered else size
    body = _again(near if reach < size else upto(end))
    xs = jax.tree.map(lambda x, part=part: x[part], blocks)
    out.append(
      jax.lax.map(lambda x, f=body: f(*x), (np.arange(num)[part], *xs))
    )
  out = jnp.moveaxis(jnp.concatenate(out), 0, 3)
  out = out.reshape(*out.shape[:3], num * block, out.shape[-1])
  return merged(out[..., :length, :])


def splash(
  q,
  k,
  v,
  queries: Places,
  keys: Places,
  *,
  window: int | None = None,
  causal: bool = True,
  scale: float,
  softcap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Computes block-sparse flash attention with a Pallas kernel for TPUs.

  Rows are padded to a multiple of 128 tokens; blocks that the causal mask and
  the window leave empty are skipped. `interpret` runs the kernel slowly on any
  backend.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  if q.shape[1] != k.shape[1]:
    raise Error("attention='splash' reads a text against itself only.")
  pad = -q.shape[1] % 128
  length = q.shape[1] + pad
  wide = lambda x: jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  shape = (length, length)
  if causal:
    back = None if not window else window - 1
    mask = kernels.LocalMask(shape, (back, 0), 0)
  else:
    mask = kernels.FullMask(shape)
  side = next(n for n in (512, 256, 128) if length % n == 0)
  blocks = kernels.BlockSizes(
    **dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute'), side),
    **dict.fromkeys(('block_q_dkv', 'block_kv_dkv'), side),
    **dict.fromkeys(('block_kv_dkv_compute', 'block_q_dq'), side),
    block_kv_dq=side,
  )
  kernel = kernels.make_splash_mha(
    kernels.MultiHeadMask([mask] * q.shape[2]),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap or None,
    interpret=interpret,
  )
  heads = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
  segments = wide(queries.segments)
  out: Any = jax.vmap(kernel)(
    heads(wide(q * jnp.asarray(scale, q.dtype))),
    heads(wide(k)),
    heads(wide(v)),
    kernels.SegmentIds(segments, segments),
  )
  return heads(out)[:, : q.shape[1]].astype(q.dtype)
