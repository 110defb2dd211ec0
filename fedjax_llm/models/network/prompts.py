"""Adds prompt rows before texts: their number, positions and visibility.

`nodes.prompt` defines the nodes and the conventions; the functions here apply
them to batches and to the keys of attention.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters
from fedjax_llm.models.config import Config, longest_text
from fedjax_llm.models.network import layers
from fedjax_llm.models.network.attention import Places
from fedjax_llm.nodes import protocol
from fedjax_llm.types import Base, Batch, Error, Params, known


class Front(NamedTuple):
  """The prompt rows that an adapter puts in front of every text."""

  prompt: Any  # a node at 'inputs', or None
  prefix: int  # places of the node at 'layers/self_attn/prefix'
  rows: int  # places of the prompt

  @property
  def length(self) -> int:
    return self.prefix + self.rows


def front(params: Params) -> Front:
  """Returns the prompt nodes of an adapter.

  >>> front({})
  Front(prompt=None, prefix=0, rows=0)
  """

  params = protocol.plain(params)

  def child(tree, name):
    return tree.get(name) if isinstance(tree, Mapping) else None

  prompt = child(params, 'inputs')
  prefix = child(child(child(params, 'layers'), 'self_attn'), 'prefix')
  length = lambda node: 0 if node is None else node.length()
  return Front(prompt, length(prefix), length(prompt))


def check(config: Config, own: Front, length: int, remedy: str = '') -> None:
  """Raises `Error` where rows of `length` tokens leave no room for a prompt.

  The sentence ends with the `remedy`, such as the fields of a config to change.
  """
  most = longest_text(config)
  if own.length and own.length + length > most:
    raise Error(
      f'A prompt of {own.length} rows in front of {length} tokens is longer '
      f'than the {most} positions of the {config.family} model{remedy}.'
    )


def choosing(config: Config, batch: Batch) -> Any:
  """Returns the tokens by which texts choose their prompts, bool [B, T].

  In an encoder all tokens of a text; in a causal model those before the first
  token that the loss predicts, which every prediction may read. A row's first
  token is never predicted, so there is always one.
  """
  shape = jnp.shape(batch.tokens)
  there = jnp.broadcast_to(jnp.asarray(batch.segments) > 0, shape)
  if not config.causal:
    return there
  learned = jnp.broadcast_to(jnp.asarray(batch.loss_mask, bool), shape)
  learned = learned & (np.arange(shape[-1]) > 0)
  return there & (jnp.cumsum(learned, axis=-1) == 0)


def settled(base: Base, params: Params, batch: Batch) -> Params:
  """Returns the parameters with the prompts that the texts of a batch choose.

  For generation, where the choice is made once, from the request.

  >>> settled({}, {'layers': {}}, None)
  {'layers': {}}
  """
  node = front(params).prompt
  if not hasattr(node, 'choose'):
    return params
  base, over = adapters.overlay(base, params)
  x = embedded(base, over, batch.tokens, jnp.float32)
  return {**params, 'inputs': node.choose(x, batch.segments > 0)}


def embedded(base: Base, params: Params, tokens: Any, dtype: Any) -> Any:
  """Returns the rows of the table of tokens, [B, T, D]."""
  leaf = params.get('embed_tokens') if isinstance(params, Mapping) else None
  return layers.embed(tokens, base['embed_tokens'], leaf, dtype)


def refuse_packing(config: Config, own: Front, batch: Batch) -> Any:
  """Refuses several texts in a row of an encoder that has a prompt.

  Also where the text chooses its prompt.

  Returns None, or for a traced batch the rows with several texts, [B] bool,
  which the network sets to NaN.
  """
  pooled = hasattr(own.prompt, 'choose')
  if config.causal and not pooled:
    return None
  if not known(batch.segments):
    return jnp.any(batch.segments > 1, axis=-1)
  if np.max(batch.segments, initial=0) > 1:
    if pooled:
      raise Error(
        'A pool of prompts is chosen from by the text, so a row holds one '
        'text; set packing to False.'
      )
    raise Error(
      f'A {config.family} model is an encoder: its prompt sees the text behind '
      'it, so a row holds one text; set packing to False.'
    )
  return None


def whole(
  config: Config, own: Front, batch: Batch, with_rows: bool
) -> tuple[Batch, Places]:
  """Returns the batch with its prompt rows, and the places of its rows.

  Tokens of prompt rows are 0 and never read. In the places of a causal model
  prompt rows have segment 0, and every text sees them (`shared` of
  `attention`); in an encoder they belong to the row's only text.
  """
  wide = lambda x: jnp.broadcast_to(x, jnp.shape(batch.tokens))
  positions = wide(batch.positions + own.length)
  batch = batch._replace(positions=positions, segments=wide(batch.segments))
  if not (with_rows and own.rows):
    return batch, Places(positions, batch.segments)

  def put(x, value, dtype=jnp.int32):
    if x is None:
      return None
    x = jnp.asarray(x)
    new = jnp.broadcast_to(jnp.asarray(value, dtype), (x.shape[0], own.rows))
    return jnp.concatenate([new.astype(x.dtype), x], axis=1)

  at = own.prefix + jnp.arange(own.rows)
  extended = batch._replace(
    tokens=put(batch.tokens, 0),
    loss_mask=put(batch.loss_mask, False, bool),
    segments=put(batch.segments, 1),
    positions=put(positions, at),
    types=put(batch.types, 0),
  )
  segments = put(batch.segments, 0) if config.causal else extended.segments
  return extended, Places(extended.positions, segments)


def before(own: Front, places: Places) -> Places:
  """Returns the places of the keys: those of the prefix, then `places`."""
  if not own.prefix:
    return places
  rows = places.segments.shape[0]
  wide = lambda x: jnp.broadcast_to(x, (rows, own.prefix))
  join = lambda x, y: jnp.concatenate([wide(x), y], axis=1)
  return Places(
    join(jnp.arange(own.prefix), places.positions),
    join(jnp.zeros((), jnp.int32), places.segments),
  )
