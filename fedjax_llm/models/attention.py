"""Attention: one function, computed in one of several ways.

    blocked   a block of queries at a time: T x T numbers never exist
    xla       `jax.nn.dot_product_attention`
    cudnn     the same by cuDNN's fused kernel: on GPU, in half precision
    splash    the Pallas kernel of TPUs

All give softmax(cap(scale * q k^T)) v over the visible keys, the softmax in
float32 on queries and keys of any dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error

IMPLEMENTATIONS = ('blocked', 'xla', 'cudnn', 'splash')

# A finite stand-in for minus infinity: a row without any key stays finite.
MASKED = -1e30

GROUPS = 4  # loops over blocks of queries


class Places(NamedTuple):
  """Where tokens stand; both [B, T] int32. Segment 0 is padding."""

  positions: Any
  segments: Any


def visible(queries: Places, keys: Places, window, causal: bool) -> jax.Array:
  """Which keys a query may read, bool [B, T, S].

  The same text, no later place, and fewer than `window` places back (0: the
  whole text). It reads places, not indices, so a cache may have gaps.
  """
  same = queries.segments[:, :, None] == keys.segments[:, None, :]
  distance = queries.positions[:, :, None] - keys.positions[:, None, :]
  seen = same & (keys.segments > 0)[:, None, :]
  if causal:
    seen &= distance >= 0
  if window is not None:
    seen &= (distance < window) | (jnp.asarray(window) == 0)
  return seen


def softcapped(x, cap: float):
  """cap * tanh(x / cap), or x where there is no cap (0)."""
  return cap * jnp.tanh(x / cap) if cap else x


def choose(
  implementation: str,
  *,
  softcap: float = 0.0,
  mixed_windows: bool = False,
  compute_dtype: Any = jnp.float32,
  backend: str | None = None,
) -> str:
  """The way to go: 'auto' is 'xla' on accelerators where it can, or 'blocked'.

  `mixed_windows` says that layers differ in their window; `backend` is that of
  jax unless given.

  Raises:
    Error: a way that does not exist, or not on this backend, for this dtype, a
      soft cap or mixed windows.

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
) -> jax.Array:
  """softmax(cap(scale * q k^T)) v over the visible keys.

  `scale` is 1 / sqrt(head_dim) unless given; cap is `softcapped`.

  `q` [B, T, H, head_dim]; `k`, `v` [B, S, KV, head_dim] where H is a multiple
  of KV: the query heads of one group share their keys, which are never
  repeated. `window` is None, an int or a traced scalar. A query that sees no
  key (padding) gives a finite value without meaning.

  `implementation` is checked by `choose`, which knows the backend. 'blocked'
  takes `block` queries at a time, against the keys up to their own end and no
  further back than the window, and computes the weights again in the backward
  pass; like 'splash', which reads `window` as a constant, it is for rows whose
  texts stand in the order of their places. Rows of up to `block` tokens are
  one block.

  >>> x = jnp.ones([1, 3, 2, 4])
  >>> places = Places(jnp.arange(3)[None], jnp.ones([1, 3], jnp.int32))
  >>> attention(x, x, x, places, places, implementation='xla').shape
  (1, 3, 2, 4)
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  same = {'window': window, 'causal': causal, 'scale': scale}
  if implementation == 'blocked':
    return _blocked(
      q, k, v, queries, keys, softcap=softcap, block=block, **same
    )
  if implementation == 'splash':
    return splash(q, k, v, queries, keys, softcap=softcap, **same)
  if implementation not in IMPLEMENTATIONS or softcap:
    raise Error(f'attention={implementation!r} cannot do this ({softcap=}).')
  seen = visible(queries, keys, window, causal)[:, None]
  fused: Any = implementation
  return jax.nn.dot_product_attention(
    q, k, v, mask=seen, scale=scale, implementation=fused
  )


def plain(q, k, v, queries, keys, *, window, causal, scale, softcap):
  """The formula as it stands: all scores at once, [B, KV, T, H / KV, S]."""
  groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum(
    'btkgd,bskd->bktgs', groups, k, preferred_element_type=jnp.float32
  )
  seen = visible(queries, keys, window, causal)[:, None, :, None, :]
  scores = jnp.where(seen, softcapped(scores * scale, softcap), MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bktgs,bskd->btkgd', weights, v).reshape(q.shape)


def _blocked(q, k, v, queries, keys, *, window, block, causal, **settings):
  length, size = q.shape[1], k.shape[1]
  attend = functools.partial(plain, window=window, causal=causal, **settings)
  if length <= block:
    return attend(q, k, v, queries, keys)
  num = -(-length // block)

  def split(x):
    x = jnp.pad(
      x, [(0, 0), (0, num * block - length)] + [(0, 0)] * (x.ndim - 2)
    )
    return jnp.moveaxis(x.reshape(x.shape[0], num, block, *x.shape[2:]), 1, 0)

  blocks = jax.tree.map(split, (q, queries))
  # The slots of a cache may hold tokens in any order.
  ordered = causal and length == size
  back = int(window) if ordered and isinstance(window, int | np.integer) else 0
  reach = min(block + back - 1, size) if back else size

  def near(index, block_of_q, places):
    """One block against the keys of its window."""
    start = jnp.clip(index * block - back + 1, 0, size - reach)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, reach, axis=1)
    return attend(block_of_q, cut(k), cut(v), places, jax.tree.map(cut, keys))

  def upto(end):
    """One block against the keys before `end`."""
    cut = lambda x: x[:, :end]

    def one(_, block_of_q, places):
      return attend(block_of_q, cut(k), cut(v), places, jax.tree.map(cut, keys))

    return one

  # Loops, since a compiler may run what is unrolled all at once; and their
  # bodies anew in the backward pass: the weights of all blocks together would
  # be T x T numbers again. A few loops, each up to its own last key, save
  # most of what the causal mask allows.
  groups = 1 if reach < size or not ordered else min(GROUPS, num)
  out = []
  for group in range(groups):
    part = slice(num * group // groups, num * (group + 1) // groups)
    end = min(part.stop * block, size) if ordered else size
    body = jax.checkpoint(
      near if reach < size else upto(end), prevent_cse=False
    )
    xs = jax.tree.map(lambda x, part=part: x[part], blocks)
    out.append(
      jax.lax.map(lambda x, f=body: f(*x), (np.arange(num)[part], *xs))
    )
  out = jnp.moveaxis(jnp.concatenate(out), 0, 1)
  return out.reshape(q.shape[0], num * block, *q.shape[2:])[:, :length]


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
  """Block-sparse flash attention as a Pallas kernel of TPUs.

  Rows are padded to a multiple of 128 tokens; blocks that the causal mask and
  the window leave empty are skipped. `interpret` runs the kernel's program
  anywhere, slowly.
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
