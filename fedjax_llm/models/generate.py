"""Generates text with a model, greedy or sampled, many prompts at once.

Rows of a batch may use different adapters (`tenants`). Prompts are padded on
the right to a few lengths, so that few programs are compiled. Attention masks
by positions, not by cache slots: the gap between a short prompt and its reply
is padding that is never read.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import tenants
from fedjax_llm.models.files import requests
from fedjax_llm.models.files.load import LoadedModel
from fedjax_llm.models.network.decoding import Decoder
from fedjax_llm.models.network.prompts import front, settled
from fedjax_llm.types import Base, Batch, Error, Key, Model, Params


def generate(
  model: LoadedModel | Model,
  base: Base,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  eos_id: int | Sequence[int] | None = None,
  key: Key | None = None,
  seeds: Sequence[int] | None = None,
  adapters: Sequence[Params] = (),
  which: Sequence[int] | None = None,
  batch_size: int = 32,
) -> list[list[int]]:
  """Returns the new tokens of each prompt, without the stop token.

  Greedy at `temperature` 0, otherwise sampled from softmax(logits /
  temperature) with `key`, folded with the prompt's seed (`seeds`, by default
  its place in the list) and the number of the new token, so that a reply does
  not depend on the other prompts. With `top_p` < 1 tokens are sampled from the
  smallest set of likeliest tokens with that total probability (Holtzman et al.
  2019, arXiv:1904.09751, section 3.1), and those that tie with its last token.

  Either all prompts use `params`, or prompt i uses `adapters[which[i]]` (-1:
  no adapter) and `params` is empty; the adapters' ranks may differ. A
  `LoadedModel` keeps keys and values in a cache; a bare `Model` reads the whole
  text again for each token, with the same result.

  A soft prompt or a prefix of an adapter (`nodes.Prompt`, `nodes.Prefix`) comes
  before its texts and takes one of the model's positions for each row.
  Requests whose prompts have the same number of rows share a batch.

  Raises `Error` for an empty prompt, a token outside the vocabulary, a text
  longer than the model's positions, a temperature without key and seeds, and
  adapters that do not fit the base.

  >>> from fedjax_llm import models
  >>> loaded = models.random(vocab_size=32)
  >>> replies = generate(
  ...   loaded, loaded.base, {}, [[1, 2], [3]], max_new_tokens=4
  ... )
  >>> [len(reply) for reply in replies]
  [4, 4]
  """
  if max_new_tokens < 1:
    raise Error(f'{max_new_tokens=} must be at least 1.')
  if not temperature >= 0:
    raise Error(f'{temperature=} must not be negative.')
  if not 0 < top_p <= 1:
    raise Error(f'{top_p=} must be above 0 and at most 1.')
  if temperature > 0 and key is None and seeds is None:
    raise Error(f'{temperature=} samples, so it needs a key.')
  if batch_size < 1:
    raise Error(f'{batch_size=} must be at least 1.')
  config = model.config if isinstance(model, LoadedModel) else None
  draws = requests.seeds(seeds, len(prompts))
  owners = requests.owners(which, params, adapters, len(prompts))
  fronts = [front(adapter)[1:] for adapter in (*adapters, {})]
  if owners is None:
    rows = [front(params).length] * len(prompts)
  else:
    rows = [sum(fronts[index]) for index in owners]
  requests.check(config, prompts, max_new_tokens, rows)
  if owners is not None:
    groups = requests.groups([fronts[index] for index in owners])
    if len(groups) > 1 or len({*fronts[:-1]}) > 1:
      return _in_groups(
        groups,
        prompts,
        adapters,
        fronts,
        owners,
        draws,
        functools.partial(
          generate,
          *(model, base, params),
          max_new_tokens=max_new_tokens,
          temperature=temperature,
          top_p=top_p,
          eos_id=eos_id,
          key=key,
          batch_size=batch_size,
        ),
      )
    for index, adapter in enumerate(adapters if config else ()):
      tenants.check(base, adapter, f'adapter {index}')
    params = tenants.stack(base, adapters)
  stops = np.atleast_1d(np.asarray([] if eos_id is None else eos_id, np.int32))
  # Padded with -1, which is no token: one program for up to 8 stop tokens.
  stops = np.pad(stops, (0, -len(stops) % 8), constant_values=-1)
  if isinstance(model, LoadedModel):
    network, decoder = model.model, model.decoder
  else:
    network, decoder = model, None
  key = jax.random.key(0) if key is None else key

  replies: list[list[int]] = [[] for _ in prompts]
  # Prompts of like lengths share a batch: less padding is read.
  order = np.argsort([len(prompt) for prompt in prompts], kind='stable')
  for start in range(0, len(prompts), batch_size):
    chunk = order[start : start + batch_size]
    tokens, lengths = requests.pad([prompts[i] for i in chunk])
    new = _run(
      base,
      params,
      tokens,
      lengths,
      requests.filled(draws[chunk], len(lengths), 0),
      None
      if owners is None
      else requests.filled(owners[chunk], len(lengths), -1),
      stops,
      np.float32(temperature or 1.0),
      np.float32(top_p),
      key,
      network=network,
      decoder=decoder,
      num_new=max_new_tokens,
      greedy=temperature == 0,
      nucleus=top_p < 1,
    )
    for i, row in zip(chunk, np.asarray(new)):
      replies[i] = [int(token) for token in row if token >= 0]
  return replies


def sampler(
  model: LoadedModel,
  *,
  max_new_tokens: int,
  stops: Sequence[int],
  temperature: float = 1.0,
) -> Callable[..., jax.Array]:
  """Returns a function that samples replies inside of compiled programs.

  It is `(base, params, tokens [B, T], lengths [B], key, greedy=False) -> new
  [B, max_new_tokens]` int32, where `lengths` are those of the prompts at the
  left of `tokens`. A reply ends with one of `stops`, at most 8, and -1 follows.
  A row without a prompt has an empty reply.

  >>> from fedjax_llm import models
  >>> loaded = models.random(vocab_size=32)
  >>> sample = sampler(loaded, max_new_tokens=4, stops=[2])
  >>> prompts, lengths = jnp.array([[5, 6], [7, 0]]), jnp.array([2, 1])
  >>> sample(loaded.base, {}, prompts, lengths, jax.random.key(0)).shape
  (2, 4)
  """
  if len(stops) > 8:
    raise Error(f'{len(stops)} tokens end a reply; at most 8 are supported.')
  ends = np.pad(
    np.asarray(stops, np.int32), (0, 8 - len(stops)), constant_values=-1
  )

  def sample(base, params, tokens, lengths, key, greedy=False) -> jax.Array:
    return _run(
      base,
      params,
      tokens,
      lengths,
      jnp.arange(tokens.shape[0]),
      None,
      ends,
      np.float32(temperature),
      np.float32(1),
      key,
      network=model.model,
      decoder=model.decoder,
      num_new=max_new_tokens,
      greedy=greedy,
      nucleus=False,
      keep_stop=True,
    )

  return sample


def _in_groups(
  groups: Sequence[Sequence[int]],
  prompts: Sequence[Sequence[int]],
  adapters: Sequence[Params],
  fronts: Sequence[Any],
  owners: np.ndarray,
  draws: np.ndarray,
  read: Callable[..., list[list[int]]],
) -> list[list[int]]:
  """Reads each group with the adapters that have its rows in front."""
  replies: list[list[int]] = [[] for _ in prompts]
  for group in groups:
    own = fronts[owners[group[0]]]
    used = [i for i in range(len(adapters)) if fronts[i] == own]
    place = {-1: -1, **{index: i for i, index in enumerate(used)}}
    done = read(
      prompts=[prompts[index] for index in group],
      seeds=[int(draws[index]) for index in group],
      adapters=[adapters[index] for index in used],
      which=[place[int(owners[index])] for index in group],
    )
    for index, reply in zip(group, done, strict=True):
      replies[index] = reply
  return replies


class _Reader(NamedTuple):
  """Functions that read the prompt and then one token at a time.

  `start() -> (hidden [B, D], state)` after the prompt;
  `more(token [B], step, state) -> (hidden, state)` after one more token.
  """

  start: Callable[[], tuple[jax.Array, Any]]
  more: Callable[..., tuple[jax.Array, Any]]


def _at(hidden, index) -> jax.Array:
  """Returns hidden[b, index[b]], [B, T, D] -> [B, D]."""
  index = jnp.maximum(index, 0)[:, None, None]
  return jnp.take_along_axis(hidden, index, axis=1)[:, 0]


def _texts(tokens, lengths) -> Batch:
  """Returns a batch of texts that start at the left end of their rows."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = positions < lengths[:, None]
  return Batch(tokens, inside, inside.astype(jnp.int32), positions)


def _cached(decoder: Decoder, base, params, tokens, lengths, num_new):
  rows, width = tokens.shape

  def start():
    cache = decoder.begin(base, params, rows, width + num_new)
    batch = _texts(tokens, lengths)
    hidden, cache = decoder.extend(base, params, batch, cache, 0)
    return _at(hidden, lengths - 1), cache

  def more(token, step, cache):
    one = jnp.ones((rows, 1), jnp.int32)
    places = (lengths + step)[:, None]
    batch = Batch(token[:, None], one > 0, one, places)
    hidden, cache = decoder.extend(base, params, batch, cache, width + step)
    return hidden[:, 0], cache

  return _Reader(start, more)


def _uncached(model: Model, base, params, tokens, lengths, num_new):
  rows = jnp.arange(tokens.shape[0])

  def read(text, lengths):
    hidden = model.hidden(base, params, _texts(text, lengths))
    return _at(hidden, lengths - 1)

  def start():
    text = jnp.pad(tokens, ((0, 0), (0, num_new)))
    return read(text, lengths), text

  def more(token, step, text):
    text = text.at[rows, lengths + step].set(token)
    return read(text, lengths + step + 1), text

  return _Reader(start, more)


def likeliest(logits) -> jax.Array:
  """Returns the first of the largest entries, [B, V] -> [B] int32.

  It is `argmax`, whose reduction of pairs XLA does not vectorise on a CPU: NaN
  counts as the largest.

  >>> likeliest(jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])).tolist()
  [1, 0]
  >>> likeliest(jnp.array([[1.0, jnp.nan, 3.0, 0.0]])).tolist()
  [1]
  """
  place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  largest = logits == jnp.max(logits, axis=-1, keepdims=True)
  largest |= jnp.isnan(logits)
  last = logits.shape[-1] - 1
  return jnp.min(jnp.where(largest, place, last), axis=-1)


def _nucleus(logits, top_p) -> jax.Array:
  """Sets all but the likeliest tokens to minus infinity, [V] -> [V]."""
  ordered = jnp.sort(logits, descending=True)
  share = jax.nn.softmax(ordered)
  kept = jnp.cumsum(share) - share < top_p  # the share of likelier tokens
  least = jnp.min(jnp.where(kept, ordered, jnp.inf))
  return jnp.where(logits >= least, logits, -jnp.inf)


@functools.partial(
  jax.jit,
  static_argnames=(
    *('network', 'decoder', 'num_new', 'greedy', 'nucleus', 'keep_stop'),
  ),
)
def _run(
  base,
  params,
  tokens,
  lengths,
  seeds,
  which,
  stops,
  temperature,
  top_p,
  key,
  *,
  network: Model,
  decoder: Decoder | None,
  num_new: int,
  greedy: bool,
  nucleus: bool,
  keep_stop: bool = False,
):
  """Generates new tokens [B, num_new], -1 from the end of a reply on.

  The token that ends a reply is part of it with `keep_stop`.
  """
  if which is not None:
    params = tenants.rows(params, which)
    network = tenants.model(network)
    decoder = None if decoder is None else tenants.decoder(decoder)
  if which is None:
    params = settled(base, params, _texts(tokens, lengths))
  if decoder is None:
    reader = _uncached(network, base, params, tokens, lengths, num_new)
  else:
    reader = _cached(decoder, base, params, tokens, lengths, num_new)
  keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)

  def pick(hidden, step):
    logits = network.logits(base, params, hidden)
    if greedy:
      return likeliest(logits)

    def draw(key, logits):
      logits = logits / temperature
      return jax.random.categorical(
        jax.random.fold_in(key, step),
        _nucleus(logits, top_p) if nucleus else logits,
      )

    return jax.vmap(draw)(keys, logits).astype(jnp.int32)

  def write(out, token, step, done):
    ended = done | jnp.any(token[:, None] == stops, axis=1)
    left_out = done if keep_stop else ended
    return out.at[:, step].set(jnp.where(left_out, -1, token)), ended

  def unfinished(state):
    step, _, _, _, done = state
    return (step < num_new) & ~jnp.all(done)

  def body(state):
    step, token, carry, out, done = state
    hidden, carry = reader.more(token, step - 1, carry)
    token = pick(hidden, step)
    out, done = write(out, token, step, done)
    return step + 1, token, carry, out, done

  hidden, carry = reader.start()
  token = pick(hidden, jnp.int32(0))
  out = jnp.full((len(lengths), num_new), -1, jnp.int32)
  out, done = write(out, token, 0, lengths == 0)
  state = (jnp.int32(1), token, carry, out, done)
  return jax.lax.while_loop(unfinished, body, state)[3]
