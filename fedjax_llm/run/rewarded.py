"""The task of rewards by rule, for methods that sample replies: `grpo`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm import data, local, models
from fedjax_llm.data import collate
from fedjax_llm.local import rewards
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import tasks
from fedjax_llm.run.ends import ends
from fedjax_llm.types import Batch, Error, Example

__all__ = ['grpo']


def grpo(
  marker: str = '',
  exact: float = 1.0,
  form: float = 0.0,
  max_new_tokens: int = 32,
  temperature: float = 1.0,
) -> tasks.Task:
  """Returns the task of sampled replies with rewards by rule (`local.grpo`).

  A record's prompt is what the model replies to, and its response the right
  reply. The reward of a reply is

      exact * [its answer is that of the response] + form * [it has the form]

  where the answer is what follows the last `marker` (such as '####'), or the
  whole reply without one; a reply has the form if it ends by itself and holds
  the marker once. Answers are compared token by token.

  Held-out replies are greedy: the loss is minus their mean reward.

  Args:
    marker: the text before an answer.
    exact: the weight of a right answer.
    form: the weight of the form.
    max_new_tokens: the length at which a reply is cut.
    temperature: of the softmax from which replies are sampled. The clipped
      ratio is that of the model itself, at temperature 1.

  Raises:
    Error: a number out of range.

  >>> grpo(marker='####', form=0.1).metrics.unit
  'prompt'
  """
  if max_new_tokens < 1:
    raise Error(f'task.max_new_tokens is {max_new_tokens}; it must be above 0.')
  if not temperature > 0:
    raise Error(f'task.temperature is {temperature}; it must be above 0.')
  if not exact and not form:
    raise Error('task.exact and task.form are 0: no reply has a reward.')

  def check(loaded: LoadedModel) -> None:
    tasks.causal_lm().check(loaded)

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Any:
    tokenizer = data.tokenizers.bytes()
    if loaded.directory is not None:
      tokenizer = data.tokenizers.pretrained(str(loaded.directory))
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
    )

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
