"""A retrieval memory of a client's own texts beside the model (FedMem).

`remember` returns a function that builds the memory, `recalling` a loss that
mixes its predictions with those of the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import (
  Base,
  Batch,
  Error,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
)


class Memory(NamedTuple):
  """A model's parameters, and (hidden state, next token) pairs of a client.

  >>> memory = Memory(None, jnp.ones((1, 3)), jnp.array([4]), jnp.ones(1, bool))
  >>> memory.values.tolist()
  [4]
  """

  params: Params
  keys: Any  # [M, D] float32: the state before a token
  values: Any  # [M] int32: the token
  valid: Any  # [M] bool: False on padding and on tokens that are not learned


def remember(model: Model) -> Callable[[Base, Params, Batch], Memory]:
  """Returns a function that builds the memory of a batch [B, T] of texts.

  The memory has M = B (T - 1) entries. An entry is the last layer's state
  h_{t-1} and the token x_t; it is valid where x_t is a learned token.

  >>> hidden = lambda base, params, batch: batch.tokens[..., None] * 10.0
  >>> tokens = jnp.array([[3, 4, 5]])
  >>> text = Batch(tokens, jnp.array([[False, True, True]]), tokens, tokens)
  >>> memory = remember(Model(hidden, None))(None, {}, text)
  >>> memory.keys.tolist(), memory.values.tolist()  # before 4, before 5
  ([[30.0], [40.0]], [4, 5])
  """

  def build(base: Base, params: Params, batch: Batch) -> Memory:
    hidden = model.hidden(base, params, batch)[:, :-1]
    keys = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
    flat = lambda x: x[:, 1:].reshape(-1)
    return Memory(params, keys, flat(batch.tokens), flat(batch.loss_mask))

  return build


def recalling(
  model: Model,
  *,
  neighbours: int = 8,
  weight: float = 0.25,
  temperature: float = 10.0,
) -> Loss:
  """Returns the next-token loss of a model mixed with its memory.

      p(y | x) = weight p_mem(y | x) + (1 - weight) p_model(y | x)
      p_mem(y | x) ~ sum_{i in the k nearest} [y = v_i] exp(-||h - k_i||^2 / T)

  kNN retrieval (Khandelwal et al. 2020, arXiv 1911.00172, equations 2-3) over
  the states of the client's own texts, on top of federated LoRA: FedMem (Du et
  al. 2024, arXiv 2401.10070). The paper tunes k, weight and T for each task:
  weight is kNN-LM's, k and T are choices here.

  Returns:
    A `Loss` on `Memory` with sums for each row, [B], for `evals.personal`. With
    an empty memory it is the loss of the model.

  Raises:
    Error: a weight that is not between 0 and 1, fewer than one neighbour, a
      temperature that is not positive.

  >>> model = Model(
  ...   hidden=lambda base, params, batch: batch.tokens[..., None] * 1.0,
  ...   logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 2)))
  >>> tokens = jnp.array([[0, 1]])
  >>> text = Batch(tokens, tokens > 0, tokens, tokens)
  >>> seen = remember(model)(None, {}, text)  # after 0 comes 1
  >>> sums = recalling(model, weight=0.5)(None, seen, text, None)
  >>> round(float(jnp.exp(-sums.total[0])), 4)  # (1 + 1 / 2) / 2
  0.75
  """
  if not 0 <= weight <= 1:
    raise Error(f'recalling: weight={weight} must be between 0 and 1.')
  if neighbours < 1 or not temperature > 0:
    raise Error(
      f'recalling: neighbours={neighbours} must be at least 1 and '
      f'temperature={temperature} must be positive.'
    )

  def loss(base: Base, memory: Memory, batch: Batch, key: Key) -> LossSum:
    del key
    hidden = model.hidden(base, memory.params, batch)[:, :-1]
    targets, mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    far = jnp.where(memory.valid, 0.0, jnp.inf)
    squares = jnp.sum(jnp.square(memory.keys), axis=-1)
    number = min(neighbours, memory.keys.shape[0])
    some = jnp.any(memory.valid)

    def row(xs):
      h, target, m = xs
      logits = model.logits(base, memory.params, h).astype(jnp.float32)
      p = jax.nn.softmax(logits, axis=-1)  # [T - 1, V]
      wide = h.astype(jnp.float32)
      dots = jnp.matmul(wide, memory.keys.T, precision='highest')
      away = jnp.sum(jnp.square(wide), -1)[:, None] + squares - 2 * dots + far
      near, at = jax.lax.top_k(-away, number)
      share = jax.nn.softmax(jnp.where(some, near, 0.0) / temperature, axis=-1)
      voices = jnp.zeros_like(p)
      rows = jnp.arange(p.shape[0])[:, None]
      voices = voices.at[rows, jnp.asarray(memory.values)[at]].add(share)
      lam = jnp.where(some, weight, 0.0)
      p = lam * voices + (1 - lam) * p
      picked = jnp.take_along_axis(p, target[:, None], axis=-1)[:, 0]
      hit = jnp.argmax(p, axis=-1) == target
      nats = -jnp.log(jnp.maximum(picked, 1e-30))
      return (
        jnp.sum(jnp.where(m, nats, 0.0)),
        jnp.sum(m, dtype=jnp.float32),
        jnp.sum(m & hit, dtype=jnp.float32),
      )

    # One row at a time keeps a single [T, V] and [T, M] array in memory.
    return LossSum(*jax.lax.map(row, (hidden, targets, mask)))

  return loss
