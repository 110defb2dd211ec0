"""The task of rewarded replies, for methods that sample them: `grpo`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm import local, models
from fedjax_llm.data import collate
from fedjax_llm.local import rewards
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import reward_models, tasks
from fedjax_llm.run.ends import ends
from fedjax_llm.run.texts import tokenizer_of
from fedjax_llm.types import Batch, Error, Example

__all__ = ['grpo']


def grpo(
  marker: str = '',
  exact: float = 1.0,
  form: float = 0.0,
  max_new_tokens: int = 32,
  temperature: float = 1.0,
  reward_model: str | None = None,
  learned: float = 1.0,
) -> tasks.Task:
  """Returns the task of sampled replies with their rewards (`local.grpo`).

  A record's prompt is what the model replies to, and its response the right
  reply. The reward of a reply is

      exact * [its answer is that of the response] + form * [it has the form]
        + learned * r(prompt, reply)

  where the answer is what follows the last `marker` (such as '####'), or the
  whole reply without one; a reply has the form if it ends by itself and holds
  the marker once. Answers are compared token by token. r is the score of
  `reward_model`, of which a run of the task `reward_model` is one, written by
  `python -m fedjax_llm.export --to merged`. Its weights are frozen and stand
  beside those of the model; the metric 'accuracy' is the mean reward.

  Held-out replies are greedy: the loss is minus their mean reward.

  Args:
    marker: the text before an answer.
    exact: the weight of a right answer.
    form: the weight of the form.
    max_new_tokens: the length at which a reply is cut.
    temperature: of the softmax from which replies are sampled. The clipped
      ratio is that of the model itself, at temperature 1.
    reward_model: a directory of a causal network with one score and the same
      tokens; None: rewards are by rule alone.
    learned: the weight of its score.

  Raises:
    Error: a number out of range; from `loss`, a reward model that does not fit.

  >>> grpo(marker='####', form=0.1).metrics.unit
  'prompt'
  """
  if max_new_tokens < 1:
    raise Error(f'task.max_new_tokens is {max_new_tokens}; it must be above 0.')
  if not temperature > 0:
    raise Error(f'task.temperature is {temperature}; it must be above 0.')
  scored = reward_model is not None and learned
  if not exact and not form and not scored:
    raise Error(
      f'task.exact and task.form are 0, {reward_model=} and {learned=}: no '
      'reply has a reward.'
    )
  judges: dict[str, reward_models.Judge] = {}

  def judge(loaded: LoadedModel) -> reward_models.Judge:
    assert reward_model is not None
    if reward_model not in judges:
      judges[reward_model] = reward_models.judge(
        reward_model,
        tokenizer_of(loaded),
        dtype=loaded.base['embed_tokens']['embedding'].dtype.name,
      )
    return judges[reward_model]

  def check(loaded: LoadedModel) -> None:
    tasks.causal_lm().check(loaded)

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Any:
    tokenizer = tokenizer_of(loaded)
    tokens = tuple(tokenizer.encode(marker)) if marker else ()
    stops = ends(loaded, tokenizer, 'chat')
    rules = [(exact, rewards.exact(tokens)), (form, rewards.ended(tokens))]
    return local.Sampled(
      model=loaded.model,
      sample=models.sampler(
        loaded,
        max_new_tokens=max_new_tokens,
        stops=stops,
        temperature=temperature,
      ),
      rule=rewards.weighted([(w, rule) for w, rule in rules if w]),
      stops=stops,
      per_row=per_row,
      learned=by_model(loaded) if scored else None,
    )

  def by_model(loaded: LoadedModel) -> Any:
    score = judge(loaded).score
    return lambda base, batch: learned * score(base, batch)

  def beside(loaded: LoadedModel) -> Any:
    return {reward_models.WEIGHTS: judge(loaded).base}

  def example(length: int, vocab_size: int) -> Example:
    tokens = np.arange(length) * 7919 % vocab_size
    learned = np.arange(length) >= max(1, length - 4)
    return Example(tokens.astype(np.int32), learned)

  return tasks.Task(
    loss,
    collate=_one_a_row,
    metrics=tasks.Measures('prompt', accuracies=True),
    check=check,
    example=example,
    writes=True,
    beside=beside if scored else None,
  )


def _one_a_row(
  examples: Any, width: int, pad_id: int = 0
) -> Callable[[Any], Batch]:
  """Returns `collate.texts`; an `Error` for packed rows."""
  build = collate.texts(examples, width, pad_id)

  def rows(rows: Any) -> Batch:
    if any(len(row) > 1 for row in rows):
      raise Error(
        'replies are sampled to one prompt a row: cohort.packing=False.'
      )
    return build(rows)

  return rows
