"""Soft prompts and prefixes: trained rows, or keys and values, before a text.

`soft_prompt` and `prefix` return an `Adapter`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.nodes import Prefix, Prompt
from fedjax_llm.nodes.encoded import Projected
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def soft_prompt(
  length: int = 16,
  init: Literal['random', 'vocabulary', 'text'] = 'random',
  text: str | None = None,
  modules_to_save: str | list[str] | tuple[str, ...] = (),
  *,
  tokenizer: Any = None,
) -> Adapter:
  """Returns a soft prompt: `length` trained rows in front of every text.

  Lester et al. 2021, arXiv 2104.08691. The rows start

      random       uniform in +-0.5
      vocabulary   as the embeddings of tokens drawn from the whole vocabulary
      text         as the embeddings of the tokens of `text`, which is cut or
                   repeated to `length` tokens

  Args:
    length: P, the number of rows; each takes one of the model's positions.
    init: how the rows start.
    text: the words of init='text'.
    modules_to_save: see `lora`.
    tokenizer: has `encode(text) -> ids`; a run fills it in.

  Raises:
    Error: a length below one; a text without init='text' or the reverse; from
      `init`, a text without a tokenizer or without tokens.

  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> adapter = soft_prompt(3, init='vocabulary')
  >>> adapter.init(jax.random.key(0), base)['inputs'].rows.shape
  (3, 4)
  """
  draws.at_least(length=length)
  if init not in ('random', 'vocabulary', 'text'):
    raise Error(
      f'adapter.init is {init!r}; it must be random, vocabulary or text.'
    )
  if (init == 'text') != bool(text):
    raise Error(
      f'adapter.init is {init!r} and adapter.text is {text!r}: a text is '
      "needed with init='text', and only there."
    )

  def start(key: Key, base: Base) -> Params:
    if init == 'random':
      rows = draws.uniform(key, (length, draws.width(base)), 0.5)
      return {'inputs': Prompt(rows)}
    table = draws.embedding(base)
    if init == 'vocabulary':
      tokens = jax.random.randint(key, (length,), 0, table.shape[0])
      rows = table[tokens].astype(jnp.float32)
    else:
      rows = table[jnp.asarray(_tokens(text, tokenizer, length))]
      rows = rows.astype(jnp.float32)
    return {'inputs': Prompt(rows)}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def _tokens(text: Any, tokenizer: Any, length: int) -> list[int]:
  if tokenizer is None:
    raise Error(
      "adapter.init='text' needs the tokenizer of the model: pass "
      'tokenizer=... to soft_prompt.'
    )
  ids = list(tokenizer.encode(text))
  if not ids:
    raise Error(f'adapter.text {text!r} has no tokens.')
  return (ids * -(-length // len(ids)))[:length]


def prefix(
  length: int = 16,
  reparametrised: bool = False,
  hidden_size: int | None = None,
  scale: float = 1.0,
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns a prefix: trained keys and values in front of every layer's.

  Li and Liang 2021, arXiv 2101.00190; P-tuning v2 (Liu et al. 2021, arXiv
  2110.07602) trains the same without reparametrisation. With it, two layers
  compute the keys and values from `length` rows,

      [keys_l, values_l] = tanh(rows @ W + b) @ V_l + c_l

  and rows and layers are trained and sent; files for other tools hold the keys
  and values only.

  Args:
    length: P, the number of places; each takes one of the model's positions.
    reparametrised: whether two layers compute the keys and values.
    hidden_size: H of these layers, by default the size of one layer's keys.
    scale: standard deviation of the keys and values, or of the rows.
    modules_to_save: see `lora`.

  Raises:
    Error: a length or size below one; a hidden_size without reparametrisation.

  >>> base = {'layers': {'self_attn': {'k_proj': {
  ...   'kernel': jnp.ones((2, 6, 4))}}}}
  >>> params = prefix(3).init(jax.random.key(0), base)
  >>> params['layers']['self_attn']['prefix'].keys.shape
  (2, 3, 4)
  """
  draws.at_least(length=length)
  if hidden_size is not None:
    draws.at_least(hidden_size=hidden_size)
    if not reparametrised:
      raise Error(
        'adapter.hidden_size is of the layers that compute a prefix: set '
        'adapter.reparametrised=True, or leave it out.'
      )

  def start(key: Key, base: Base) -> Params:
    layers, _, features = draws.projection(base).shape
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: scale * jax.random.normal(key, shape)
    if not reparametrised:
      both = normal(keys[0], 2, layers, length, features)
      node = Prefix(both[0], both[1])
      return {'layers': {'self_attn': {'prefix': node}}}
    inner = hidden_size or features
    return {
      'generator': Projected(
        rows=normal(keys[0], length, features),
        inner=draws.affine(keys[1], features, inner),
        last=draws.affine(keys[2], inner, 2 * features, layers),
      )
    }

  return saved_beside(Adapter(start, merge, fold), modules_to_save)
