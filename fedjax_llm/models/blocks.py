"""One block: attention and a perceptron, with norms around them.

`Config.residual` says where the norms stand and what is added to what.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm.models import layers, rope
from fedjax_llm.models.attention import attention
from fedjax_llm.models.config import Config


class Layer(NamedTuple):
  """What travels through the scan beside the activations."""

  base: Any
  params: Any
  window: Any  # None, a number, or a traced scalar
  angles: Any  # in the scan: (frequencies, factor); in a block: (cos, sin)
  keys: Any = None
  values: Any = None


def child(params: Any, name: str) -> Any:
  return params.get(name) if isinstance(params, Mapping) else None


def block(config: Config, implementation: str, x, layer: Layer, context):
  """One layer, [B, T, D] -> [B, T, D], and its keys and values."""
  w = layer.base
  p: Mapping[str, Any] = layer.params or {}

  def norm(x, name):
    return layers.norm(x, w[name], p.get(name), config.norm, config.norm_eps)

  def attend(y):
    return _attention(config, implementation, y, layer, context)

  def mlp(y):
    return layers.mlp(y, w['mlp'], p.get('mlp') or {}, config.activation)

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
  x = x + y
  return x + mlp(norm(x, 'post_attention_layernorm')), kv


def _attention(config: Config, implementation: str, y, layer: Layer, context):
  queries, keys, slot = context
  w, p = layer.base['self_attn'], child(layer.params, 'self_attn') or {}

  def heads(name, num):
    x = layers.linear(y, w[f'{name}_proj'], p.get(f'{name}_proj'))
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
  if layer.keys is not None:
    put = jax.lax.dynamic_update_slice_in_dim
    k = put(layer.keys, k, slot, axis=1)
    v = put(layer.values, v, slot, axis=1)
  y = attention(
    q,
    k,
    v,
    queries,
    keys,
    window=layer.window,
    causal=config.causal,
    scale=config.score_scale,
    softcap=config.score_cap,
    implementation=implementation,
  )
  y = y.reshape(*y.shape[:2], -1)
  return layers.linear(y, w['o_proj'], p.get('o_proj')), (k, v)
