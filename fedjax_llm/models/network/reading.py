"""The state of a text that a head of whole texts reads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm.types import Batch


def last_token(
  pad_id: int | None = None,
) -> Callable[[jax.Array, Batch], jax.Array]:
  """Returns a function of the states of the texts' last tokens, [B, D].

  It is `(hidden [B, T, D], batch) -> [B, D]`. Tokens `pad_id` do not count, as
  in transformers, where a text may end with a token that also pads. A row
  without any other token has the state of its first place.

  >>> states = jnp.arange(3.0).reshape(1, 3, 1)
  >>> here = jnp.array([[1, 1, 0]])
  >>> batch = Batch(jnp.array([[5, 2, 0]]), None, here, None)
  >>> [last_token(n)(states, batch).tolist() for n in (None, 2)]
  [[[1.0]], [[0.0]]]
  """

  def read(hidden: jax.Array, batch: Batch) -> jax.Array:
    here = jnp.asarray(batch.segments) > 0
    if pad_id is not None:
      here &= jnp.asarray(batch.tokens) != pad_id
    place = jnp.max(jnp.where(here, jnp.arange(here.shape[1]), 0), axis=1)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]

  return read
