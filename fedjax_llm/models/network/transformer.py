"""One config-driven network: stacked layers under one `lax.scan`.

    hidden = norm(scan(block)(embed(tokens)));  logits = head(hidden)

The base is a tree of nested dicts with stacked layers, [L, ...]; the adapter
has the same paths for the weights that it changes, and no others. Differences
between layers (windows, rotations) are arrays that the scan walks.

`build` returns the network as a `Model`; `decoding` has the form with a cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fedjax_llm import adapters
from fedjax_llm.models.config import Config, longest_text
from fedjax_llm.models.network import blocks, layers, prompts, rope
from fedjax_llm.models.network.attention import Places, choose
from fedjax_llm.models.network.reading import last_token
from fedjax_llm.nodes import frozen, protocol
from fedjax_llm.types import Base, Batch, Error, Model, Params


def _rematerialised(block: Callable, remat: str, unroll: int) -> Callable:
  # In a rolled loop XLA cannot merge the recomputation with the forward pass.
  prevent_cse = unroll > 1
  if remat == 'none':
    return block
  if remat == 'full':
    return jax.checkpoint(block, prevent_cse=prevent_cse)
  if remat == 'dots':
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, prevent_cse=prevent_cse, policy=policy)
  raise Error(f'remat={remat!r} is not one of none, full, dots.')


def _above(body, remat: str, unroll: int, x, xs: blocks.Layer, num_frozen: int):
  """Scans over layers without derivatives of the weights of the lowest ones.

  A layer's frozen weights are read by its number: a slice of the stack would be
  a copy, and a backward pass would keep one more.
  """
  num = len(jax.tree.leaves(xs.base)[0])
  num_frozen = min(num_frozen, num)

  def numbered(stack, rest):
    def read(x, at):
      index, rest = at
      pick = lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False)
      weights = checkpoint_name(jax.tree.map(pick, stack), 'weights')
      return body(x, rest._replace(base=weights))

    return read, (np.arange(num, dtype=np.int32), rest._replace(base=None))

  def part(tree, index, still):
    cut = lambda x: x[index]
    tree = jax.tree.map(cut, tree)
    return jax.lax.stop_gradient(tree) if still else tree

  low, high = slice(0, num_frozen), slice(num_frozen, num)
  still = jax.lax.stop_gradient(xs.base)
  read, at = numbered(still, xs)
  x, first = jax.lax.scan(read, x, part(at, low, True), unroll=unroll)
  read, at = numbered(xs.base, xs)
  if remat == 'none':  # all is kept but the weights, which are there already
    policy = jax.checkpoint_policies.save_anything_except_these_names('weights')
    read = jax.checkpoint(read, prevent_cse=unroll > 1, policy=policy)
  else:
    read = _rematerialised(read, remat, unroll)
  x, second = jax.lax.scan(read, x, part(at, high, False), unroll=unroll)
  join = lambda a, b: jnp.concatenate([a, b])
  return x, jax.tree.map(join, first, second)


def _embed(
  config: Config, base, params, batch: Batch, dtype, num_rows=0, embedded=None
):
  """Embeds tokens, positions and types, [B, T, D].

  The first `num_rows` tokens are the rows of the adapter's prompt. `embedded`
  [B, T, D] stands in place of the rows of the table of tokens.
  """

  def rows(index, name):
    return layers.embed(index, base[name], blocks.child(params, name), dtype)

  if embedded is None:
    tokens = batch.tokens[:, num_rows:] if num_rows else batch.tokens
    x = rows(tokens, 'embed_tokens')
  else:
    x = embedded.astype(dtype)
  if num_rows:
    x = jnp.concatenate([params['inputs'].before(x), x], axis=1)
  if config.embedding_scale != 1:
    x = x * jnp.asarray(config.embedding_scale, dtype)
  if config.num_learned_positions:
    # A position beyond the table gives NaN; padding may have any position.
    place = jnp.where(batch.segments > 0, batch.positions, 0)
    x = x + rows(place + config.first_position, 'embed_positions')
  if config.num_token_types:
    types = jnp.zeros_like(batch.tokens) if batch.types is None else batch.types
    x = x + rows(types, 'embed_types')
  if config.embedding_norm:
    x = _norm(config, base, params, x, 'embed_norm')
  return x


def _norm(config: Config, base, params, x, name):
  leaf = blocks.child(params, name)
  return layers.norm(x, base[name], leaf, config.norm, config.norm_eps)


def _per_layer(config: Config):
  """Returns windows and (frequencies, factors), [L, ...] if layers differ."""
  for name in ('windows', 'layer_ropes'):
    if len(getattr(config, name)) not in (0, config.num_layers):
      raise Error(
        f'{len(getattr(config, name))} {name} for {config.num_layers} layers.'
      )
  windows = config.windows or (0,)
  if len(set(windows)) > 1:
    windows = np.asarray(windows, np.int32)
  else:  # one static number
    windows = windows[0] or None
  ropes = config.layer_ropes or (config.rope,)
  tables = [rope.rope_frequencies(r, config.rotary_dim) for r in ropes]
  if len(set(ropes)) > 1:
    factors = np.asarray([r.attention_factor for r in ropes], np.float32)
    return windows, (np.stack(tables), factors)
  if ropes[0].kind == 'none':
    return windows, None
  return windows, (tables[0], ropes[0].attention_factor)


def _walk(config, implementation, dtype, remat, unroll):
  """Returns the scan over layers that `build` and `decoder` share."""
  windows, ropes = _per_layer(config)
  mixed_windows = isinstance(windows, np.ndarray)
  mixed_ropes = ropes is not None and ropes[0].ndim > 1
  stretched = config.rope.kind in ('dynamic', 'longrope')

  def walk(
    base,
    params,
    batch,
    cache=None,
    slot=0,
    with_rows=True,
    record=False,
    chosen_layers=None,
    x=None,
    ends=True,
    embedded=None,
    rows=None,
  ):
    """Returns hidden states [B, T, D], keys and values, node statistics.

    `chosen_layers` are the numbers of the layers to compute, None for all; `x`
    are states to start from in place of the embeddings; the last norm is left
    out, and prompt rows are kept, where the part does not end the network.
    `embedded` [B, T, D] are token embeddings in place of the batch's tokens,
    and `rows` [L, P, D] replace the first P states before every layer.
    """
    num_frozen, params = frozen.unmarked(params)
    base, params = adapters.overlay(base, params)
    adapters.check(base, adapters.gates.without(params), places=protocol.BESIDE)
    if config.causal:
      protocol.refuse_whole_texts(params)
    front = prompts.front(params)
    length = jnp.shape(batch.tokens)[-1]
    prompts.check(config, front, length)
    if stretched and cache is None and length > longest_text(config):
      raise Error(
        f'Rows of {length} tokens are longer than the {longest_text(config)} '
        f'up to which the rope type {config.rope.kind!r} is supported.'
      )
    mixed = None
    if front.length:
      mixed = prompts.refuse_packing(config, front, batch)
    chosen = None
    if hasattr(front.prompt, 'choose') and with_rows:
      tokens = prompts.embedded(base, params, batch.tokens, dtype)
      there = prompts.choosing(config, batch)
      node = front.prompt.choose(tokens, there)
      params = {**params, 'inputs': node}
      if record:
        chosen = front.prompt.statistics(tokens, there)
    num_rows = front.rows if with_rows else 0
    queries = Places(batch.positions, batch.segments)
    if front.length:
      batch, queries = prompts.whole(config, front, batch, with_rows)
    keys = prompts.before(front, queries) if cache is None else cache.places
    if x is None:
      x = _embed(config, base, params, batch, dtype, num_rows, embedded)

    def angles(table):
      return rope.rope_angles(batch.positions, *table)

    common = None if mixed_ropes or ropes is None else angles(ropes)
    context = blocks.Context(queries, keys, slot, front.length)
    if config.relative_buckets:
      leaf = blocks.child(params, 'embed_distances')
      table = base['embed_distances']
      table = layers.changed(table, leaf, 'embedding', 'embedding')
      context = context._replace(distances=table)
    real = batch.segments > 0
    if num_rows:
      real &= np.arange(real.shape[-1]) >= num_rows

    def body(x, layer):
      if chosen_layers is not None:  # by its number: no copy of the weights
        at = lambda leaf: jax.lax.dynamic_index_in_dim(
          leaf, layer.base, keepdims=False
        )
        layer = layer._replace(base=jax.tree.map(at, base['layers']))
      layer = layer._replace(
        window=layer.window if mixed_windows else windows,
        angles=angles(layer.angles) if mixed_ropes else common,
      )
      if layer.rows is not None:
        first = jnp.broadcast_to(
          layer.rows.astype(x.dtype), (len(x), *layer.rows.shape[-2:])
        )
        x = jnp.concatenate([first, x[:, first.shape[1] :]], axis=1)
      seen = protocol.Record(real, {} if record else None)
      y, kv = blocks.block(config, implementation, x, layer, context, seen)
      gate = blocks.child(layer.params, adapters.gates.NAME)
      x = y if gate is None else jnp.where(gate > 0, y, x)
      statistics = protocol.statistics_of(layer.params, seen)
      return x, kv, statistics

    def step(x, layer):
      x, _, statistics = body(x, layer)
      return x, statistics

    def step_cached(carry, layer):
      # The stacks are carried: written in place, and never copied whole.
      x, keys, values = carry
      x, kv, statistics = body(x, layer._replace(keys=keys, values=values))
      return (x, *kv), statistics

    xs = blocks.Layer(
      base['layers'],
      blocks.child(params, 'layers'),
      windows if mixed_windows else None,
      ropes if mixed_ropes else None,
      rows=rows,
      number=None if cache is None else np.arange(config.num_layers),
    )
    if chosen_layers is not None:
      some = lambda tree: jax.tree.map(lambda leaf: leaf[chosen_layers], tree)
      xs = blocks.Layer(
        jnp.asarray(chosen_layers),
        some(xs.params),
        some(xs.window),
        some(xs.angles),
      )
      num_frozen = sum(int(i) < num_frozen for i in chosen_layers)
    kv: Any = None
    if cache is not None:
      carry = x, cache.keys, cache.values
      (x, *kv), statistics = jax.lax.scan(step_cached, carry, xs, unroll=unroll)
    elif num_frozen:
      x, statistics = _above(step, remat, unroll, x, xs, num_frozen)
    else:
      x, statistics = jax.lax.scan(
        _rematerialised(step, remat, unroll), x, xs, unroll=unroll
      )
    if not ends:
      return x, kv, {}
    if config.final_norm:
      x = _norm(config, base, params, x, 'norm')
    if mixed is not None:
      x = jnp.where(mixed[:, None, None], jnp.nan, x)
    return (
      x[:, num_rows:] if num_rows else x,
      kv,
      {'layers': statistics, 'inputs': chosen},
    )

  return walk


def head(config: Config, base, params, x, dtype):
  """Computes logits [..., V] (with labels: [..., labels]) from [..., D].

  Raises:
    Error: the network has no head.
  """

  def linear(x, name, **settings):
    return layers.linear(x, base[name], blocks.child(params, name), **settings)

  if config.head == 'none':
    raise Error(
      f'This {config.family} model has no head; pretrained(..., labels=[...]) '
      'gives it a new classifier.'
    )
  act = layers.ACTIVATIONS.get(config.head_activation)
  if config.head == 'classifier':
    if 'pooler' in base:
      x = linear(x, 'pooler')
    return linear(act(x) if act else x, 'classifier', out_dtype=dtype)
  if config.head == 'score':
    return linear(x, 'score', out_dtype=dtype)
  if config.head == 'masked_lm':
    x = linear(x, 'head_dense')
    x = _norm(config, base, params, act(x) if act else x, 'head_norm')
  w, leaf = base.get('lm_head', {}), blocks.child(params, 'lm_head')
  if config.tied:
    rows = blocks.child(params, 'embed_tokens')
    rows = protocol.at(rows, 'embedding', 'embedding')
    w = {**w, 'kernel': base['embed_tokens']['embedding'].T}
    bias = protocol.at(leaf, 'bias', 'bias')
    leaf = {'kernel': None if rows is None else rows.T, 'bias': bias}
  logits = layers.linear(x, w, leaf, out_dtype=dtype)
  return layers.softcapped(logits, config.logit_cap)


def walker(
  config: Config,
  *,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = jnp.float32,
  attention: str = 'auto',
) -> Callable[..., Any]:
  """Returns the scan over layers of a network, with the settings of `build`.

  `walk(base, params, batch, *, x=None, embedded=None, rows=None) -> (states [B,
  T, D], keys and values, statistics)`: `x` [B, T, D] are the states below the
  first layer, `embedded` [B, T, D] the embeddings of the tokens, and `rows` [L,
  P, D] replace the first P states before every layer.
  """
  way = choose(
    attention,
    softcap=config.score_cap,
    distances=config.relative_buckets > 0,
    mixed_windows=len(set(config.windows)) > 1,
    compute_dtype=compute_dtype,
  )
  _rematerialised(blocks.block, remat, unroll)  # raises for a wrong name
  return _walk(config, way, compute_dtype, remat, unroll)


def build(
  config: Config,
  *,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = jnp.float32,
  logits_dtype: Any = jnp.float32,
  attention: str = 'auto',
) -> Model:
  """Returns the network as a `Model` of pure functions.

  `remat`: what the backward pass recomputes ('none', 'full': everything,
  'dots': all but the products with the base). `unroll`: layers for each loop
  iteration. `attention`: 'auto', 'blocked', 'xla', 'cudnn' or 'splash'
  (`attention.py`). Norms, rotations and softmax are in float32 for every dtype.

  >>> from fedjax_llm import models
  >>> loaded = models.random(vocab_size=32)
  >>> one = jnp.ones([1, 4], jnp.int32)
  >>> batch = Batch(one, one > 0, one, jnp.arange(4)[None])
  >>> hidden = loaded.model.hidden(loaded.base, {}, batch)
  >>> loaded.model.logits(loaded.base, {}, hidden).shape
  (1, 4, 32)
  """
  walk = walker(
    config,
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    attention=attention,
  )

  def hidden(base: Base, params: Params, batch: Batch) -> jax.Array:
    return walk(base, params, batch)[0]

  def logits(base: Base, params: Params, hidden: jax.Array) -> jax.Array:
    base, params = adapters.overlay(base, params)
    hidden = hidden.astype(compute_dtype)
    return head(config, base, params, hidden, logits_dtype)

  def hidden_with_statistics(base: Base, params: Params, batch: Batch):
    hidden, _, statistics = walk(base, params, batch, record=True)
    empty = dict.fromkeys(frozen.unmarked(params)[1] or {})
    if 'inputs' not in empty:
      del statistics['inputs']
    return hidden, {**empty, **statistics}

  def layers(base, params, batch, numbers, hidden=None, *, ends=True):
    index = _checked(numbers, config.num_layers)
    return walk(base, params, batch, chosen_layers=index, x=hidden, ends=ends)[
      0
    ]

  read = last_token(config.pad_id) if config.head == 'score' else None
  return Model(hidden, logits, hidden_with_statistics, layers, read)


def _checked(numbers: Sequence[int], num_layers: int) -> np.ndarray:
  """Returns the numbers of layers [M], an `Error` for one out of range."""
  wrong = [i for i in numbers if not 0 <= i < num_layers]
  if wrong:
    raise Error(
      f'layer {wrong[0]} is not one of the {num_layers} layers of the network, '
      f'0 to {num_layers - 1}.'
    )
  return np.asarray(numbers, np.int32).reshape(-1)
