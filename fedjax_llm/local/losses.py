"""Losses: the functions that a client minimises.

`causal_lm` and `classification` return a `Loss`, `class_logits` a classifier.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from fedjax_llm.local.observed import observed
from fedjax_llm.types import (
  Base,
  Batch,
  Error,
  Images,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
)


def causal_lm(
  model: Model,
  *,
  chunk_size: int = 512,
  per_row: bool = False,
) -> Loss:
  """Returns next-token cross-entropy: -sum_t log p(x_t | x_<t) over the mask.

  Logits are computed only where the loss mask is set, at as many positions as
  the batch's `bound` allows, `chunk_size` of them at a time, so an array of
  [B, T, V] never exists. With several chunks each is recomputed in the backward
  pass. The bound is checked where the batch is made (`batching.bounded`).

  Args:
    model: hidden states and output head.
    chunk_size: the number of positions with logits at the same time.
    per_row: sums for each row of the batch, [B], instead of for the batch.

    Returns:
      A `Loss` with sums in nats and counts in tokens.

  >>> even = Model(
  ...   hidden=lambda base, params, batch: jnp.zeros((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 4)))
  >>> tokens = jnp.ones((1, 3), jnp.int32)
  >>> batch = Batch(tokens, tokens > 0, tokens, tokens)
  >>> sums = causal_lm(even)(None, {}, batch, None)
  >>> round(float(sums.total), 4), float(sums.count)  # 2 log 4
  (2.7726, 2.0)
  """

  def loss(base: Base, params: Params, batch: Batch, key: Key) -> LossSum:
    del key  # no dropout
    hidden = model.hidden(base, params, batch)  # [B, T, D]
    num_rows, length, width = hidden.shape
    # The state at t - 1 predicts token t; a text's first token never counts.
    hidden = hidden[:, :-1].reshape(-1, width)
    targets = jnp.asarray(batch.tokens)[:, 1:].reshape(-1)
    mask = jnp.asarray(batch.loss_mask)[:, 1:].reshape(-1)
    row = jnp.repeat(jnp.arange(num_rows), length - 1)
    if batch.bound is not None and batch.bound < mask.size:
      most = int(batch.bound)
      index = jnp.nonzero(mask, size=most, fill_value=0)[0]
      count = jnp.sum(mask)
      hidden, targets, row = hidden[index], targets[index], row[index]
      mask = jnp.arange(most) < count

    nats, correct = _cross_entropy(
      lambda h: model.logits(base, params, h), hidden, targets, mask, chunk_size
    )
    parts = (nats, mask.astype(jnp.float32), correct)
    if per_row:
      return LossSum(
        *(jax.ops.segment_sum(x, row, num_segments=num_rows) for x in parts)
      )
    return LossSum(*(jnp.sum(x) for x in parts))

  build = functools.partial(causal_lm, chunk_size=chunk_size, per_row=per_row)
  return observed(lambda other: loss if other is model else build(other), model)


def classification(model: Model, *, per_row: bool = False) -> Loss:
  """Returns cross-entropy of a text's or image's class: -log p(y | x), a row.

  The classifier reads the state of a row's first token, or the one that
  `model.read` returns, so a row holds one text. For images, and networks with
  one state a row, it reads that state. Rows
  without a label (-1) are padding. A label may also be a distribution q over
  the classes, labels [B, classes]: the term is then -sum_y q_y log p(y | x),
  and a row of zeros is padding.

  Args:
    model: hidden states and a classifier's head, [..., D] -> [..., classes].
    per_row: one number a row, [B], instead of their sum.

  Returns:
    A `Loss` with sums in nats and counts in labels.

  Raises:
    Error: from the loss, batches without labels.

  >>> even = Model(
  ...   hidden=lambda base, params, batch: jnp.zeros((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 4)))
  >>> tokens = jnp.ones((2, 3), jnp.int32)
  >>> batch = Batch(tokens, tokens < 0, tokens, tokens, jnp.array([3, -1]))
  >>> sums = classification(even)(None, {}, batch, None)
  >>> round(float(sums.total), 4), float(sums.count)  # log 4, one label
  (1.3863, 1.0)
  """

  def loss(
    base: Base, params: Params, batch: Batch | Images, key: Key
  ) -> LossSum:
    del key  # no dropout
    if batch.label is None:
      raise Error('these texts have no labels: classification needs them.')
    hidden: Any = model.hidden  # on texts or images
    first = _read(model, hidden(base, params, batch), batch)  # [B, D]
    soft = batch.label.ndim == 2  # [B, classes]
    labelled = jnp.any(batch.label > 0, -1) if soft else batch.label >= 0
    here = batch.present if isinstance(batch, Images) else batch.segments[:, 0]
    real = labelled & (here > 0)
    first = jnp.where(real[:, None], first, 0)  # else NaN leaks backwards
    head = lambda h: model.logits(base, params, h)
    if soft:
      parts = _distance(head(first), batch.label, real)
    else:
      target = jnp.where(real, batch.label, 0)
      parts = _cross_entropy(head, first, target, real, len(first))
    sums = LossSum(parts[0], real.astype(jnp.float32), parts[1])
    return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))

  build = functools.partial(classification, per_row=per_row)
  return observed(lambda other: loss if other is model else build(other), model)


def class_logits(model: Model) -> Callable[[Base, Params, Batch], jax.Array]:
  """Returns a function of a classifier's logits, [B, classes] float32.

  It is `(base, params, batch) -> logits` on batches of one text a row.

  >>> model = Model(
  ...   hidden=lambda base, params, batch: jnp.ones((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: hidden @ base)
  >>> texts = Batch(jnp.ones((1, 3), jnp.int32), None, None, None)
  >>> head = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # the whole base
  >>> class_logits(model)(head, {}, texts).tolist()
  [[4.0, 6.0]]
  """

  def predict(base: Base, params: Params, batch: Batch) -> jax.Array:
    first = _read(model, model.hidden(base, params, batch), batch)
    return model.logits(base, params, first).astype(jnp.float32)

  return predict


def reply_log_probs(
  model: Model, *, chunk_size: int = 512
) -> Callable[..., jax.Array]:
  """Returns a function of the log-probability of each token of replies, [M, N].

  It is `(base, params, texts, starts [M], reply [M, N]) -> [M, N]` float32 in
  nats: reply token j stands at `starts + j` of its text, and -1 is no token,
  with 0. Logits are computed for the replies alone, `chunk_size` at a time.

  >>> even = Model(
  ...   hidden=lambda base, params, batch: jnp.zeros((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 4)))
  >>> tokens = jnp.array([[3, 1, 2]])
  >>> texts = Batch(tokens, tokens > 0, tokens, tokens)
  >>> log_p = reply_log_probs(even)
  >>> out = log_p(None, {}, texts, jnp.array([1]), jnp.array([[1, 2, -1]]))
  >>> [round(float(x), 4) for x in out[0, :2]], bool(out[0, 2] == 0)  # -log 4
  ([-1.3863, -1.3863], True)
  """

  def log_probs(
    base: Base, params: Params, batch: Batch, starts: Any, reply: Any
  ) -> jax.Array:
    hidden = model.hidden(base, params, batch)  # [M, T, D]
    index = starts[:, None] - 1 + jnp.arange(reply.shape[1])
    index = jnp.clip(index, 0, hidden.shape[1] - 1)
    picked = jnp.take_along_axis(hidden, index[..., None], axis=1)
    mask = (reply >= 0).reshape(-1)
    nats, _ = _cross_entropy(
      lambda h: model.logits(base, params, h),
      picked.reshape(-1, hidden.shape[-1]),
      jnp.maximum(reply, 0).reshape(-1),
      mask,
      chunk_size,
    )
    return -nats.reshape(reply.shape)

  return log_probs


def _read(model: Model, hidden: jax.Array, batch: Any) -> jax.Array:
  """Returns the states [B, D] that a classifier reads, of first tokens."""
  if model.read is not None:
    return model.read(hidden, batch)
  return hidden[:, 0] if hidden.ndim == 3 else hidden


def _distance(logits, q, mask):
  """Returns nats and hits as `_cross_entropy`, for distributions q."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  nats = -jnp.sum(jnp.where(q > 0, q * log_p, 0.0), axis=-1)
  hit = jnp.argmax(logits, -1) == jnp.argmax(q, -1)
  return (
    jnp.where(mask, nats, 0.0),
    jnp.where(mask, hit, False).astype(jnp.float32),
  )


def _cross_entropy(head, hidden, targets, mask, chunk_size):
  """Returns nats and hits, [M], zero outside the mask; hidden is [M, D]."""
  num = hidden.shape[0]
  several = num > chunk_size

  def chunk(xs):
    h, target, m = xs
    nats, hit = _nats(head, h, target, m, several)
    # `where` and not a product: 0 * NaN of a padding position would leak.
    return jnp.where(m, nats, 0.0), jnp.where(m, hit, 0.0)

  if not several:
    return chunk((hidden, targets, mask))
  pad = -num % chunk_size
  split = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
    -1, chunk_size, *x.shape[1:]
  )
  nats, correct = jax.lax.map(
    chunk, jax.tree.map(split, (hidden, targets, mask))
  )
  return nats.reshape(-1)[:num], correct.reshape(-1)[:num]


def _nats(head, hidden, target, mask, again: bool):
  """Returns -log p(target) and hits, [M] float32, of states [M, D].

  The derivative with respect to a state, (softmax - one-hot) pulled through the
  head, is computed beside the value, so that neither logits are kept for a
  backward pass nor are they computed twice. That needs a head that treats each
  state alone. Where weights of the head are trained as well, logits are kept,
  or computed again with `again`.
  """
  closed = jax.make_jaxpr(head)(hidden)  # its consts: the weights of the head

  def logits_of(hidden, weights):
    (logits,) = jax.core.eval_jaxpr(closed.jaxpr, weights, hidden)
    return logits  # [M, V]

  def of_logits(logits, target):
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, target[:, None], axis=-1)
    # A hit if no other logit is as large: arg max is not vectorised on a CPU.
    hit = jnp.sum(logits >= picked, axis=-1, dtype=jnp.float32) == 1
    return log_z - picked[:, 0], hit.astype(jnp.float32)

  def value(hidden, target, mask, *weights):
    del mask
    return of_logits(logits_of(hidden, weights), target)

  def derivative(primals, tangents):
    fixed = lambda t: isinstance(t, jax.custom_derivatives.SymbolicZero)
    if not all(map(fixed, tangents[3:])):
      whole = jax.checkpoint(value) if again else value
      moved = [i for i, t in enumerate(tangents) if not fixed(t)]
      part = lambda xs: tuple(xs[i] for i in moved)

      def of(*some):
        new = dict(zip(moved, some, strict=True))
        return whole(*(new.get(i, x) for i, x in enumerate(primals)))

      return jax.jvp(of, part(primals), part(tangents))
    hidden, target, mask, *weights = primals
    logits, pull = jax.vjp(lambda h: logits_of(h, weights), hidden)
    out = of_logits(logits, target)
    slope = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    slope -= jax.nn.one_hot(target, logits.shape[-1])
    (slope,) = pull(slope.astype(logits.dtype))
    slope = jnp.where(mask[:, None], slope, 0).astype(jnp.float32)
    moved = jnp.sum(slope * tangents[0].astype(jnp.float32), axis=-1)
    return out, (moved, jnp.zeros_like(out[1]))

  nats = jax.custom_jvp(value)
  nats.defjvp(derivative, symbolic_zeros=True)
  return nats(hidden, target, mask, *closed.consts)
