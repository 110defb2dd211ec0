"""One config-driven decoder: stacked layers under one `lax.scan`.

    hidden = norm(scan(block)(embed(tokens)));  logits = hidden @ head

A block is  x += attention(norm(x));  x += mlp(norm(x)).  The base is a tree
of nested dicts whose layers are stacked, [L, ...]; the adapter mirrors it down
to the weights that it changes, and is absent elsewhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import layers
from fedjax_llm.models.layers import Places, Rope
from fedjax_llm.types import Base, Batch, Error, Key, Model, Params

# ------------------------------------------------------------------ config --


class Config(NamedTuple):
  """What a network is; static and hashable.

  `windows[l]` is how many places back layer l looks, itself included (0: the
  whole text; an empty tuple: every layer sees the whole text).
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  activation: str = 'silu'
  norm_eps: float = 1e-6
  rope: Rope = Rope()
  windows: tuple[int, ...] = ()
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  tied: bool = False
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None


def shapes(config: Config) -> dict[str, Any]:
  """The shape of every weight, in the structure of the base.

  >>> from fedjax_llm import models
  >>> shapes(models.random().config)['norm']
  {'scale': (64,)}
  """
  c = config
  width, inner = c.hidden_size, c.intermediate_size
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

  def matrix(d, f, bias):
    kernel = {'kernel': (c.num_layers, d, f)}
    return {**kernel, 'bias': (c.num_layers, f)} if bias else kernel

  tree = {
    'embed_tokens': {'embedding': (c.vocab_size, width)},
    'layers': {
      'input_layernorm': {'scale': (c.num_layers, width)},
      'self_attn': {
        'q_proj': matrix(width, heads, c.qkv_bias),
        'k_proj': matrix(width, kv_heads, c.qkv_bias),
        'v_proj': matrix(width, kv_heads, c.qkv_bias),
        'o_proj': matrix(heads, width, c.output_bias),
      },
      'post_attention_layernorm': {'scale': (c.num_layers, width)},
      'mlp': {
        'gate_proj': matrix(width, inner, c.mlp_bias),
        'up_proj': matrix(width, inner, c.mlp_bias),
        'down_proj': matrix(inner, width, c.mlp_bias),
      },
    },
    'norm': {'scale': (width,)},
  }
  if not c.tied:
    tree['lm_head'] = {'kernel': (width, c.vocab_size)}
  return tree


def _is_shape(x: Any) -> bool:
  return isinstance(x, tuple)


def num_params(config: Config) -> int:
  """How many numbers the base holds (tied weights once)."""
  leaves = jax.tree.leaves(shapes(config), is_leaf=_is_shape)
  return sum(math.prod(shape) for shape in leaves)


def init(config: Config, key: Key, dtype: Any = jnp.float32) -> Base:
  """A random base: matrices ~ N(0, 1 / fan-in), norms one, biases zero."""
  paths, structure = jax.tree.flatten_with_path(
    shapes(config), is_leaf=_is_shape
  )

  def leaf(index, path, shape):
    kind = path[-1].key
    if kind == 'scale':
      return jnp.ones(shape, dtype)
    if kind == 'bias':
      return jnp.zeros(shape, dtype)
    fan_in = shape[-1] if kind == 'embedding' else shape[-2]
    noise = jax.random.normal(jax.random.fold_in(key, index), shape)
    return (noise / math.sqrt(fan_in)).astype(dtype)

  return jax.tree.unflatten(
    structure, [leaf(i, path, shape) for i, (path, shape) in enumerate(paths)]
  )


# ------------------------------------------------------------------- cache --


class Cache(NamedTuple):
  """Keys and values of the texts so far; slots of segment 0 are empty."""

  keys: Any  # [L, B, S, KV, head_dim]
  values: Any  # [L, B, S, KV, head_dim]
  places: Places  # [B, S]


class Decoder(NamedTuple):
  """A network that goes on where it stopped.

  `empty(batch_size, slots) -> Cache`;
  `extend(base, params, batch, cache, slot) -> (hidden [B, T, D], Cache)` reads
  the batch's T tokens into the slots from `slot` on.
  """

  empty: Callable[[int, int], Cache]
  extend: Callable[..., tuple[jax.Array, Cache]]


# ----------------------------------------------------------------- network --


class _Layer(NamedTuple):
  """What travels through the scan beside the activations."""

  base: Any
  params: Any
  window: Any
  keys: Any = None
  values: Any = None


def _child(params: Any, name: str) -> Any:
  return params.get(name) if isinstance(params, Mapping) else None


def _block(config: Config, implementation: str, x, layer: _Layer, context):
  """One layer, [B, T, D] -> [B, T, D], and its keys and values."""
  angles, queries, keys, slot = context
  w = layer.base
  p: Mapping[str, Any] = layer.params or {}
  attn_w, attn_p = w['self_attn'], p.get('self_attn') or {}

  def norm(x, name):
    return layers.rms_norm(x, w[name], p.get(name), config.norm_eps)

  def heads(y, name, num):
    y = layers.linear(y, attn_w[name], attn_p.get(name))
    return y.reshape(*y.shape[:2], num, config.head_dim)

  y = norm(x, 'input_layernorm')
  q = layers.rotate(heads(y, 'q_proj', config.num_heads), angles)
  k = layers.rotate(heads(y, 'k_proj', config.num_kv_heads), angles)
  v = heads(y, 'v_proj', config.num_kv_heads)
  if layer.keys is not None:
    put = jax.lax.dynamic_update_slice_in_dim
    k = put(layer.keys, k, slot, axis=1)
    v = put(layer.values, v, slot, axis=1)
  y = layers.attention(
    q,
    k,
    v,
    queries,
    keys,
    window=layer.window,
    implementation=implementation,
  )
  y = y.reshape(*y.shape[:2], -1)
  x = x + layers.linear(y, attn_w['o_proj'], attn_p.get('o_proj'))
  y = norm(x, 'post_attention_layernorm')
  x = x + layers.gated_mlp(y, w['mlp'], p.get('mlp') or {}, config.activation)
  return x, (k, v)


def _rematerialised(block: Callable, remat: str, unroll: int) -> Callable:
  # Inside a rolled loop nothing can be merged with the forward pass anyway.
  prevent_cse = unroll > 1
  if remat == 'none':
    return block
  if remat == 'full':
    return jax.checkpoint(block, prevent_cse=prevent_cse)
  if remat == 'dots':
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, prevent_cse=prevent_cse, policy=policy)
  raise Error(f'remat={remat!r} is not one of none, full, dots.')


def _walk(config, implementation, dtype, remat, unroll):
  """The scan over layers that `build` and `decoder` share."""
  frequencies = layers.rope_frequencies(config.rope, config.head_dim)
  windows = config.windows
  if len(windows) not in (0, config.num_layers):
    raise Error(f'{len(windows)} windows for {config.num_layers} layers.')
  mixed = len(set(windows)) > 1  # otherwise the window is one static number

  def walk(base, params, batch, cache=None, slot=0):
    layers.check_adapter(base, params)
    queries = Places(batch.positions, batch.segments)
    keys = queries if cache is None else cache.places
    angles = layers.rope_angles(batch.positions, frequencies)
    x = layers.embed(
      batch.tokens, base['embed_tokens'], _child(params, 'embed_tokens'), dtype
    )
    context = (angles, queries, keys, slot)
    static = None if mixed or not windows or not windows[0] else windows[0]

    def body(x, layer):
      if not mixed:
        layer = layer._replace(window=static)
      x, kv = _block(config, implementation, x, layer, context)
      return x, (None if cache is None else kv)

    xs = _Layer(
      base['layers'],
      _child(params, 'layers'),
      np.asarray(windows, np.int32) if mixed else None,
      None if cache is None else cache.keys,
      None if cache is None else cache.values,
    )
    x, kv = jax.lax.scan(
      _rematerialised(body, remat, unroll), x, xs, unroll=unroll
    )
    norm_p = _child(params, 'norm')
    return layers.rms_norm(x, base['norm'], norm_p, config.norm_eps), kv

  return walk


def build(
  config: Config,
  *,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = jnp.float32,
  attention: str = 'auto',
) -> Model:
  """The network as two pure functions.

  `remat`: what the backward pass computes again ('none', 'full': everything,
  'dots': all but the products with the base). `unroll`: layers a loop turn.
  `attention`: 'xla', 'blocked', or 'auto' (blocked on CPU for T > 256).

  >>> from fedjax_llm import models
  >>> loaded = models.random(vocab_size=32)
  >>> one = jnp.ones([1, 4], jnp.int32)
  >>> batch = Batch(one, one > 0, one, jnp.arange(4)[None])
  >>> hidden = loaded.model.hidden(loaded.base, {}, batch)
  >>> loaded.model.logits(loaded.base, {}, hidden).shape
  (1, 4, 32)
  """
  walks = {
    name: _walk(config, name, compute_dtype, remat, unroll)
    for name in ('xla', 'blocked')
  }
  if attention not in (*walks, 'auto'):
    raise Error(f'attention={attention!r} is not one of auto, xla, blocked.')
  _rematerialised(_block, remat, unroll)  # a wrong name is told here

  def hidden(base: Base, params: Params, batch: Batch) -> jax.Array:
    name = attention
    if name == 'auto':
      long = jnp.shape(batch.tokens)[-1] > 256
      blocked = long and jax.default_backend() == 'cpu'
      name = 'blocked' if blocked else 'xla'
    return walks[name](base, params, batch)[0]

  def logits(base: Base, params: Params, hidden: jax.Array) -> jax.Array:
    x = hidden.astype(compute_dtype)
    if config.tied:
      leaf = _child(params, 'embed_tokens')
      w = {'kernel': base['embed_tokens']['embedding'].T}
      leaf = None if leaf is None else leaf.T
    else:
      w, leaf = base['lm_head'], _child(params, 'lm_head')
    return layers.linear(x, w, leaf, out_dtype=jnp.float32)

  return Model(hidden, logits)


def decoder(
  config: Config, *, unroll: int = 1, compute_dtype: Any = jnp.float32
) -> Decoder:
  """The network with a cache of keys and values, for generation."""
  walk = _walk(config, 'xla', compute_dtype, 'none', unroll)

  def empty(batch_size: int, slots: int) -> Cache:
    shape = (config.num_layers, batch_size, slots)
    heads = jnp.zeros(
      (*shape, config.num_kv_heads, config.head_dim), compute_dtype
    )
    nothing = jnp.zeros((batch_size, slots), jnp.int32)
    return Cache(heads, heads, Places(nothing, nothing))

  def extend(base, params, batch: Batch, cache: Cache, slot):
    put = jax.lax.dynamic_update_slice_in_dim
    places = Places(
      put(cache.places.positions, batch.positions, slot, axis=1),
      put(cache.places.segments, batch.segments, slot, axis=1),
    )
    cache = cache._replace(places=places)
    hidden, (keys, values) = walk(base, params, batch, cache, slot)
    return hidden, Cache(keys, values, places)

  return Decoder(empty, extend)
