"""Losses on pairs of replies: DPO, IPO, KTO, ORPO and SimPO.

`dpo(...)`, `ipo(...)`, ... return a `Term`, a function of the log-probabilities
of a batch of pairs; `preference(model, term)` returns the `Loss` of a client.
With y_c the preferred reply and y_r the other one, x their prompt, |y| the
number of tokens of a reply, and pi_0 the reference model:

    D_c = log pi(y_c | x) - log pi_0(y_c | x),  l_c = log pi(y_c | x) / |y_c|,
    D_r = log pi(y_r | x) - log pi_0(y_r | x),  l_r = log pi(y_r | x) / |y_r|
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.local.losses import causal_lm
from fedjax_llm.types import (
  Base,
  Error,
  Key,
  Loss,
  LossSum,
  Model,
  Pairs,
  Params,
  known,
)

__all__ = ['Scores', 'dpo', 'ipo', 'kto', 'orpo', 'preference', 'simpo']


class Scores(NamedTuple):
  """Log-probabilities of replies in nats, and their lengths, a pair a row.

  `mismatched` is that of the reply of another pair to the prompt of this one;
  it and its reference are None where the batch has no such replies.

  >>> Scores(*[jnp.zeros(2)] * 7).chosen.shape
  (2,)
  """

  chosen: Any  # [B] log pi(y_c | x)
  rejected: Any  # [B] log pi(y_r | x)
  reference_chosen: Any  # [B] log pi_0(y_c | x)
  reference_rejected: Any  # [B] log pi_0(y_r | x)
  chosen_tokens: Any  # [B] |y_c|
  rejected_tokens: Any  # [B] |y_r|
  real: Any  # [B] 1 for pairs, 0 for padding
  mismatched: Any = None  # [B] log pi(y' | x)
  reference_mismatched: Any = None  # [B] log pi_0(y' | x)


class Term(NamedTuple):
  """A preference loss: its value for each pair, and what it needs.

  `value(scores) -> [B]` in nats; `referenced` is True if it reads reference
  log-probabilities, and `mismatched` if it reads those of replies to other
  prompts.
  """

  value: Callable[[Scores], jax.Array]
  referenced: bool = True
  mismatched: bool = False


def _gains(scores: Scores) -> tuple[jax.Array, jax.Array]:
  """Returns D_c and D_r."""
  return (
    scores.chosen - scores.reference_chosen,
    scores.rejected - scores.reference_rejected,
  )


def _means(scores: Scores) -> tuple[jax.Array, jax.Array]:
  """Returns l_c and l_r."""
  return (
    scores.chosen / jnp.maximum(scores.chosen_tokens, 1),
    scores.rejected / jnp.maximum(scores.rejected_tokens, 1),
  )


def _positive(name: str, field: str, value: Any, *, zero: bool = False) -> None:
  if known(value) and not (value >= 0 if zero else value > 0):
    least = '0 or more' if zero else 'above 0'
    raise Error(f'{name}: {field} is {value}; it must be {least}.')


def dpo(beta: float = 0.1) -> Term:
  """Returns -log sigmoid(beta (D_c - D_r)).

  Rafailov et al. 2023, arXiv 2305.18290, equation 7. It is log 2 where the
  model is the reference.

  >>> zero = Scores(*[jnp.zeros(1)] * 7)
  >>> round(float(dpo().value(zero)[0]), 4)
  0.6931
  """
  _positive('dpo', 'beta', beta)

  def value(scores: Scores) -> jax.Array:
    chosen, rejected = _gains(scores)
    return jax.nn.softplus(-beta * (chosen - rejected))

  return Term(value)


def ipo(beta: float = 0.1) -> Term:
  """Returns (D_c / |y_c| - D_r / |y_r| - 1 / (2 beta))^2.

  Azar et al. 2023, arXiv 2310.12036, equation 17, with the means over tokens
  that its authors have confirmed for language models.

  >>> zero = Scores(*[jnp.zeros(1)] * 7)
  >>> float(ipo(beta=0.25).value(zero)[0])
  4.0
  """
  _positive('ipo', 'beta', beta)

  def value(scores: Scores) -> jax.Array:
    chosen, rejected = _gains(scores)
    chosen = chosen / jnp.maximum(scores.chosen_tokens, 1)
    rejected = rejected / jnp.maximum(scores.rejected_tokens, 1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2

  return Term(value)


def kto(
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> Term:
  """Returns Kahneman-Tversky optimisation, the mean of its terms of a pair.

      z_0 = max(0, mean over the batch of log pi(y' | x) - log pi_0(y' | x)),
      (w_d (1 - sigmoid(beta (D_c - z_0)))
        + w_u (1 - sigmoid(beta (z_0 - D_r)))) / 2

  with y' the preferred reply of another pair; z_0 has no gradient. Ethayarajh
  et al. 2024, arXiv 2402.01306, equation 8, in which the replies of a pair are
  two examples, one desirable and one undesirable.

  >>> zero = Scores(*[jnp.zeros(1)] * 9)
  >>> float(kto().value(zero)[0])
  0.5
  """
  _positive('kto', 'beta', beta)
  _positive('kto', 'desirable_weight', desirable_weight, zero=True)
  _positive('kto', 'undesirable_weight', undesirable_weight, zero=True)

  def value(scores: Scores) -> jax.Array:
    chosen, rejected = _gains(scores)
    gain = jnp.where(
      scores.real > 0, scores.mismatched - scores.reference_mismatched, 0.0
    )
    mean = jnp.sum(gain) / jnp.maximum(jnp.sum(scores.real), 1)
    z = jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
    liked = desirable_weight * (1 - jax.nn.sigmoid(beta * (chosen - z)))
    other = undesirable_weight * (1 - jax.nn.sigmoid(beta * (z - rejected)))
    return (liked + other) / 2

  return Term(value, mismatched=True)


def orpo(beta: float = 0.1) -> Term:
  """Returns odds-ratio preference optimisation, which has no reference.

      -l_c - beta log sigmoid(log odds_c - log odds_r),
      log odds = l - log(1 - exp(l))

  Hong et al. 2024, arXiv 2403.07691, equations 4 to 7; beta is their lambda.

  >>> even = Scores(*[jnp.full(1, -1.0)] * 2, *[jnp.ones(1)] * 5)
  >>> round(float(orpo(beta=1.0).value(even)[0]), 4)  # 1 + log 2
  1.6931
  """
  _positive('orpo', 'beta', beta, zero=True)

  def log_odds(mean: jax.Array) -> jax.Array:
    # A probability of 1 has no odds: at most 1 - 1e-6, as float32 can tell.
    mean = jnp.minimum(mean, -1e-6)
    return mean - jnp.log(-jnp.expm1(mean))

  def value(scores: Scores) -> jax.Array:
    chosen, rejected = _means(scores)
    ratio = log_odds(chosen) - log_odds(rejected)
    return -chosen + beta * jax.nn.softplus(-ratio)

  return Term(value, referenced=False)


def simpo(beta: float = 2.0, gamma: float = 1.0, nll: float = 0.0) -> Term:
  """Returns -log sigmoid(beta (l_c - l_r) - gamma) - nll l_c.

  Meng et al. 2024, arXiv 2405.14734, equation 6 with `nll` = 0; the paper's
  beta is from 2.0 to 2.5, and gamma from 0.3 to 1.6. It has no reference.

  >>> zero = Scores(*[jnp.zeros(1)] * 7)
  >>> round(float(simpo(gamma=0.0).value(zero)[0]), 4)
  0.6931
  """
  _positive('simpo', 'beta', beta)
  _positive('simpo', 'gamma', gamma, zero=True)
  _positive('simpo', 'nll', nll, zero=True)

  def value(scores: Scores) -> jax.Array:
    chosen, rejected = _means(scores)
    return jax.nn.softplus(gamma - beta * (chosen - rejected)) - nll * chosen

  return Term(value, referenced=False)


def preference(
  model: Model, term: Term, *, per_row: bool = False, chunk_size: int = 512
) -> Loss:
  """Returns the loss of a model on `Pairs`: a term summed over pairs.

  The count is that of the pairs, and `correct` counts those whose implicit
  reward of the preferred reply is larger: D_c > D_r, or l_c > l_r of a term
  without a reference.

  Args:
    model: a causal network.
    term: one of the losses of this module.
    per_row: one number a pair, [B], instead of their sum.
    chunk_size: the number of positions with logits at the same time.

  Raises:
    Error: from the loss, a batch that is not of pairs, or one without
      mismatched replies for a term that reads them.

  >>> from fedjax_llm.types import Batch
  >>> even = Model(
  ...   hidden=lambda base, params, batch: jnp.zeros((*batch.tokens.shape, 2)),
  ...   logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 4)))
  >>> tokens = jnp.ones((1, 3), jnp.int32)
  >>> text, first = Batch(tokens, tokens > 0, tokens, tokens), jnp.zeros(1)
  >>> sums = preference(even, dpo())(
  ...   None, {}, Pairs(text, text, first, first), None)
  >>> round(float(sums.total), 4), float(sums.count)  # log 2 of one pair
  (0.6931, 1.0)
  """
  nats = causal_lm(model, per_row=True, chunk_size=chunk_size)

  def loss(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
    scores = score(nats, base, params, batch, key, term.mismatched)
    terms = jnp.where(scores.real > 0, term.value(scores), 0.0)
    chosen, rejected = _gains(scores) if term.referenced else _means(scores)
    sums = LossSum(terms, scores.real, scores.real * (chosen > rejected))
    return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))

  return loss


def score(
  nats: Loss, base: Base, params: Params, batch: Any, key: Key, mismatched: bool
) -> Scores:
  """Returns the `Scores` of a batch; `nats` are sums for each row.

  The texts of a pair are read one after the other, each as a batch of B rows.

  Raises:
    Error: the batch is not of pairs, or lacks mismatched replies.
  """
  if not isinstance(batch, Pairs):
    raise Error(
      f'a preference loss reads Pairs, not {type(batch).__name__}: the '
      'examples of its task must be types.Pair.'
    )
  if mismatched and batch.mismatched is None:
    raise Error(
      'this loss needs replies to other prompts (Pairs.mismatched): the '
      '`prepare` of its task must add them.'
    )
  chosen = nats(base, params, batch.chosen, key)
  rejected = nats(base, params, batch.rejected, key)
  other = None
  if mismatched:
    # Only its value is used, without a gradient.
    fixed = jax.tree.map(jax.lax.stop_gradient, params)
    other = -nats(base, fixed, batch.mismatched, key).total
  real = jnp.any(jnp.asarray(batch.chosen.segments) > 0, -1)
  return Scores(
    chosen=-chosen.total,
    rejected=-rejected.total,
    reference_chosen=batch.reference_chosen,
    reference_rejected=batch.reference_rejected,
    chosen_tokens=chosen.count,
    rejected_tokens=rejected.count,
    real=real.astype(jnp.float32),
    mismatched=other,
    reference_mismatched=batch.reference_mismatched,
  )
