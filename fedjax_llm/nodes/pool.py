"""Prompts that depend on the text: a pool from which each text takes a few."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.prompt import Prompt
from fedjax_llm.nodes.protocol import mismatch
from fedjax_llm.types import Error


class Choice(NamedTuple):
  """The statistics of a `Pool` on a batch.

  >>> Choice(0.5, counts=[1, 0]).counts
  [1, 0]
  """

  distance: Any  # [] mean of 1 - cos(query, key) over the chosen prompts
  counts: Any  # [N] how many texts took each prompt


def mean_of_tokens(x: jax.Array, real: Any) -> jax.Array:
  """Returns the mean of embedded tokens x [B, T, D], [B, D] float32.

  `real` [B, T] is True for tokens, None for all.

  >>> mean_of_tokens(jnp.array([[[2.0], [4.0]]]), jnp.array([[1, 0]])).tolist()
  [[2.0]]
  """
  weights = jnp.ones(x.shape[:2]) if real is None else real
  weights = weights.astype(jnp.float32)[..., None]
  count = jnp.maximum(weights.sum(1), 1)
  return (x.astype(jnp.float32) * weights).sum(1) / count


def unit(z: jax.Array) -> jax.Array:
  """Returns vectors [..., D] of norm one; zeros stay zeros.

  >>> unit(jnp.array([0.0, 2.0])).tolist()
  [0.0, 1.0]
  """
  square = jnp.sum(z * z, -1, keepdims=True)
  return z * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


class Pool(NamedTuple):
  """N prompts with keys; each text takes the `top` with the nearest keys.

  Wang et al. 2022, arXiv 2112.08654 (L2P):

      chosen = the K prompts with the largest cos(q(x), key_i)
      q(x)   = the mean of the text's embedded tokens

  whose rows stand in front of the text, the nearest first. Keys get gradients
  only from `Choice.distance`, the paper's second term of the loss. A row of a
  batch holds one text. In a causal model the query is the mean of the tokens
  before the first one that the loss predicts: the question of a reply, or the
  first token of a plain text. Generation asks with the whole request: the same
  for chats, more than in training for plain texts.

  >>> node = Pool(jnp.ones((5, 2, 4)), jnp.ones((5, 4)), jnp.zeros(3, int))
  >>> node.length(), node.choose(jnp.ones((7, 6, 4)), None).rows.shape
  (6, (7, 6, 4))
  """

  rows: Any  # [N, P, D]
  keys: Any  # [N, D]
  top: Any  # [K] int8 zeros, so that the number of chosen prompts is a shape

  PLACES = ('inputs',)
  FROZEN = ('top',)

  def length(self) -> int:
    return jnp.shape(self.top)[0] * jnp.shape(self.rows)[-2]

  def before(self, x: jax.Array) -> jax.Array:
    del x
    raise Error('a pool of prompts needs the text: `choose` comes before.')

  def _nearest(self, x: jax.Array, real: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and the indices of the chosen prompts, [B, K]."""
    query = mean_of_tokens(x, real)
    alike = unit(jax.lax.stop_gradient(query)) @ unit(self.keys).T
    return jax.lax.top_k(alike, jnp.shape(self.top)[0])

  def choose(self, x: jax.Array, real: Any) -> Prompt:
    """Returns the prompt of each text of embedded tokens x [B, T, D].

    `real` [B, T] is True for tokens, None for all.
    """
    _, index = self._nearest(x, real)
    rows = jnp.take(self.rows, index, axis=0)  # [B, K, P, D]
    return Prompt(rows.reshape(x.shape[0], self.length(), -1))

  def statistics(self, x: jax.Array, real: Any) -> Choice:
    alike, index = self._nearest(x, real)
    present = jnp.ones(x.shape[0]) if real is None else jnp.any(real, 1)
    present = present.astype(jnp.float32)[:, None]
    total = jnp.maximum(present.sum() * alike.shape[1], 1)
    counts = (
      jnp.zeros(self.keys.shape[0])
      .at[index]
      .add(jnp.broadcast_to(present, index.shape))
    )
    return Choice(jnp.sum((1 - alike) * present) / total, counts)

  def no_statistics(self) -> Choice:
    """Returns the statistics of no text: zeros, in float32."""
    return Choice(jnp.float32(0), jnp.zeros(self.keys.shape[0]))

  def write(self, weight: Any) -> Any:
    return Prompt(self.rows).write(weight)

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    here, keys = jnp.shape(self.rows), jnp.shape(self.keys)
    if len(here) != 3 or here[-1:] != shape:
      raise mismatch(path, here, (*here[:-1], *shape))
    if keys != (here[0], *shape):
      raise mismatch((*path, 'keys'), keys, (here[0], *shape))
    if not 0 < jnp.shape(self.top)[0] <= here[0]:
      raise Error(
        f'its {"/".join(path)} takes {jnp.shape(self.top)[0]} of {here[0]} '
        'prompts.'
      )

  def peft(self) -> Any:
    raise Error(
      'the prompt of a pool depends on the text, and PEFT has no such adapter.'
    )
