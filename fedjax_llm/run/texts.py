"""Builds the model and the population of clients that a config names."""

from collections.abc import Callable, Sequence
from typing import Any

from fedjax_llm import data
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import tasks
from fedjax_llm.types import Population

Make = Callable[..., Any]  # (section, **injected) -> what its builder returns


def model(
  make: Make, labels: Sequence[str] | None, place: Any = None
) -> LoadedModel:
  """Returns the model; one that is drawn at random reads bytes.

  Args:
    make: builds a section of the config.
    labels: the names of the classes or scores; None: it has none.
    place: the device places of the weights, as `devices.sharding.placement`.
  """
  tokenizer = data.tokenizers.bytes()
  return make(
    'model',
    vocab_size=tokenizer.vocab_size,
    eos_ids=(tokenizer.eos_id,),
    labels=labels,
    place=place,
  )


def tokenizer_of(loaded: LoadedModel) -> data.tokenizers.Tokenizer:
  """Returns the tokenizer of a model's files, or bytes where it has none.

  A network of images alone reads no text.
  """
  if loaded.directory is None or loaded.config.image is not None:
    return data.tokenizers.bytes()
  return data.tokenizers.pretrained(str(loaded.directory))


def population(
  make: Make,
  *,
  task: tasks.Task,
  records: Any,
  labels: Sequence[str] | None,
  tokenizer: data.tokenizers.Tokenizer,
  seed: int,
  alter: Any = None,
  encode: Any = None,
) -> Population:
  """Returns the clients with their encoded texts.

  `alter` changes the records of some clients: see `data.population.build`;
  `encode` takes the place of the task's encoder.
  """
  return make(
    'population',
    records=records,
    tokenizer=tokenizer,
    partition=make('partition'),
    labels=labels,
    seed=seed,
    encode=encode or task.encode,
    alter=alter,
  )
