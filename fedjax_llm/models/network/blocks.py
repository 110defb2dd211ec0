"""Computes one block: attention and a perceptron, with norms and residuals.

`Config.residual` selects the order of norms and additions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.models.config import Config
from fedjax_llm.models.network import layers, rope
from fedjax_llm.models.network.attention import Places, attention
from fedjax_llm.nodes import protocol
from fedjax_llm.nodes.protocol import Record


class Layer(NamedTuple):
  """The inputs of one layer in the scan, beside the activations."""

  base: Any
  params: Any
  window: Any  # None, a number, or a traced scalar
  angles: Any  # in the scan: (frequencies, factor); in a block: (cos, sin)
  keys: Any = None  # of the cache, with `values`: the stacks of all layers
  values: Any = None
  rows: Any = None  # [P, D]: they replace the first P rows before the layer
  number: Any = None  # of the layer, in these stacks


def child(params: Any, name: str) -> Any:
  return params.get(name) if isinstance(params, Mapping) else None


class Context(NamedTuple):
  """The inputs that all layers share."""

  queries: Places  # of the tokens, [B, T]
  keys: Places  # of the keys, [B, S]
  slot: Any = 0  # of the cache, where the first token is written
  shared: int = 0  # number of keys in front that every text sees
  distances: Any = None  # [buckets, H]: scores of distances


def block(
  config: Config,
  implementation: str,
  x,
  layer: Layer,
  context: Context,
  record: Record | None = None,
):
  """Computes one layer, [B, T, D] -> [B, T, D], and the stacks of its cache."""
  w = layer.base
  p: Mapping[str, Any] = layer.params or {}

  def norm(x, name):
    return layers.norm(x, w[name], p.get(name), config.norm, config.norm_eps)

  def attend(y):
    return _attention(config, implementation, y, layer, context, record)

  def mlp(y):
    own = p.get('mlp') or {}
    return layers.mlp(y, w['mlp'], own, config.activation, record)

  if config.residual == 'post':
    y, kv = attend(x)
    x = norm(x + y, 'post_attention_layernorm')
    return norm(x + mlp(x), 'post_mlp_layernorm'), kv
  before = norm(x, 'input_layernorm')
  y, kv = attend(before)
  if config.residual == 'shared':
    return x + y + mlp(before), kv
  if config.residual == 'parallel':
    return x + y + mlp(norm(x, 'post_attention_layernorm')), kv
  if config.residual == 'sandwich':
    x = x + norm(y, 'attention_output_norm')
    y = mlp(norm(x, 'post_attention_layernorm'))
    return x + norm(y, 'mlp_output_norm'), kv
  scaled = lambda y, name: layers.scaled(y, w.get(name), p.get(name))
  x = x + scaled(y, 'attention_scale')
  y = mlp(norm(x, 'post_attention_layernorm'))
  return x + scaled(y, 'mlp_scale'), kv


def _attention(
  config: Config,
  implementation: str,
  y,
  layer: Layer,
  context: Context,
  record: Record | None,
):
  w, p = layer.base['self_attn'], child(layer.params, 'self_attn') or {}
  inputs = y

  def heads(name, num):
    leaf = p.get(f'{name}_proj')
    x = layers.linear(y, w[f'{name}_proj'], leaf, record=record)
    x = x.reshape(*x.shape[:2], num, config.head_dim)
    if config.qk_norm and name != 'v':
      name = f'{name}_norm'
      x = layers.norm(x, w[name], p.get(name), config.norm, config.norm_eps)
    return x

  q = heads('q', config.num_heads)
  k = heads('k', config.num_kv_heads)
  v = heads('v', config.num_kv_heads)
  if layer.angles is not None:
    q, k = rope.rotate(q, layer.angles), rope.rotate(k, layer.angles)
  ahead = 0
  cached = layer.keys is not None
  kept: Any = None
  if cached:
    kept = tuple(
      _put(stack, x, layer.number, context.slot)
      for stack, x in ((layer.keys, k), (layer.values, v))
    )
    k, v = (
      jax.lax.dynamic_index_in_dim(stack, layer.number, keepdims=False)
      for stack in kept
    )
  elif p.get('prefix') is not None:  # a cache holds the prefix already
    front = p['prefix'].before(k)
    ahead = front[0].shape[1]
    k, v = (
      jnp.concatenate(pair, axis=1) for pair in zip(front, (k, v), strict=True)
    )
  y = attention(
    q,
    k,
    v,
    context.queries,
    context.keys,
    shared=context.shared,
    ahead=ahead,
    window=layer.window,
    causal=config.causal,
    scale=config.score_scale,
    softcap=config.score_cap,
    implementation=implementation,
    distances=context.distances,
    cached=cached,
  )
  y = y.reshape(*y.shape[:2], -1)
  y = layers.linear(y, w['o_proj'], p.get('o_proj'), record=record)
  y = protocol.act(p.get('parallel'), inputs, y, None, record)
  return y, kept


def _put(stack, x, number, slot):
  """Writes x [B, T, KV, head_dim] into a stack [L, B, KV, S, head_dim]."""
  x = jnp.swapaxes(x, 1, 2)[None]
  return jax.lax.dynamic_update_slice(stack, x, (number, 0, 0, slot, 0))
