"""Reward models: the task that trains one, and a trained one as a judge.

`reward_model` is a task of pairs of replies. `judge` loads a directory in the
form of transformers, such as `export --to merged` writes of a run of this task,
for the task `grpo`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import data, local, models
from fedjax_llm.data.collate import pairs
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import preferences, tasks
from fedjax_llm.types import Base, Batch, Error, Example, Loss, Pair

__all__ = ['reward_model']

# The name of the reward model's weights in the base of a run.
WEIGHTS = 'reward_model'


def reward_model(centre: float = 0.0) -> tasks.Task:
  """Returns the task of a reward model, which learns from pairs of replies.

  Its network is causal with one score a text: `model.name=pretrained` of a
  language model gets a new head, and a directory whose config.json names
  ...ForSequenceClassification brings one. The adapter trains the head where
  `adapter.modules_to_save` names 'score'. The loss is `local.bradley_terry`.

  Args:
    centre: the weight of the squared sum of both rewards, which keeps them near
      zero.

  Raises:
    Error: `centre` is negative.

  >>> reward_model().scores
  ('reward',)
  """
  if not centre >= 0:
    raise Error(f'task.centre is {centre}; it must be 0 or more.')

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.bradley_terry(loaded.model, centre=centre, per_row=per_row)

  def example(length: int, vocab_size: int) -> Any:
    tokens = (np.arange(length) * 7919 % vocab_size).astype(np.int32)
    text = Example(tokens, np.arange(length) > 0)
    return Pair(text, text)

  return tasks.Task(
    loss,
    encode=preferences.encode,
    collate=pairs,
    check=check,
    metrics=tasks.Measures('pair', accuracies=True),
    example=example,
    head=('score',),
    peft_type='SEQ_CLS',
    scores=('reward',),
  )


def check(loaded: LoadedModel) -> None:
  """Raises `Error` for a network that does not score texts by one number.

  >>> check(models.random())
  Traceback (most recent call last):
  fedjax_llm.types.Error: random-0 (llama) has no score of whole texts, which \
a reward model needs: take a causal network.
  """
  tasks.of_texts(loaded)
  if loaded.config.head != 'score':
    raise Error(
      f'{loaded.name} ({loaded.config.family}) has no score of whole texts, '
      'which a reward model needs: take a causal network.'
    )
  if len(loaded.config.labels) != 1:
    raise Error(
      f'{loaded.name} has {len(loaded.config.labels)} scores '
      f'({", ".join(loaded.config.labels)}); a reward model has one.'
    )


class Judge(NamedTuple):
  """A reward model: `score(base, batch) -> [B]` reads `base[WEIGHTS]`."""

  score: Callable[[Base, Batch], jax.Array]
  base: Base


def judge(path: str, tokenizer: Tokenizer, **settings: Any) -> Judge:
  """Returns the reward model of a directory, with weights of its own.

  Args:
    path: a directory of a causal network with one score.
    tokenizer: of the texts that it will read.
    settings: of `models.pretrained`.

  Raises:
    Error: no such model, or its tokens are others than those of `tokenizer`.
  """
  loaded = models.pretrained(path, **settings)
  check(loaded)
  assert loaded.directory is not None
  own = data.tokenizers.bytes()
  if (loaded.directory / 'tokenizer.json').is_file():
    own = data.tokenizers.pretrained(str(loaded.directory))
  if _tokens(own) != _tokens(tokenizer):
    raise Error(
      f'task.reward_model: the tokens of {path} are not those of the model '
      f'that is trained ({own.vocab_size} and {tokenizer.vocab_size} of them): '
      'a reward model reads replies as tokens, so both need one tokenizer.'
    )
  if loaded.config.vocab_size < tokenizer.vocab_size:
    raise Error(
      f'task.reward_model: {path} embeds {loaded.config.vocab_size} tokens, '
      f'and the model that is trained writes {tokenizer.vocab_size}.'
    )
  reward = local.reward_of(loaded.model)
  return Judge(
    lambda base, batch: reward(base[WEIGHTS], {}, batch), loaded.base
  )


def _tokens(tokenizer: Tokenizer) -> Any:
  """Returns the bytes of all tokens, or their number where they are unknown."""
  if tokenizer.pieces is None:
    return tokenizer.vocab_size
  return data.alignment.pieces(tokenizer)
