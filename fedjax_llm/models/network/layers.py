"""The arithmetic of a transformer block: plain functions on arrays.

Weights are the base's dicts ({'kernel': [D, F], 'bias': [F]}), each with a leaf
of the adapter as the next argument. Norms, rotations and softmax are computed
in float32 for every compute dtype.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.models.network.attention import Places as Places
from fedjax_llm.models.network.attention import attention as attention
from fedjax_llm.models.network.attention import softcapped as softcapped
from fedjax_llm.nodes import protocol
from fedjax_llm.nodes.dense import times
from fedjax_llm.nodes.protocol import Record

# ---------------------------------------------------------------- weights --


def linear(
  x,
  w: Mapping[str, Any],
  leaf: Any = None,
  out_dtype: Any = None,
  record: Record | None = None,
) -> jax.Array:
  """Returns x @ W (+ bias) with the adapter's change, [..., D] -> [..., F].

  The only function that applies an adapter to a matrix. `leaf` is a node on W,
  or a dict of nodes at 'kernel', 'bias', 'input' and 'output', which act as
  `nodes.protocol` defines; `record` gathers the statistics of nodes that have
  any.

  The change is a separate product, so that under `vmap` over adapters the base
  product is one unbatched matmul with the rows of all clients. A quantised
  kernel is dequantised for this product only; a dense change that was folded
  into it is a separate product (`nodes.Amended`).

  >>> from fedjax_llm.nodes import LowRank
  >>> x = jnp.ones([1, 2])
  >>> w = {'kernel': jnp.eye(2)}
  >>> leaf = LowRank(jnp.ones([2, 1]), jnp.ones([1, 2]), scale=0.5)
  >>> linear(x, w, leaf).tolist()
  [[2.0, 2.0]]
  """
  on = lambda name: protocol.at(leaf, name)
  kernel = w['kernel']
  x = protocol.act(on('input'), x, x, None, record)
  y = times(x, kernel, x.dtype if out_dtype is None else out_dtype)
  y = protocol.act(on('kernel'), x, y, kernel, record)
  if 'bias' in w:
    y = y + changed(w, leaf, 'bias').astype(y.dtype)
  return protocol.act(on('output'), x, y, None, record)


def changed(w: Mapping[str, Any], leaf: Any, name: str, main: str = 'kernel'):
  """Returns the vector `name` of a module with the adapter's change."""
  change = protocol.at(leaf, name, main)
  if change is None:
    return w[name]
  if protocol.is_node(change):
    return protocol.write(change, w[name])
  return w[name] + change  # not rounded to the weight's dtype


def embed(tokens, w: Mapping[str, Any], leaf, dtype) -> jax.Array:
  """Looks up embedding rows (+ a dense change of them), [...] -> [..., D]."""
  rows = jnp.take(w['embedding'], tokens, axis=0).astype(dtype)
  leaf = protocol.at(leaf, 'embedding', 'embedding')
  if leaf is None:
    return rows
  return rows + jnp.take(leaf, tokens, axis=0).astype(dtype)


def scaled(x, w: Mapping[str, Any] | None, leaf: Any = None) -> jax.Array:
  """Returns x times a layer scale (arXiv:2103.17239); x itself without one."""
  if w is None:
    return x
  return x * changed(w, leaf, 'gain', 'gain').astype(x.dtype)


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
  wide = _unit(eps, wide) * scale
  if kind == 'layer':
    wide = wide + changed(w, leaf, 'bias', 'scale').astype(jnp.float32)
  return wide.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unit(eps: float, x):
  """Returns x / sqrt(mean(x^2) + eps) over the last axis.

  Its derivative is written with the result u: (t - u mean(u t)) / sqrt(...), so
  that u is the only array of this size that is kept for a backward pass. Sums
  of products are contractions, there and in the backward pass: on a CPU they
  take a fifth of the time of a product and a sum.
  """
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


@_unit.defjvp
def _unit_jvp(eps, primals, tangents):
  (x,), (t,) = primals, tangents
  root = jax.lax.rsqrt(jnp.mean(x**2, -1) + eps)
  u = x * root[..., None]
  mean = _einsum('...d,...d->...', u, t) / x.shape[-1]
  return u, root[..., None] * t + _einsum('...d,...->...d', u, -root * mean)


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


# --------------------------------------------------------------------- mlp --

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
  'tanh': jnp.tanh,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': _gelu_tanh,
  'gelu_pytorch_tanh': _gelu_tanh,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _activated(name: str, x, times=None):
  """Returns act(x), or act(x) * times.

  Of each factor of the derivative one array is kept for a backward pass:
  act'(x) * times and act(x), instead of every step of the activation.
  """
  y = ACTIVATIONS[name](x)
  return y if times is None else y * times


@_activated.defjvp
def _activated_jvp(name, primals, tangents):
  x, times = primals
  y, slope = jax.jvp(ACTIVATIONS[name], (x,), (jnp.ones_like(x),))
  if times is None:
    return y, slope * tangents[0]
  return y * times, (slope * times) * tangents[0] + y * tangents[1]


def mlp(
  x,
  w,
  p: Mapping[str, Any],
  activation: str,
  record: Record | None = None,
) -> jax.Array:
  """Computes down(act(up x)), or down(act(gate x) * up x) with a gate.

  The gated form is that of arXiv:2002.05202.
  """
  project = lambda x, name: linear(x, w[name], p.get(name), record=record)
  inner = project(x, 'up_proj')
  if 'gate_proj' in w:
    inner = _activated(activation, project(x, 'gate_proj'), inner)
  else:
    inner = _activated(activation, inner)
  y = project(inner, 'down_proj')
  return protocol.act(p.get('parallel'), x, y, None, record)
