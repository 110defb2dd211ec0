"""Nodes at places that are no weight: prompt rows and keys before every text.

    params['inputs'] = Prompt(rows)                       before the first layer
    params['layers']['self_attn']['prefix'] = Prefix(keys, values)   in each

The network defines these places. A text of T tokens still has T hidden states:
those of prompt rows are computed and removed. With P rows in front the tokens
have the positions P, P + 1, ..., as in PEFT's prompt and prefix tuning, where
the rows count as tokens; sliding windows count them too. Several texts packed
in one causal row share the rows: each text sees them as directly before it. If
both nodes are present, the prefix comes first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.protocol import Peft, mismatch
from fedjax_llm.types import Error


class Prompt(NamedTuple):
  """A soft prompt: P trained rows, used like rows of `embed_tokens`.

  Lester et al. 2021, arXiv 2104.08691. The network treats the rows as it treats
  embedded tokens: it scales them, adds learned positions and token type 0, and
  normalises them where the family does so.

  >>> node = Prompt(jnp.ones((3, 4)))
  >>> node.length(), node.before(jnp.zeros((2, 5, 4))).shape
  (3, (2, 3, 4))
  """

  rows: Any  # [P, D], or [B, P, D] for the texts of one batch

  PLACES = ('inputs',)

  def length(self) -> int:
    return jnp.shape(self.rows)[-2]

  def before(self, x: jax.Array) -> jax.Array:
    """Returns the rows in front of embedded tokens x [B, T, D], [B, P, D]."""
    rows = self.rows.astype(x.dtype)
    return jnp.broadcast_to(rows, (x.shape[0], *rows.shape[-2:]))

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'a soft prompt stands in front of the text, so it cannot be written into '
      'a weight: serve it beside the base.'
    )

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    here = jnp.shape(self.rows)
    want = (
      (*here[:-1], *shape) if here[-2:-1] not in ((), (0,)) else (1, *shape)
    )
    if here != want:
      raise mismatch(path, here, want)

  def peft(self) -> Peft:
    fields = {
      'prompt_tuning_init': 'RANDOM',
      'prompt_tuning_init_text': None,
      'tokenizer_kwargs': None,
      'tokenizer_name_or_path': None,
    }
    return Peft(None, kind='PROMPT_TUNING', values=self.rows, fields=fields)


class Prefix(NamedTuple):
  """Keys and values of P places in front of the text, in every layer.

  Li and Liang 2021, arXiv 2101.00190. The network neither normalises nor
  rotates these keys. F = KV * head_dim.

  >>> node = Prefix(jnp.ones((3, 8)), jnp.ones((3, 8)))  # of one layer
  >>> keys, values = node.before(jnp.zeros((5, 7, 2, 4)))
  >>> node.length(), keys.shape
  (3, (5, 3, 2, 4))
  """

  keys: Any  # [L, P, F]
  values: Any  # [L, P, F]

  PLACES = ('prefix',)

  def length(self) -> int:
    return jnp.shape(self.keys)[-2]

  def before(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values to put before keys [B, T, KV, head_dim]."""
    rows, _, *heads = keys.shape
    whole = lambda x: jnp.broadcast_to(
      x.reshape(-1, *heads).astype(keys.dtype), (rows, self.length(), *heads)
    )
    return whole(self.keys), whole(self.values)

  def write(self, weight: Any) -> Any:
    del weight
    raise Error(
      'a prefix is keys and values in front of the text, so it cannot be '
      'written into a weight: serve it beside the base.'
    )

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    """Raises `Error` unless one place has `shape`, [L, F]."""
    for name, value in (('keys', self.keys), ('values', self.values)):
      here = jnp.shape(value)
      fits = len(here) == len(shape) + 1 and here[-2] == self.length() > 0
      if not fits or (*here[:-2], here[-1]) != shape:
        raise Error(
          f'its {"/".join((*path, name))} is {list(here)}, and '
          f'{[*shape[:-1], "P", shape[-1]]} is needed, with '
          f'{shape[-1]} = KV * head_dim.'
        )

  def peft(self) -> Peft:
    fields = {
      'encoder_hidden_size': jnp.shape(self.keys)[-1],
      'prefix_projection': False,
    }
    return Peft(None, kind='PREFIX_TUNING', values=self, fields=fields)
