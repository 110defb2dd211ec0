"""The arithmetic of a transformer block: plain functions on arrays.

Weights are the base's own dicts ({'kernel': [D, F], 'bias': [F]}); a leaf of
the adapter rides beside each. Norms, rotations and softmax run in float32
whatever the compute dtype is.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error, LowRank

# A finite stand-in for minus infinity: a row without any key stays finite.
MASKED = -1e30

# ---------------------------------------------------------------- weights --


def linear(x, w: Mapping[str, Any], leaf=None, out_dtype=None) -> jax.Array:
  """x @ W (+ bias) + what the adapter adds, [..., D] -> [..., F].

  The one place where an adapter acts:

      LowRank(a, b, scale)    y += scale * (x @ a) @ b
      an array [D, F]         y += x @ delta
      None                    nothing

  The change stays a product of its own, so that under `vmap` over adapters
  the base product is one unbatched matmul with the rows of all clients.

  >>> x = jnp.ones([1, 2])
  >>> w = {'kernel': jnp.eye(2)}
  >>> leaf = LowRank(jnp.ones([2, 1]), jnp.ones([1, 2]), scale=0.5)
  >>> linear(x, w, leaf).tolist()
  [[2.0, 2.0]]
  """
  dtype = x.dtype if out_dtype is None else out_dtype

  def dot(x, kernel):
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)

  y = dot(x, w['kernel'])
  if 'bias' in w:
    y = y + w['bias'].astype(dtype)
  if leaf is None:
    return y
  if not isinstance(leaf, LowRank):
    return y + dot(x, leaf)
  scale = jnp.asarray(leaf.scale, x.dtype)
  y = y + dot((x @ leaf.a.astype(x.dtype)) * scale, leaf.b)
  return y if leaf.residual is None else y + dot(x, leaf.residual)


def embed(tokens, w: Mapping[str, Any], leaf, dtype) -> jax.Array:
  """Rows of the embedding (+ those of a dense change), [...] -> [..., D]."""
  rows = jnp.take(w['embedding'], tokens, axis=0).astype(dtype)
  if leaf is None:
    return rows
  return rows + jnp.take(leaf, tokens, axis=0).astype(dtype)


def rms_norm(x, w: Mapping[str, Any], leaf, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale, [..., D] (arXiv:1910.07467)."""
  scale = w['scale'] if leaf is None else w['scale'] + leaf
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
  return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def check_adapter(base: Any, params: Any, path: tuple[str, ...] = ()) -> None:
  """Raises `Error` where an adapter names a weight that the base lacks."""
  if params is None:
    return
  where = '/'.join(path) or 'the adapter'
  if not isinstance(base, Mapping):
    raise Error(f'The adapter has {where}, which no layer of the model reads.')
  if isinstance(params, Mapping):
    for name, child in params.items():
      if name not in base:
        have = ', '.join(sorted(base))
        raise Error(
          f'The adapter has {"/".join((*path, name))}, but the model has only '
          f'{have} there.'
        )
      check_adapter(base[name], child, (*path, name))
  elif isinstance(params, LowRank) and 'kernel' not in base:
    raise Error(f'A low-rank adapter cannot act on {where}: it is no matrix.')
  elif not {'kernel', 'scale', 'embedding'} & set(base):
    raise Error(f'The adapter has an array at {where}, which is no weight.')


# --------------------------------------------------------------- positions --


class Rope(NamedTuple):
  """Rotary position embedding (arXiv:2104.09864) and how it is stretched.

  `kind` is 'default', 'linear' (frequencies over `factor`) or 'llama3' (only
  the slow ones over `factor`, with a smooth band between).
  """

  kind: str = 'default'
  theta: float = 10000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians a position, float32 [head_dim / 2].

  >>> rope_frequencies(Rope(theta=100.0), 4).round(3).tolist()
  [1.0, 0.10000000149011612]
  """
  frequency = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
  if rope.kind == 'linear':
    frequency = frequency / rope.factor
  elif rope.kind == 'llama3':
    # Turns over the original context: many -> keep, few -> stretch.
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = keep * frequency + (1 - keep) * frequency / rope.factor
  elif rope.kind != 'default':
    raise Error(
      f'rope type {rope.kind!r} is not supported; supported: default, linear, '
      'llama3.'
    )
  return frequency.astype(np.float32)


def rope_angles(positions, frequencies) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32 [..., T, 1, head_dim / 2]."""
  angle = positions.astype(jnp.float32)[..., None, None] * frequencies
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + half) of each head, [B, T, H, head_dim]."""
  cos, sin = angles
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


# --------------------------------------------------------------- attention --


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


def attention(
  q,
  k,
  v,
  queries: Places,
  keys: Places,
  *,
  window=None,
  causal: bool = True,
  implementation: str = 'xla',
  block: int = 128,
) -> jax.Array:
  """softmax(q k^T / sqrt(head_dim)) v over the visible keys.

  `q` [B, T, H, head_dim]; `k`, `v` [B, S, KV, head_dim] where H is a multiple
  of KV: the query heads of one group share their keys, which are never
  repeated. `window` is None, an int or a traced scalar. A query that sees no
  key (padding) gives a finite value without meaning.

  `implementation='blocked'` takes the queries `block` at a time against the
  keys up to their own end, so about half of the products and less memory. It
  is for rows whose tokens stand in the order of their places.
  """
  if implementation == 'xla':
    return _attend(q, k, v, queries, keys, window, causal)
  if implementation != 'blocked':
    raise Error(
      f'attention implementation {implementation!r} is not one of xla, blocked.'
    )
  length = q.shape[1]
  if length != k.shape[1] or not causal or length <= block:
    return _attend(q, k, v, queries, keys, window, causal)
  out = []
  for start in range(0, length, block):
    end = min(start + block, length)
    rows = Places(*(x[:, start:end] for x in queries))
    seen = Places(*(x[:, :end] for x in keys))
    out.append(
      _attend(
        q[:, start:end], k[:, :end], v[:, :end], rows, seen, window, causal
      )
    )
  return jnp.concatenate(out, axis=1)


def _attend(q, k, v, queries, keys, window, causal):
  groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum(
    'btkgd,bskd->bktgs', groups, k, preferred_element_type=jnp.float32
  )
  seen = visible(queries, keys, window, causal)[:, None, :, None, :]
  scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bktgs,bskd->btkgd', weights, v).reshape(q.shape)


# --------------------------------------------------------------------- mlp --

ACTIVATIONS = {'silu': jax.nn.silu}


def gated_mlp(x, w, p: Mapping[str, Any], activation: str) -> jax.Array:
  """down(act(gate x) * up x) (arXiv:2002.05202)."""
  gate = linear(x, w['gate_proj'], p.get('gate_proj'))
  up = linear(x, w['up_proj'], p.get('up_proj'))
  inner = ACTIVATIONS[activation](gate) * up
  return linear(inner, w['down_proj'], p.get('down_proj'))
