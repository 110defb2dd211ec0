"""The arithmetic of a transformer block: plain functions on arrays.

Weights are the base's own dicts ({'kernel': [D, F], 'bias': [F]}); a leaf of
the adapter rides beside each. Norms, rotations and softmax run in float32
whatever the compute dtype is.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import Error, LowRank

# A finite stand-in for minus infinity: a row without any key stays finite.
MASKED = -1e30

# ---------------------------------------------------------------- weights --


def linear(x, w: Mapping[str, Any], leaf=None, out_dtype=None) -> jax.Array:
  """x @ W (+ bias) + what the adapter adds, [..., D] -> [..., F].

  The one place where an adapter acts:

      LowRank(a, b, scale)    y += scale * (x @ a) @ b
      an array [D, F]         y += x @ delta
      {'kernel': leaf, 'bias': array}     both, or one of them
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
    y = y + changed(w, leaf, 'bias').astype(dtype)
  leaf = change_of(leaf, 'kernel', 'kernel')
  if leaf is None:
    return y
  if not isinstance(leaf, LowRank):
    return y + dot(x, leaf)
  scale = jnp.asarray(leaf.scale, x.dtype)
  y = y + dot((x @ leaf.a.astype(x.dtype)) * scale, leaf.b)
  return y if leaf.residual is None else y + dot(x, leaf.residual)


def change_of(leaf: Any, name: str, main: str) -> Any:
  """What an adapter's leaf says about the weight `name` of a module.

  A leaf that is no dict is about the module's `main` weight.
  """
  if isinstance(leaf, Mapping):
    return leaf.get(name)
  return leaf if name == main else None


def changed(w: Mapping[str, Any], leaf: Any, name: str, main: str = 'kernel'):
  """The weight `name` with the adapter's dense change, if there is one."""
  change = change_of(leaf, name, main)
  return w[name] if change is None else w[name] + change


def embed(tokens, w: Mapping[str, Any], leaf, dtype) -> jax.Array:
  """Rows of the embedding (+ those of a dense change), [...] -> [..., D]."""
  rows = jnp.take(w['embedding'], tokens, axis=0).astype(dtype)
  leaf = change_of(leaf, 'embedding', 'embedding')
  if leaf is None:
    return rows
  return rows + jnp.take(leaf, tokens, axis=0).astype(dtype)


def norm(x, w: Mapping[str, Any], leaf, kind: str, eps: float) -> jax.Array:
  """Normalises the last axis, in float32.

  rms             x / sqrt(mean(x^2) + eps) * scale  (arXiv:1910.07467)
  rms_plus_one    the same times (1 + scale)
  layer           (x - mean) / sqrt(var + eps) * scale + bias
                  (arXiv:1607.06450)
  """
  scale = changed(w, leaf, 'scale', 'scale').astype(jnp.float32)
  wide = x.astype(jnp.float32)
  if kind == 'layer':
    wide = wide - jnp.mean(wide, -1, keepdims=True)
  elif kind == 'rms_plus_one':
    scale = 1 + scale
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
  wide = wide * scale
  if kind == 'layer':
    wide = wide + changed(w, leaf, 'bias', 'scale').astype(jnp.float32)
  return wide.astype(x.dtype)


def check_adapter(base: Any, params: Any, path: tuple[str, ...] = ()) -> None:
  """Raises `Error` where an adapter names a weight that the base lacks."""
  if params is None:
    return
  where = '/'.join(path) or 'the adapter'
  if not isinstance(base, Mapping):  # a weight: {'bias': change} of a module
    if isinstance(params, LowRank) and path[-1] == 'kernel':
      return
    if getattr(params, 'shape', None) != base.shape:
      raise Error(
        f'The adapter has {where}, which no layer of the model reads.'
      )
    return
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
  scale: float | None = None,
  softcap: float = 0.0,
  implementation: str = 'xla',
  block: int = 128,
) -> jax.Array:
  """softmax(cap(scale * q k^T)) v over the visible keys.

  `scale` is 1 / sqrt(head_dim) unless given; cap is `softcapped`.

  `q` [B, T, H, head_dim]; `k`, `v` [B, S, KV, head_dim] where H is a multiple
  of KV: the query heads of one group share their keys, which are never
  repeated. `window` is None, an int or a traced scalar. A query that sees no
  key (padding) gives a finite value without meaning.

  `implementation='blocked'` takes the queries `block` at a time against the
  keys up to their own end, so about half of the products and less memory. It
  is for rows whose tokens stand in the order of their places.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  attend = functools.partial(
    _attend, window=window, causal=causal, scale=scale, cap=softcap
  )
  if implementation == 'xla':
    return attend(q, k, v, queries, keys)
  if implementation != 'blocked':
    raise Error(
      f'attention implementation {implementation!r} is not one of xla, blocked.'
    )
  length = q.shape[1]
  if length != k.shape[1] or not causal or length <= block:
    return attend(q, k, v, queries, keys)
  out = []
  for start in range(0, length, block):
    end = min(start + block, length)
    rows = Places(*(x[:, start:end] for x in queries))
    seen = Places(*(x[:, :end] for x in keys))
    out.append(attend(q[:, start:end], k[:, :end], v[:, :end], rows, seen))
  return jnp.concatenate(out, axis=1)


def softcapped(x, cap: float):
  """cap * tanh(x / cap), or x where there is no cap (0)."""
  return cap * jnp.tanh(x / cap) if cap else x


def _attend(q, k, v, queries, keys, *, window, causal, scale, cap):
  groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum(
    'btkgd,bskd->bktgs', groups, k, preferred_element_type=jnp.float32
  )
  seen = visible(queries, keys, window, causal)[:, None, :, None, :]
  scores = jnp.where(seen, softcapped(scores * scale, cap), MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bktgs,bskd->btkgd', weights, v).reshape(q.shape)


# --------------------------------------------------------------------- mlp --

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
  'tanh': jnp.tanh,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': _gelu_tanh,
  'gelu_pytorch_tanh': _gelu_tanh,
}


def mlp(x, w, p: Mapping[str, Any], activation: str) -> jax.Array:
  """down(act(up x)), or down(act(gate x) * up x) where there is a gate
  (arXiv:2002.05202)."""
  act = ACTIVATIONS[activation]
  inner = linear(x, w['up_proj'], p.get('up_proj'))
  if 'gate_proj' in w:
    inner = act(linear(x, w['gate_proj'], p.get('gate_proj'))) * inner
  else:
    inner = act(inner)
  return linear(inner, w['down_proj'], p.get('down_proj'))
