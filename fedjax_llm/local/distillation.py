"""Terms of a loss that compare predictions or representations.

`predictions` returns the logits of a batch at the places that a loss counts,
`divergence` their distance from a teacher's, `cross_entropy` their nats, and
`contrast` InfoNCE of representations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.types import Base, Batch, Error, Model, Params


class Predictions(NamedTuple):
  """Logits at the places of a batch that a loss counts."""

  logits: Any  # [M, V] float32
  target: Any  # [M] int32
  mask: Any  # [M] bool: False on padding


def predictions(
  model: Model, base: Base, params: Params, batch: Batch
) -> Predictions:
  """Returns logits where `causal_lm` or `classification` computes theirs.

  All M places are in memory at once, so M is the batch's `bound` where it has
  one. With labels they are one a row, else one a token that is learned.

  >>> model = Model(
  ...   hidden=lambda base, params, batch: jnp.ones((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: hidden @ base)
  >>> tokens = jnp.array([[0, 1, 1]])
  >>> batch = Batch(tokens, tokens > 0, tokens + 1, tokens)
  >>> seen = predictions(model, jnp.ones((2, 4)), {}, batch)
  >>> seen.logits.shape, seen.target.tolist(), seen.mask.tolist()
  ((2, 4), [1, 1], [True, True])
  """
  hidden = model.hidden(base, params, batch)
  if batch.label is not None:
    if batch.label.ndim > 1:
      raise Error('distillation needs one label a text, not a distribution.')
    first = hidden[:, 0] if hidden.ndim == 3 else hidden
    mask = (batch.label >= 0) & (batch.segments[:, 0] > 0)
    target = jnp.where(mask, batch.label, 0)
    first = jnp.where(mask[:, None], first, 0)  # else NaN leaks backwards
    logits = model.logits(base, params, first)
    return Predictions(logits.astype(jnp.float32), target, mask)
  hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
  target = jnp.asarray(batch.tokens)[:, 1:].reshape(-1)
  mask = jnp.asarray(batch.loss_mask)[:, 1:].reshape(-1)
  if batch.bound is not None and batch.bound < mask.size:
    most = int(batch.bound)
    at = jnp.nonzero(mask, size=most, fill_value=0)[0]
    mask = jnp.arange(most) < jnp.sum(mask)
    hidden, target = hidden[at], target[at]
  hidden = jnp.where(mask[:, None], hidden, 0)
  logits = model.logits(base, params, hidden)
  return Predictions(logits.astype(jnp.float32), target, mask)


def cross_entropy(seen: Predictions) -> tuple[jax.Array, jax.Array]:
  """Returns -log p(target) and hits at each place, [M], zero on padding.

  >>> seen = Predictions(jnp.zeros((1, 2)), jnp.array([1]), jnp.array([True]))
  >>> round(float(cross_entropy(seen)[0][0]), 4)  # log 2
  0.6931
  """
  log_p = jax.nn.log_softmax(seen.logits, -1)
  nats = -jnp.take_along_axis(log_p, seen.target[:, None], -1)[:, 0]
  hit = jnp.argmax(seen.logits, -1) == seen.target
  return jnp.where(seen.mask, nats, 0.0), (hit & seen.mask).astype(jnp.float32)


def divergence(
  teacher: jax.Array,
  student: jax.Array,
  mask: jax.Array,
  temperature: float = 1.0,
) -> jax.Array:
  """Returns t^2 KL(softmax(teacher / t) || softmax(student / t)), [M].

  Hinton et al. 2015, arXiv 1503.02531. The factor t^2 keeps the size of the
  gradient for every temperature t. The teacher gets a gradient too: stop it
  where the method does.

  >>> same = jnp.array([[1.0, 2.0]])
  >>> divergence(same, same, jnp.array([True])).tolist()
  [0.0]
  """
  log_q = jax.nn.log_softmax(teacher / temperature, -1)
  log_p = jax.nn.log_softmax(student / temperature, -1)
  nats = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
  return jnp.where(mask, temperature**2 * nats, 0.0)


def entropy(logits: jax.Array) -> jax.Array:
  """Returns the entropy of softmax(logits), in nats, [M].

  >>> round(float(entropy(jnp.zeros((1, 4)))[0]), 4)  # log 4
  1.3863
  """
  log_p = jax.nn.log_softmax(logits, -1)
  return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def pooled(hidden: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean state of each row's tokens, [B, D] float32.

  >>> ones = jnp.array([[1, 1, 0]])
  >>> batch = Batch(ones, ones > 0, ones, ones)
  >>> pooled(jnp.array([[[2.0], [4.0], [9.0]]]), batch).tolist()
  [[3.0]]
  """
  if hidden.ndim == 2:
    return hidden.astype(jnp.float32)
  here = (jnp.asarray(batch.segments) > 0)[..., None]
  total = jnp.sum(jnp.where(here, hidden, 0).astype(jnp.float32), 1)
  return total / jnp.maximum(jnp.sum(here, 1), 1)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the cosine of the angle between x and y, [..., D] -> [...].

  >>> float(cosine(jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])))
  0.0
  """
  size = lambda v: jnp.sqrt(jnp.sum(v**2, -1) + 1e-12)
  return jnp.sum(x * y, -1) / (size(x) * size(y))


def contrast(
  near: jax.Array, far: jax.Array, temperature: float = 0.5
) -> jax.Array:
  """Returns InfoNCE, -log(e^(near / t) / (e^(near / t) + sum e^(far / t))).

  van den Oord et al. 2018, arXiv 1807.03748. `near` [...] are similarities of
  pairs that belong together, `far` [..., n] of n pairs that do not.

  >>> round(float(contrast(jnp.float32(1), jnp.ones(1))), 4)  # log 2
  0.6931
  """
  every = jnp.concatenate([near[..., None], far], -1) / temperature
  return jax.nn.logsumexp(every, -1) - near / temperature
