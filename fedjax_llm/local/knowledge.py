"""Knowledge that models with different vocabularies exchange about texts.

`of` returns what a model knows of a batch of texts: a loss for each text and
its largest logits at each token. `mapped` writes them for the tokens of another
tokenizer, `nearer` keeps the better of two teachers, and `distilled` is the
loss of a student. Texts stand one a row.

Row t of T belongs to token t, which is predicted from the tokens before it, so
row 0 is never used.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import Base, Batch, Error, Model, Params


class Knowledge(NamedTuple):
  """What a model knows of texts, and what it sends of it."""

  loss: Any  # [B] float32, mean nats of a token
  values: Any  # [B, T, k] float32, logits; -inf: none
  ids: Any  # [B, T, k] int32, their tokens


class Alignment(NamedTuple):
  """How the tokens of a sender are written for a receiver's."""

  places: Any  # [B, T] int32, the sender's row of each token; -1: none
  table: Any  # [V] int32, the receiver's token for each of the sender's


def of(
  model: Model, base: Base, params: Params, batch: Batch, num: int
) -> Knowledge:
  """Returns the mean loss of each text and its `num` largest logits a token.

  Texts without a token to be learned have an infinite loss. A vocabulary of
  fewer tokens is filled up with logits of -inf.

  Raises:
    Error: texts with classes, rows with fewer states than tokens.

  >>> model = Model(
  ...   hidden=lambda base, params, batch: jnp.ones((*batch.tokens.shape, 1)),
  ...   logits=lambda base, params, hidden: hidden * jnp.array([0.0, 3, 1]))
  >>> tokens = jnp.array([[0, 1]])
  >>> batch = Batch(tokens, tokens > 0, tokens + 1, tokens)
  >>> seen = of(model, None, {}, batch, 2)
  >>> seen.ids[0, 1].tolist(), seen.values[0, 1].tolist()
  ([1, 2], [3.0, 1.0])
  """
  hidden = _before(model, base, params, batch)

  def row(one):
    hidden, tokens, counted = one
    logits = _logits(model, base, params, hidden)
    nats = -jnp.take_along_axis(
      jax.nn.log_softmax(logits), tokens[:, None], -1
    )[:, 0]
    number = jnp.sum(counted)
    mean = jnp.sum(jnp.where(counted, nats, 0)) / jnp.maximum(number, 1)
    mean = jnp.where(number > 0, mean, jnp.inf)
    values, ids = jax.lax.top_k(logits, min(num, logits.shape[-1]))
    more = ((0, 0), (0, num - ids.shape[-1]))
    values = jnp.pad(values, more, constant_values=-jnp.inf)
    return mean, values, jnp.pad(ids, more)

  return Knowledge(*jax.lax.map(row, (hidden, batch.tokens, counted(batch))))


def mapped(known: Knowledge, tokens: Any, how: Alignment) -> Knowledge:
  """Returns a sender's knowledge for the tokens [B, T] of a receiver.

  The logits of the row that a token is aligned with go to the receiver's tokens
  of `how.table`; of several for one token the largest counts. A token that is
  aligned with none, or with the first, gets all of the weight of its row (Fan
  et al. 2024, arXiv 2406.02224, appendix B). The losses stay.

  >>> known = Knowledge(
  ...   jnp.ones(1), jnp.array([[[0.0, 0], [3, 2], [2, 1]]]),
  ...   jnp.array([[[0, 0], [1, 2], [2, 0]]]))
  >>> how = Alignment(jnp.array([[-1, -1, 1]]), jnp.array([5, 6, 6]))
  >>> new = mapped(known, jnp.array([[4, 8, 6]]), how)
  >>> new.ids[0].tolist(), new.values[0].tolist()
  ([[4, 0], [8, 0], [6, 6]], [[0.0, -inf], [0.0, -inf], [3.0, -inf]])
  """
  aligned = (how.places > 0)[..., None]  # [B, T, 1]
  at = jnp.maximum(how.places, 0)[..., None]
  values = jnp.take_along_axis(known.values, at, 1)
  ids = jnp.asarray(how.table)[jnp.take_along_axis(known.ids, at, 1)]
  same = ids[..., :, None] == ids[..., None, :]  # [B, T, k, k]
  num = ids.shape[-1]
  earlier = jnp.tril(jnp.ones((num, num), bool), -1)
  there = ~jnp.any(same & earlier, -1) & jnp.isfinite(values)
  first = jnp.arange(num) == 0
  alone = jnp.where(first, 0.0, -jnp.inf)
  values = jnp.where(aligned, jnp.where(there, values, -jnp.inf), alone)
  own = jnp.where(first, jnp.asarray(tokens)[..., None], 0)
  return Knowledge(known.loss, values, jnp.where(aligned, ids, own))


def nearer(best: Knowledge, other: Knowledge) -> Knowledge:
  """Returns the knowledge of the smaller loss of each text, of equals `best`.

  >>> one = Knowledge(jnp.array([1.0, 2]), jnp.zeros((2, 1, 1)), jnp.zeros(()))
  >>> two = one._replace(loss=jnp.array([3.0, 1]), ids=jnp.ones(()))
  >>> nearer(one, two).loss.tolist()
  [1.0, 1.0]
  """
  better = other.loss < best.loss

  def choose(new, old):
    shape = (-1, *[1] * (max(new.ndim, 1) - 1))
    return jnp.where(better.reshape(shape), new, old)

  return jax.tree.map(choose, other, best)


def distilled(
  model: Model,
  base: Base,
  params: Params,
  batch: Batch,
  teacher: Knowledge,
  selected: Any,
  weight: Any,
) -> jax.Array:
  """Returns weight * L_FT + (1 - weight) * L_KD, means of tokens.

      L_FT = -log p(y)                        of all texts
      L_KD = -sum_v q_v log p(v)              of the selected texts

  q is the softmax of the teacher's logits (equations 5 to 10 of Fan et al.
  2024, arXiv 2406.02224). Without a selected text L_KD is zero.

  Args:
    teacher: for the tokens of `batch` (`mapped`).
    selected: [B] bool.
    weight: lambda.
  """
  hidden = _before(model, base, params, batch)
  q = jax.nn.softmax(teacher.values, -1)

  @jax.checkpoint
  def row(one):
    hidden, tokens, counted, ids, q = one
    log_p = jax.nn.log_softmax(_logits(model, base, params, hidden))
    hard = -jnp.take_along_axis(log_p, tokens[:, None], -1)[:, 0]
    soft = -jnp.sum(q * jnp.take_along_axis(log_p, ids, -1), -1)
    total = lambda x: jnp.sum(jnp.where(counted, x, 0))
    return total(hard), total(soft), jnp.sum(counted)

  rows = (hidden, batch.tokens, counted(batch), teacher.ids, q)
  hard, soft, number = jax.lax.map(row, rows)
  mean = lambda x, n: jnp.sum(x) / jnp.maximum(jnp.sum(n), 1)
  some = lambda x: jnp.where(selected, x, 0)
  kept = mean(some(soft), some(number))
  return weight * mean(hard, number) + (1 - weight) * kept


def counted(batch: Batch) -> jax.Array:
  """Returns the tokens that have a loss and a token before them, [B, T].

  >>> tokens = jnp.ones((1, 3), jnp.int32)
  >>> counted(Batch(tokens, tokens > 0, tokens, tokens)).tolist()
  [[False, True, True]]
  """
  return jnp.asarray(batch.loss_mask).at[:, 0].set(False)


def _before(model: Model, base: Base, params: Params, batch: Batch) -> Any:
  """Returns the states from which each token is predicted, [B, T, D]."""
  if batch.label is not None:
    raise Error('models exchange predictions of tokens, not of classes.')
  hidden = model.hidden(base, params, batch)
  if hidden.ndim != 3 or hidden.shape[1] != batch.tokens.shape[1]:
    raise Error('models exchange predictions of tokens: leave prompts out.')
  return jnp.roll(hidden, 1, 1)


def _logits(model: Model, base: Base, params: Params, hidden: Any) -> Any:
  return model.logits(base, params, hidden).astype(jnp.float32)
