"""Group-relative policy optimisation (GRPO) inside a client's update.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1. A client samples
G replies to each of its prompts with the model that it received, scores them by
a rule, and takes its steps on the clipped loss.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import batching, tree
from fedjax_llm.local.losses import reply_log_probs
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.local.rewards import Replies, Rule
from fedjax_llm.local.sgd import descend
from fedjax_llm.types import (
  Base,
  Batch,
  ClientOutput,
  Error,
  Key,
  LocalUpdate,
  LossSum,
  Model,
  Params,
  known,
)

Scale = Literal['group', 'batch', 'none']
Reduction = Literal['grpo', 'bnpo', 'dr_grpo']


class Rollouts(NamedTuple):
  """Sampled replies of one step: a kind of batch, [..., M, ...] with M = B G.

  The replies to one prompt stand one after the other.
  """

  text: Batch  # [..., M, T + N] prompts with replies, a loss on the replies
  starts: Any  # [..., M] int32, the lengths of the prompts
  reply: Any  # [..., M, N] int32, -1 after the end
  old: Any  # [..., M, N] log-probabilities under the model that sampled
  reference: Any  # [..., M, N] the same under the reference
  advantage: Any  # [..., M]
  reward: Any  # [..., M]

  def real(self) -> Any:
    return self.text.real()

  def places(self) -> int:
    return self.text.places()

  def used(self) -> Any:
    return self.text.used()

  def learned(self) -> Any:
    return self.text.learned()


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """A model that samples replies and a rule that scores them.

  It is the loss of a task of rewards: its call evaluates greedy replies,
  `LossSum(-reward, 1, reward)` summed over prompts, or a row with `per_row`.
  `sample(base, params, tokens [B, T], lengths [B], key, greedy) -> [B, N]`
  returns replies with the token that ends them, then -1 (`models.sampler`).
  `learned(base, texts) -> [M]`, the reward of prompts with replies by a model
  whose weights are in the base, is added to that of the rule.

  >>> from fedjax_llm.local import rewards
  >>> loss = Sampled(Model(None, None), None, rewards.exact(), stops=(2,))
  >>> loss.per_row
  False
  """

  model: Model
  sample: Callable[..., jax.Array]
  rule: Rule
  stops: tuple[int, ...]
  per_row: bool = False
  learned: Callable[[Base, Batch], jax.Array] | None = None

  def __call__(
    self, base: Base, params: Params, batch: Batch, key: Key
  ) -> LossSum:
    del key  # the likeliest tokens
    starts, zero = prompts(batch), jax.random.key(0)
    reply = self.sample(base, params, batch.tokens, starts, zero, greedy=True)
    here = (starts > 0).astype(jnp.float32)
    reward = jnp.where(here > 0, self.score(batch, reply, base), 0.0)
    sums = LossSum(-reward, here, reward)
    return sums if self.per_row else LossSum(*map(jnp.sum, sums))

  def score(
    self, batch: Batch, reply: jax.Array, base: Base = None
  ) -> jax.Array:
    """Returns the reward of each reply [M, N] to a batch of prompts, [M]."""
    reward = self._by_rule(batch, reply)
    if self.learned is None:
      return reward
    whole = texts(jnp.asarray(batch.tokens), prompts(batch), reply)
    return reward + self.learned(base, whole)

  def _by_rule(self, batch: Batch, reply: jax.Array) -> jax.Array:
    stop = jnp.isin(reply, jnp.asarray(self.stops))
    mask = jnp.asarray(batch.loss_mask) & ~jnp.isin(
      jnp.asarray(batch.tokens), jnp.asarray(self.stops)
    )
    width = mask.shape[1]
    index = prompts(batch)[:, None] + jnp.arange(width)
    inside = jnp.take_along_axis(mask, jnp.minimum(index, width - 1), axis=1)
    inside &= index < width
    picked = jnp.take_along_axis(
      jnp.asarray(batch.tokens), jnp.minimum(index, width - 1), axis=1
    )
    return self.rule(
      Replies(
        tokens=jnp.where(stop, -1, reply),
        answer=jnp.where(inside, picked, -1),
        ended=jnp.any(stop, axis=1),
      )
    )


def prompts(batch: Batch) -> jax.Array:
  """Returns the lengths of the prompts of texts, [B]; 0 on padding.

  A prompt ends where the loss mask begins.

  >>> mask = jnp.array([[False, False, True], [False, False, False]])
  >>> prompts(Batch(mask, mask, mask, mask)).tolist()
  [2, 0]
  """
  mask = jnp.asarray(batch.loss_mask)
  return jnp.where(jnp.any(mask, 1), jnp.argmax(mask, 1), 0).astype(jnp.int32)


def advantages(
  reward: jax.Array,
  group_size: int,
  scale: Scale = 'group',
  eps: float = 1e-4,
  real: jax.Array | None = None,
) -> jax.Array:
  """Returns the advantages of replies, [M], in groups of consecutive replies.

      A = (r - mean_group r) / (std + eps)

  with the standard deviation of the group, of the whole batch, or without a
  division ('none', Liu et al. 2025, arXiv 2503.20783); both divide by n - 1.
  `real` [M] is False for padding, which does not count for that of the batch.

  >>> advantages(jnp.array([1.0, 0.0, 5.0, 5.0]), 2, 'none').tolist()
  [0.5, -0.5, 0.0, 0.0]
  """
  groups = reward.reshape(-1, group_size)
  gain = groups - groups.mean(1, keepdims=True)
  if scale == 'group':
    squares = jnp.sum(gain**2, 1, keepdims=True)
    gain = gain / (jnp.sqrt(squares / max(group_size - 1, 1)) + eps)
  elif scale == 'batch':
    here = jnp.ones_like(reward) if real is None else real.astype(reward.dtype)
    num = jnp.sum(here)
    mean = jnp.sum(here * reward) / jnp.maximum(num, 1)
    squares = jnp.sum(here * (reward - mean) ** 2)
    gain = gain / (jnp.sqrt(squares / jnp.maximum(num - 1, 1)) + eps)
  return gain.reshape(-1)


def clipped(
  log_p: jax.Array,
  rollouts: Rollouts,
  *,
  clip: float = 0.2,
  clip_high: float | None = None,
  kl: float = 0.0,
  reduction: Reduction = 'grpo',
) -> LossSum:
  """Returns GRPO's loss as a sum and a count, from log-probabilities [M, N].

      rho = exp(log pi - log pi_old),
      k = exp(d) - d - 1,  d = log pi_0 - log pi,
      term = -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) + kl k

  'grpo' is the mean over replies of their token means, 'bnpo' the mean over all
  tokens of the batch, 'dr_grpo' the sum over tokens a reply, divided by the
  largest length N (arXiv 2503.20783, section 3).

  >>> one = jnp.ones((1, 2))
  >>> text = Batch(one, one, one, one)
  >>> rollouts = Rollouts(text, one[0], one, one, one, jnp.array([1.0]), one[0])
  >>> sums = clipped(one, rollouts)
  >>> float(sums.total), float(sums.count)  # rho is 1: minus the advantage
  (-1.0, 1.0)
  """
  mask = rollouts.reply >= 0  # [M, N]
  ratio = jnp.exp(jnp.where(mask, log_p - rollouts.old, 0.0))
  gain = rollouts.advantage[:, None]
  high = clip if clip_high is None else clip_high
  bounded = jnp.clip(ratio, 1 - clip, 1 + high)
  terms = -jnp.minimum(ratio * gain, bounded * gain)
  apart = jnp.where(mask, rollouts.reference - log_p, 0.0)
  terms += kl * (jnp.exp(apart) - apart - 1)
  terms = jnp.where(mask, terms, 0.0)
  sizes = jnp.sum(mask, 1).astype(jnp.float32)  # [M]
  some = (sizes > 0).astype(jnp.float32)
  if reduction == 'bnpo':
    total, count = jnp.sum(terms), jnp.sum(sizes)
  else:
    most = mask.shape[1] if reduction == 'dr_grpo' else jnp.maximum(sizes, 1)
    total, count = jnp.sum(jnp.sum(terms, 1) / most), jnp.sum(some)
  reward = jnp.sum(some * rollouts.reward) / jnp.maximum(jnp.sum(some), 1)
  return LossSum(total, count, count * reward)


def rolled(
  loss: Sampled,
  base: Base,
  params: Params,
  batch: Batch,
  key: Key,
  *,
  group_size: int,
  scale: Scale = 'group',
  reference: Literal['start', 'base'] = 'start',
) -> Rollouts:
  """Returns G sampled replies to each prompt of a batch, with advantages.

  Nothing of it has a gradient.
  """
  batch = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), batch)
  batch = batch._replace(bound=None)
  starts = prompts(batch)  # [M]
  reply = loss.sample(base, params, batch.tokens, starts, key)  # [M, N]
  reply = jnp.where(starts[:, None] > 0, reply, -1)
  reward = jnp.where(starts > 0, loss.score(batch, reply, base), 0.0)
  text = texts(jnp.asarray(batch.tokens), starts, reply)
  log_p = reply_log_probs(loss.model)
  old = log_p(base, params, text, starts, reply)
  first = old if reference == 'start' else log_p(base, {}, text, starts, reply)
  gain = advantages(reward, group_size, scale, real=starts > 0)
  out = Rollouts(text, starts, reply, old, first, gain, reward)
  return jax.lax.stop_gradient(out)


def texts(tokens: Any, starts: Any, reply: Any) -> Batch:
  """Returns prompts [M, T] of lengths [M] followed by replies [M, N].

  >>> batch = texts(
  ...   jnp.array([[5, 6, 0]]), jnp.array([2]), jnp.array([[8, -1]]))
  >>> batch.tokens.tolist(), batch.loss_mask.astype(int).tolist()
  ([[5, 6, 8, 0, 0]], [[0, 0, 1, 0, 0]])
  """
  width = tokens.shape[1] + reply.shape[1]
  place = jnp.broadcast_to(jnp.arange(width), (tokens.shape[0], width))
  prompt = jnp.pad(tokens, ((0, 0), (0, reply.shape[1])))
  at = place - starts[:, None]
  new = jnp.take_along_axis(reply, jnp.clip(at, 0, reply.shape[1] - 1), axis=1)
  learned = (at >= 0) & (at < reply.shape[1]) & (new >= 0)
  inside = learned | (at < 0)
  whole = jnp.where(at < 0, prompt, jnp.where(learned, new, 0))
  return Batch(
    tokens=jnp.where(inside, whole, 0),
    loss_mask=learned,
    segments=inside.astype(jnp.int32),
    positions=jnp.where(inside, place, 0),
  )


def grpo(
  loss: Sampled | None,
  optimizer: LocalOptimizer,
  *,
  group_size: int = 8,
  clip: float = 0.2,
  clip_high: float | None = None,
  kl: float = 0.0,
  num_iterations: int = 1,
  scale: Scale = 'group',
  reduction: Reduction = 'grpo',
  reference: Literal['start', 'base'] = 'start',
) -> LocalUpdate:
  """Returns local training by GRPO: replies are sampled once a round.

  The S batches of a round are prompts. `group_size` replies are sampled to each
  with the parameters that the client received, pi_old; then it takes
  `num_iterations` passes over the S batches, a step of `clipped` each.

  Args:
    loss: the model that samples, and the rule; None where nothing is trained.
    optimizer: from `optimizer(...)`.
    group_size: replies to a prompt, at least 2.
    clip: epsilon, the lower bound of the ratio is 1 - clip.
    clip_high: the upper bound is 1 + clip_high; None: that of `clip`.
    kl: the weight of the divergence from the reference.
    num_iterations: passes over the sampled replies.
    scale: see `advantages`.
    reduction: see `clipped`.
    reference: 'start', the parameters received (the outer iterations of the
      paper's algorithm 1), or 'base', the base without an adapter.

  Raises:
    Error: a setting out of range, or a loss of another kind.

  >>> from fedjax_llm.local import optimizer
  >>> grpo(None, optimizer('sgd', 0.1), group_size=1)
  Traceback (most recent call last):
  fedjax_llm.types.Error: group_size is 1; a group needs 2 replies or more.
  """
  if loss is not None and not isinstance(loss, Sampled):
    raise Error(
      'grpo samples replies and scores them: it needs the loss of '
      'task.name=grpo, without dropout.'
    )
  if group_size < 2:
    raise Error(f'group_size is {group_size}; a group needs 2 replies or more.')
  if num_iterations < 1:
    raise Error(f'num_iterations is {num_iterations}; it must be at least 1.')
  if known(clip) and not 0 < clip < 1:
    raise Error(f'clip is {clip}; it must be above 0 and below 1.')
  if clip_high is not None and known(clip_high) and not clip_high > 0:
    raise Error(f'clip_high is {clip_high}; it must be above 0.')
  if known(kl) and not 0 <= kl < math.inf:
    raise Error(f'kl is {kl}; it must be 0 or more, and finite.')
  for name, value, allowed in (
    ('scale', scale, ('group', 'batch', 'none')),
    ('reduction', reduction, ('grpo', 'bnpo', 'dr_grpo')),
    ('reference', reference, ('start', 'base')),
  ):
    if value not in allowed:
      raise Error(f'{name} is {value!r}; it must be {", ".join(allowed)}.')

  def objective(base, params, rollouts: Rollouts, key) -> LossSum:
    del key
    assert loss is not None
    log_p = reply_log_probs(loss.model)
    now = log_p(base, params, rollouts.text, rollouts.starts, rollouts.reply)
    return clipped(
      now, rollouts, clip=clip, clip_high=clip_high, kl=kl, reduction=reduction
    )

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    del state
    assert loss is not None
    num_steps = jax.tree.leaves(batches)[0].shape[0]
    (text,) = batching.texts(batches)

    def one(i):
      assert loss is not None
      batch = jax.tree.map(lambda x: jnp.asarray(x)[i], text)
      key = jax.random.fold_in(jax.random.fold_in(context.key, 1), i)
      return rolled(
        *(loss, base, start, batch, key),
        group_size=group_size,
        scale=scale,
        reference=reference,
      )

    rollouts = jax.lax.map(one, jnp.arange(num_steps))
    again = jax.tree.map(
      lambda x: jnp.tile(x, (num_iterations, *[1] * (x.ndim - 1))), rollouts
    )
    trained = tree.like(start, masks.trained)
    out = descend(
      objective,
      optimizer,
      base,
      start,
      optimizer.init(trained),
      again,
      masks,
      context,
    )
    here = (rollouts.starts > 0).astype(jnp.float32)  # [S, M]
    mean = lambda x: jnp.sum(here * x) / jnp.maximum(jnp.sum(here), 1)
    groups = rollouts.reward.reshape(-1, group_size)
    split = jnp.repeat(jnp.ptp(groups, axis=1) > 0, group_size)
    return ClientOutput(
      update=tree.sub(out.end, trained),
      masks=masks,
      # Padding is that of the prompts, in whose places a round is counted.
      work=out.work._replace(
        used=jnp.sum(jnp.asarray(text.segments) > 0, dtype=jnp.float32),
        turns=jnp.int32(num_steps),
      ),
      metrics={
        **out.metrics,
        'reward': mean(rollouts.reward),
        'reply_tokens': mean(jnp.sum(rollouts.reply >= 0, -1)),
        # Prompts whose replies differ in reward: only these have a gradient.
        'split_groups': mean(split.reshape(here.shape)),
      },
    )

  return LocalUpdate(init=lambda params: (), run=run)
