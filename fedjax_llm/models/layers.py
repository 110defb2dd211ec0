"""The arithmetic of a transformer block: plain functions on arrays.

Weights are the base's own dicts ({'kernel': [D, F], 'bias': [F]}); a leaf of
the adapter rides beside each. Norms, rotations and softmax run in float32
whatever the compute dtype is.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import experts
from fedjax_llm.adapters.changes import Amended, Dora, factors, gain, is_node
from fedjax_llm.models import quantised
from fedjax_llm.models.attention import Places as Places
from fedjax_llm.models.attention import attention as attention
from fedjax_llm.models.attention import softcapped as softcapped
from fedjax_llm.types import Error, Experts

# ---------------------------------------------------------------- weights --


def linear(x, w: Mapping[str, Any], leaf=None, out_dtype=None) -> jax.Array:
  """x @ W (+ bias) + what the adapter adds, [..., D] -> [..., F].

  The one place where an adapter acts:

      LowRank(a, b, scale)    y += scale * (x @ a) @ b
      an array [D, F]         y += x @ delta
      Dora(direction, m)      y = gain * (x @ W + the direction's change)
      Experts                 y += what its experts say of x
      {'kernel': leaf, 'bias': array}     both, or one of them
      None                    nothing

  Another node with `factors()` acts as those factors.

  The change stays a product of its own, so that under `vmap` over adapters
  the base product is one unbatched matmul with the rows of all clients. A
  quantised kernel is written out for that product alone; what was folded into
  it is a product of its own (`Amended`).

  >>> from fedjax_llm.types import LowRank
  >>> x = jnp.ones([1, 2])
  >>> w = {'kernel': jnp.eye(2)}
  >>> leaf = LowRank(jnp.ones([2, 1]), jnp.ones([1, 2]), scale=0.5)
  >>> linear(x, w, leaf).tolist()
  [[2.0, 2.0]]
  """
  dtype = x.dtype if out_dtype is None else out_dtype

  def dot(x, kernel):
    if isinstance(kernel, Amended):
      return dot(x, kernel.weight) + dot(x, kernel.change)
    kernel = quantised.dense(kernel, x.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=dtype)

  def plain(kernel):
    if isinstance(kernel, Amended):
      return plain(kernel.weight) + kernel.change
    return quantised.dense(kernel, jnp.float32)

  change = change_of(leaf, 'kernel', 'kernel')
  if isinstance(change, Dora):
    y = linear(x, {'kernel': w['kernel']}, change.direction, dtype)
    y = y * gain(plain(w['kernel']), change).astype(dtype)
  else:
    y = dot(x, w['kernel'])
  if 'bias' in w:
    y = y + changed(w, leaf, 'bias').astype(dtype)
  if change is None or isinstance(change, Dora):
    return y
  if isinstance(change, Experts):
    return y + experts.added(x, change).astype(dtype)
  node = factors(change)
  if node is None:
    return y + dot(x, change)
  scale = jnp.asarray(node.scale, x.dtype)
  y = y + dot((x @ node.a.astype(x.dtype)) * scale, node.b)
  return y if node.residual is None else y + dot(x, node.residual)


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
    if is_node(params) and path[-1] == 'kernel':
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
  elif is_node(params) and 'kernel' not in base:
    raise Error(f'A low-rank adapter cannot act on {where}: it is no matrix.')
  elif not {'kernel', 'scale', 'embedding'} & set(base):
    raise Error(f'The adapter has an array at {where}, which is no weight.')


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
