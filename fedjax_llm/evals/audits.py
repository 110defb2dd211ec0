"""Figures of privacy audits: what scores say about who was trained on.

A score is higher where a text looks more like one that the model was trained
on. The functions take NumPy arrays of scores; `tokens` computes log-likelihoods
of single tokens, from which the scores come.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Base, Error, Model, Params


class Separation(NamedTuple):
  """How well a score separates members from others.

  >>> Separation(auc=0.5, margin=0.1, tpr=0.01).auc
  0.5
  """

  auc: float  # P(a member's score is above another's), 1 / 2 by chance
  margin: float  # half of its 95 % interval
  tpr: float  # members above all but `rate` of the others


def separation(
  members: Sequence[float] | np.ndarray,
  others: Sequence[float] | np.ndarray,
  *,
  rate: float = 0.01,
) -> Separation:
  """Returns the area under the ROC curve of a score, and its TPR at a low FPR.

      auc = P(s_member > s_other) + P(s_member = s_other) / 2

  with the standard error of Hanley and McNeil 1982. The share of members above
  the threshold that a share `rate` of the others exceeds is the figure of
  Carlini et al. 2022 (arXiv 2112.03570). All three are NaN if a score is.

  Raises:
    Error: no member or no other; a rate outside of [0, 1).

  >>> result = separation([3.0, 4.0], [1.0, 3.0])
  >>> result.auc, result.tpr
  (0.875, 0.5)
  """
  if not 0 <= rate < 1:
    raise Error(f'separation: rate={rate} must be at least 0 and below 1.')
  a, b = np.asarray(members, np.float64), np.asarray(others, np.float64)
  if not len(a) or not len(b):
    raise Error(
      f'separation: {len(a)} members and {len(b)} others; it needs both.'
    )
  if np.isnan(a).any() or np.isnan(b).any():  # NaN would sort as the largest
    return Separation(math.nan, math.nan, math.nan)
  order = np.sort(b)
  below = np.searchsorted(order, a, 'left')
  auc = float(
    np.mean((below + np.searchsorted(order, a, 'right')) / 2) / len(b)
  )
  more, less = auc / (2 - auc), 2 * auc**2 / (1 + auc)
  variance = auc * (1 - auc) + (len(a) - 1) * (more - auc**2)
  variance += (len(b) - 1) * (less - auc**2)
  margin = 1.96 * math.sqrt(max(variance, 0.0) / (len(a) * len(b)))
  threshold = order[len(b) - 1 - math.floor(rate * len(b))]
  return Separation(auc, margin, float(np.mean(a > threshold)))


def exposure(secret: float, others: Sequence[float] | np.ndarray) -> float:
  """Returns the exposure of a secret, from log-likelihoods: bits.

      log2 |R| - log2 rank

  where R are the secret and the `others`, secrets of the same kind that nobody
  trained on, and the rank is the secret's place by likelihood, from 1 (Carlini
  et al. 2019, arXiv 1802.08232, section 4.2). Its expectation is about 1.44 for
  a secret that is not known at all, and log2 |R| is the most that |R| can show.
  It is NaN if a log-likelihood is.

  >>> exposure(-1.0, [-2.0, -3.0, -4.0]), exposure(-9.0, [-2.0, -3.0, -4.0])
  (2.0, 0.0)
  """
  others = np.asarray(others, np.float64)
  if np.isnan(secret) or np.isnan(others).any():  # NaN would rank first
    return math.nan
  rank = 1 + int(np.sum(others >= secret))
  return math.log2(len(others) + 1) - math.log2(rank)


def min_k(nats: np.ndarray, share: float = 0.2) -> float:
  """Returns Min-K%: the mean log-likelihood of the least likely tokens.

  `nats` [T] are log-likelihoods; the ceil(share * T) smallest count (Shi et al.
  2024, arXiv 2310.16789, section 3).

  Raises:
    Error: a share outside of (0, 1]; no token.

  >>> min_k(np.array([-1.0, -5.0, -0.5, -3.0]), share=0.5)
  -4.0
  """
  if not 0 < share <= 1 or not len(nats):
    raise Error(
      f'min_k: share={share} of {len(nats)} tokens: the share is above 0 and '
      'at most 1, of one token or more.'
    )
  num = math.ceil(round(share * len(nats), 6))
  return float(np.mean(np.sort(np.asarray(nats, np.float64))[:num]))


def lira(
  score: float,
  with_it: Sequence[float] | np.ndarray,
  without_it: Sequence[float] | np.ndarray,
  *,
  floor: float = 1e-3,
) -> float:
  """Returns the log-likelihood ratio of LiRA for one text.

      log N(s; mean_in, std_in) - log N(s; mean_out, std_out)

  from the scores of models trained with the text and without it (Carlini et al.
  2022, arXiv 2112.03570, algorithm 1); standard deviations are at least
  `floor`.

  Raises:
    Error: fewer than two models on a side.

  >>> round(lira(1.0, [0.9, 1.1], [-0.1, 0.1]), 6)  # (1 / 0.1)^2 / 2
  50.0
  """

  def log_density(scores, side):
    scores = np.asarray(scores, np.float64)
    if len(scores) < 2:
      raise Error(f'lira: {len(scores)} models {side} the text; 2 are needed.')
    std = max(float(np.std(scores)), floor)
    return -(((score - np.mean(scores)) / std) ** 2) / 2 - math.log(std)

  return float(
    log_density(with_it, 'with') - log_density(without_it, 'without')
  )


def tokens(model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns a function for the log-likelihood of each learned token.

  `tokens(model)(base, params, batch) -> (nats, correct)`, [B, T] each, in the
  places of the tokens themselves; nats are 0 and `correct` is False where the
  loss mask is. A text of which every token of a stretch is correct is one whose
  stretch greedy decoding writes after the tokens before it.

  >>> from fedjax_llm.types import Batch
  >>> even = Model(lambda base, params, batch: jnp.zeros((1, 3, 2)),
  ...              lambda base, params, hidden: jnp.zeros((1, 2, 4)))
  >>> text = jnp.array([[0, 0, 1]])
  >>> nats, correct = tokens(even)(None, {}, Batch(text, text >= 0, text, text))
  >>> nats.round(2).tolist(), correct.tolist()
  ([[0.0, -1.3899999856948853, -1.3899999856948853]], [[False, True, False]])
  """

  def run(
    base: Base, params: Params, batch: Any
  ) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(base, params, batch)
    logits = model.logits(base, params, hidden[:, :-1]).astype(jnp.float32)
    following = batch.tokens[:, 1:]
    here = batch.loss_mask[:, 1:] > 0
    nats = jnp.take_along_axis(
      jax.nn.log_softmax(logits), following[..., None], -1
    )[..., 0]
    right = jnp.argmax(logits, -1) == following
    first = lambda x: jnp.pad(x, ((0, 0), (1, 0)))
    return first(jnp.where(here, nats, 0.0)), first(here & right)

  return run
