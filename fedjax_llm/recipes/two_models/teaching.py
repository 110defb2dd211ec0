"""Steps on public texts by which one model teaches another.

`known` returns what a model knows of batches [M, B, T] of texts, `mapped`
writes it for another tokenizer, `taught` takes the student's steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import scopes, tree
from fedjax_llm.local import LocalOptimizer, knowledge
from fedjax_llm.local.knowledge import Alignment, Knowledge
from fedjax_llm.local.sgd import stepped
from fedjax_llm.types import Base, Batch, Error, Model, Params, Shared


def known(model, base, params, texts: Batch, top_k: int) -> Knowledge:
  """Returns the knowledge of batches [M, B, T]."""
  return jax.lax.map(
    lambda batch: knowledge.of(model, base, params, batch, top_k), texts
  )


def mapped(message: Knowledge, texts: Batch, places, table) -> Knowledge:
  def one(message, tokens, places):
    return knowledge.mapped(message, tokens, Alignment(places, table))

  return jax.vmap(one)(message, texts.tokens, places)


def taught(
  optimizer: LocalOptimizer,
  model: Model,
  base: Base,
  params: Params,
  texts: Batch,
  teacher: Knowledge,
  selected: Any,
  *,
  hard: Any,
  first: Any,
  epochs: int,
) -> tuple[Params, jax.Array]:
  """Returns the parameters after steps on `knowledge.distilled`, and its mean.

  A step on each batch of texts [M, B, T], `epochs` times, with the optimizer
  from new moments.
  """
  trained = tree.select(params, scopes.everything().labels(params), Shared)
  mask = tree.map_present(lambda _: jnp.bool_(True), trained)
  number = texts.tokens.shape[0]

  def step(i, carry):
    trained, moments, total = carry
    batch, told, some = tree.take((texts, teacher, selected), i % number)

    def value(trained):
      whole = tree.merge(trained, params)
      return knowledge.distilled(model, base, whole, batch, told, some, hard)

    nats, grads = jax.value_and_grad(value)(trained)
    real = jnp.any(knowledge.counted(batch)) & tree.all_finite(grads)
    grads = tree.map_present(lambda g: jnp.where(real, g, 0), grads)
    new, moments, _ = stepped(
      optimizer, grads, moments, trained, mask, first + i, real
    )
    return new, moments, total + nats

  start = (trained, optimizer.init(trained), jnp.float32(0))
  trained, _, total = jax.lax.fori_loop(0, epochs * number, step, start)
  return tree.merge(trained, params), total / (epochs * number)


def share(selected, texts: Batch) -> jax.Array:
  """Returns the share of the texts that are selected."""
  real = jnp.any(jax.vmap(knowledge.counted)(texts), -1)
  return jnp.sum(selected & real) / jnp.maximum(jnp.sum(real), 1)


def num_bytes(texts: Batch, top_k: int) -> jax.Array:
  """Returns the bytes of a message: k logits and ids a token, a loss a text."""
  tokens = jax.vmap(knowledge.counted)(texts)
  size = 8 * top_k * jnp.sum(tokens) + 4 * jnp.sum(jnp.any(tokens, -1))
  return size.astype(jnp.int32)


def texts_of(public: Any) -> Any:
  """Returns the public batches with logits at all places."""
  if public is None:
    return None
  if not isinstance(public, Batch):
    raise Error('fed_mkt exchanges predictions of tokens: task.name=causal_lm.')
  return jax.tree.map(np.asarray, public)._replace(bound=None)
