"""The network for generation: it keeps keys and values of the texts so far.

`decoder` returns a `Decoder`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models.config import Config
from fedjax_llm.models.network import prompts, transformer
from fedjax_llm.models.network.attention import Places
from fedjax_llm.nodes import protocol
from fedjax_llm.types import Batch, Error


class Cache(NamedTuple):
  """Keys and values of the texts so far; slots of segment 0 are empty."""

  keys: Any  # [L, B, KV, S, head_dim], so that a head's keys lie together
  values: Any  # [L, B, KV, S, head_dim]
  places: Places  # [B, S]


class Decoder(NamedTuple):
  """A network with a cache of keys and values, for generation.

  `empty(batch_size, slots) -> Cache` without a prompt;
  `extend(base, params, batch, cache, slot) -> (hidden [B, T, D], Cache)` reads
  the batch's T tokens into the slots from `slot` on;
  `begin(base, params, batch_size, slots) -> Cache` holds the adapter's prompt
  before the slots.
  """

  empty: Callable[[int, int], Cache]
  extend: Callable[..., tuple[jax.Array, Cache]]
  begin: Callable[..., Cache]


# ----------------------------------------------------------------- network --


def decoder(
  config: Config, *, unroll: int = 1, compute_dtype: Any = jnp.float32
) -> Decoder:
  """Returns the network as a `Decoder` with a cache, for generation.

  For an encoder, `extend` raises `Error`.
  """
  walk = transformer.walker(
    config, unroll=unroll, compute_dtype=compute_dtype, attention='blocked'
  )

  def empty(batch_size: int, slots: int) -> Cache:
    shape = (config.num_layers, batch_size, config.num_kv_heads, slots)
    heads = jnp.zeros((*shape, config.head_dim), compute_dtype)
    nothing = jnp.zeros((batch_size, slots), jnp.int32)
    return Cache(heads, heads, Places(nothing, nothing))

  def extend(base, params, batch: Batch, cache: Cache, slot):
    if not config.causal:
      raise Error(f'A {config.family} model is an encoder: it writes no text.')
    put = jax.lax.dynamic_update_slice_in_dim
    length = prompts.front(params).length
    slot = slot + length
    places = Places(
      put(cache.places.positions, batch.positions + length, slot, axis=1),
      put(cache.places.segments, batch.segments, slot, axis=1),
    )
    cache = cache._replace(places=places)
    hidden, (keys, values), _ = walk(
      base, params, batch, cache, slot, with_rows=False
    )
    return hidden, Cache(keys, values, places)

  def begin(base, params, batch_size: int, slots: int) -> Cache:
    params = protocol.plain(params)
    front = prompts.front(params)
    if hasattr(front.prompt, 'choose'):
      raise Error(
        'The prompt of a pool is chosen by the text, which a cache begins '
        'before: pass the parameters of `prompts.settled`.'
      )
    cache = empty(batch_size, front.length + slots)
    if not front.length:
      return cache
    prompts.check(config, front, slots)
    keys, values, places = cache
    at = places.positions.at[:, : front.length].set(np.arange(front.length))
    places = places._replace(positions=at)
    if front.prefix:
      node = params['layers']['self_attn']['prefix']
      turn = functools.partial(jnp.swapaxes, axis1=2, axis2=3)
      ends = jax.vmap(lambda one, like: one.before(like))(node, turn(keys))
      keys = keys.at[:, :, :, : front.prefix].set(turn(ends[0]))
      values = values.at[:, :, :, : front.prefix].set(turn(ends[1]))
    if front.rows:  # prompt rows see no text: they are computed once
      none = jnp.zeros((batch_size, 0), jnp.int32)
      batch = Batch(none, none > 0, none, none)
      cache = Cache(keys, values, places)
      _, (keys, values), _ = walk(base, params, batch, cache, front.prefix)
    return Cache(keys, values, places)

  return Decoder(empty, extend, begin)
