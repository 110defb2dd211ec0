"""A dual encoder: a tower for texts, a tower for images, one space for both.

    t = W_t norm(text)[end of text]     v = W_v norm(image)[class]
    logits = exp(logit_scale) cos(v, t)

Radford et al. 2021, arXiv 2103.00020 (CLIP). Towers of other families
(`models.joined`) may read the mean of a text's states, and the state of the
class with the mean of the patches. Functions of (params, inputs):
adapters of a tower stand below `text` and `vision`, those of the projections
and of the scale beside them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters
from fedjax_llm.models.config import TOWERS, Config, longest_text, tower
from fedjax_llm.models.network import blocks, layers, transformer, vision
from fedjax_llm.nodes import frozen, protocol
from fedjax_llm.nodes.scores import unit
from fedjax_llm.types import Base, Batch, Error, Model, Params


class Dual(NamedTuple):
  """Both towers of a dual encoder as pure functions of (base, params, inputs).

  `text(base, params, tokens=None, *, embedded=None, ends=None) -> [..., P]`:
  features of texts from their tokens [..., T] or from token embeddings
  `embedded` [..., T, D] (for trained context in front of a class name). `ends`
  [...] are the places of the ends of the texts, by default those of the first
  end-of-text token.

  `image(base, params, pixels, *, prompts=None, deep=None) -> (features [...,
  P], local features [..., N, P])` of pixels [..., H, W, C], uint8 or floats in
  0..1; visual prompts as in `vision.states`.

  `embed(base, params, tokens) -> [..., T, D]` are token embeddings without
  positions, for `text(embedded=...)`; `scale(base, params) -> []` is
  exp(logit_scale). Features are not normalised: `cosine` does it.

  >>> from fedjax_llm import models
  >>> loaded = models.random_clip()
  >>> towers = loaded.dual
  >>> whole, local = towers.image(loaded.base, {}, np.zeros((2, 8, 8, 3)))
  >>> whole.shape, local.shape
  ((2, 16), (2, 4, 16))
  >>> words = towers.embed(loaded.base, {}, np.array([[1, 2, 3]]))
  >>> towers.text(loaded.base, {}, embedded=words, ends=np.array([2])).shape
  (1, 16)
  """

  text: Callable[..., jax.Array]
  image: Callable[..., tuple[jax.Array, jax.Array]]
  embed: Callable[[Base, Params, Any], jax.Array]
  scale: Callable[[Base, Params], jax.Array]


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the cosines of rows x [..., M, P] and y [..., N, P], [..., M, N].

  >>> cosine(jnp.eye(2), jnp.array([[2.0, 0.0]])).tolist()
  [[1.0], [0.0]]
  """
  return jnp.einsum('...mp,...np->...mn', unit(x), unit(y))


def ends_of(config: Config, tokens: Any) -> jax.Array:
  """Returns the place of the end-of-text token of each row, [...] int32.

  The first token with the number of `config.eos_ids`; with the number 2, as in
  the first published files of CLIP, the largest token of a row.

  >>> from fedjax_llm import models
  >>> config = models.random_clip(eos_ids=(7,)).config
  >>> ends_of(config, np.array([[1, 7, 7], [1, 3, 7]])).tolist()
  [1, 2]
  """
  tokens = jnp.asarray(tokens)
  if not config.eos_ids:
    raise Error(
      'text features need the place of the end of each text: this model has no '
      'eos_token_id, so pass ends=.'
    )
  if config.family == 'clip' and config.eos_ids == (2,):
    return jnp.argmax(tokens, axis=-1)
  return jnp.argmax(tokens == config.eos_ids[0], axis=-1)


def build(
  config: Config, *, logits_dtype: Any = jnp.float32, **settings: Any
) -> tuple[Model, Dual]:
  """Returns a dual encoder as a `Model` of features, and as a `Dual`.

  `Model.hidden` returns the features [B, P] of a batch of images, or of texts
  (one a row, at its last token); `Model.logits` is refused, since the classes
  of a dual encoder are texts: a task makes them (`local.zero_shot`).
  """
  del logits_dtype  # of heads
  own = tower(config, 'text')
  walk = transformer.walker(own, **settings)
  see = vision.states(tower(config, 'vision'), **settings)
  dtype = settings.get('compute_dtype', jnp.float32)

  def parts(base: Base, params: Params, name: str):
    """Returns base and parameters of a tower, and of the projections."""
    params = frozen.unmarked(params)[1]
    base, params = adapters.overlay(base, params)
    params = params if isinstance(params, Mapping) else {}
    rest = {k: leaf for k, leaf in params.items() if k not in TOWERS}
    adapters.check(base, rest, places=protocol.BESIDE)
    return base[name], params.get(name) or {}, base, rest

  def project(x, base, rest, name):
    return layers.linear(x, base[name], blocks.child(rest, name))

  def text(
    base: Base,
    params: Params,
    tokens: Any = None,
    *,
    embedded: Any = None,
    ends: Any = None,
  ) -> jax.Array:
    if (tokens is None) == (embedded is None):
      raise Error('text features take either tokens or embedded, one of both.')
    if ends is None:
      if tokens is None:
        raise Error('text features of embedded texts need ends=.')
      ends = ends_of(config, tokens)
    lead = jnp.shape(tokens) if embedded is None else jnp.shape(embedded)[:-1]
    *lead, length = lead
    if length > longest_text(own):
      raise Error(
        f'texts have {length} tokens; the {config.family} model reads at most '
        f'{longest_text(own)}.'
      )
    base, params, whole, rest = parts(base, params, 'text')
    places = np.broadcast_to(
      np.arange(length, dtype=np.int32), (int(np.prod(lead)), length)
    )
    if tokens is not None:
      tokens = jnp.asarray(tokens).reshape(places.shape)
    else:
      embedded = jnp.asarray(embedded)
      embedded = embedded.reshape(*places.shape, embedded.shape[-1])
    index = jnp.asarray(ends).reshape(-1, 1)
    # Behind a causal text's end nothing is read.
    real = np.ones_like(places) if own.causal else places <= index
    batch = Batch(
      np.zeros_like(places) if tokens is None else tokens,
      places >= 0,
      real.astype(np.int32),
      places,
    )
    hidden = walk(base, params, batch, embedded=embedded)[0]
    if config.pooling == 'mean':
      here = (places <= index)[..., None]
      state = jnp.where(here, hidden, 0).sum(1) / (index + 1)
      state = state.astype(hidden.dtype)
    else:
      state = jnp.take_along_axis(hidden, index[..., None], axis=1)[:, 0]
    out = project(state, whole, rest, 'text_projection')
    return out.reshape(*lead, out.shape[-1])

  def image(
    base: Base,
    params: Params,
    pixels: Any,
    *,
    prompts: Any = None,
    deep: Any = None,
  ) -> tuple[jax.Array, jax.Array]:
    base, params, whole, rest = parts(base, params, 'vision')
    shape = jnp.shape(pixels)
    flat = jnp.asarray(pixels).reshape(-1, *shape[-3:])
    states, _ = see(base, params, flat, prompts=prompts, deep=deep)
    if config.vision.image.with_mean:  # the mean of the local features is whole
      first, local = states[:, :1], states[:, 1:]
      pair = lambda x: jnp.concatenate(
        [jnp.broadcast_to(first, x.shape), x], axis=-1
      )
      states = jnp.concatenate(
        [pair(local.mean(1, keepdims=True)), pair(local)], axis=1
      )
    out = project(states, whole, rest, 'visual_projection')
    out = out.reshape(*shape[:-3], *out.shape[1:])
    return out[..., 0, :], out[..., 1:, :]

  def embed(base: Base, params: Params, tokens: Any) -> jax.Array:
    base, params, *_ = parts(base, params, 'text')
    leaf = blocks.child(params, 'embed_tokens')
    return layers.embed(tokens, base['embed_tokens'], leaf, dtype)

  def scale(base: Base, params: Params) -> jax.Array:
    *_, whole, rest = parts(base, params, 'text')
    leaf = blocks.child(rest, 'logit_scale')
    value = layers.changed(whole['logit_scale'], leaf, 'value', 'value')
    return jnp.exp(value.astype(jnp.float32))

  def hidden(base: Base, params: Params, batch: Any) -> jax.Array:
    if getattr(batch, 'pixels', None) is not None:
      return image(base, params, batch.pixels)[0]
    last = jnp.maximum((batch.segments > 0).sum(-1) - 1, 0)
    return text(base, params, batch.tokens, ends=last)

  def logits(base: Base, params: Params, hidden: jax.Array) -> jax.Array:
    del base, params, hidden
    raise Error(
      f'a {config.family} model has no head: its classes are texts '
      "(task.name='zero_shot')."
    )

  return Model(hidden, logits), Dual(text, image, embed, scale)
