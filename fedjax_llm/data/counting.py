"""Counts of a population: who trains, lengths, sizes and a checksum."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedjax_llm import batching
from fedjax_llm.data.encoding import content
from fedjax_llm.types import Error, Population


def trainers(
  population: Population,
) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
  """Returns the names of the clients that train, and their examples.

  They are the clients of the population, or 'all' where they are pooled.

  >>> people = Population(('ann', 'bob'), ((1, 2), (3,)), ((), ()))
  >>> trainers(people._replace(pooled=True))
  (('all',), ((1, 2, 3),))
  """
  if not population.pooled:
    return population.names, population.train
  return ('all',), (tuple(x for own in population.train for x in own),)


def labels_of(
  labels: Sequence[str], train: Sequence[Sequence[Any]], tested: Sequence[Any]
) -> dict[str, dict[str, int]]:
  """Counts training examples by label, and tested ones of untrained labels."""
  trained = Counter(label_of(example) for own in train for example in own)
  evaluated = Counter(label_of(example) for own in tested for example in own)
  return {
    'labels': {name: trained[i] for i, name in enumerate(labels)},
    'labels_untrained': {
      name: evaluated[i]
      for i, name in enumerate(labels)
      if evaluated[i] and not trained[i]
    },
  }


def label_of(example: Any) -> Any:
  return getattr(example, 'label', None)


def num_tokens(examples: Iterable[Any]) -> int:
  """Counts the tokens in all texts of the examples."""
  return sum(len(x.tokens) for e in examples for x in batching.texts_of(e))


def num_loss_tokens(examples: Iterable[Any]) -> int:
  texts = (x for e in examples for x in batching.texts_of(e))
  return sum(int(x.loss_mask.sum()) for x in texts)


def longest(
  population: Population,
  *,
  vocab_size: int,
  max_positions: int,
  length: Callable[[Any], int] = batching.length,
) -> int:
  """Returns the length of the longest example of a population.

  `length` is the task's. Raises `Error` if a text has a token outside the
  model's vocabulary or more tokens than its positions.

  >>> import numpy as np
  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(5, dtype=np.int32), np.ones(5, bool))
  >>> people = Population(('ann',), train=((text,),), heldout=((),))
  >>> longest(people, vocab_size=8, max_positions=16)
  5
  """
  parts = (population.train, population.heldout, population.new)
  examples = [example for part in parts for own in part for example in own]
  texts = [x for example in examples for x in batching.texts_of(example)]
  positions = max((len(x.tokens) for x in texts), default=0)
  token = max((int(x.tokens.max()) for x in texts), default=-1)
  if positions > max_positions:
    raise Error(
      f'population.max_length: a text has {positions} tokens, but the model has'
      f' only {max_positions} positions.'
    )
  if token >= vocab_size:
    raise Error(
      f'the tokenizer gives token {token}, but the model has only {vocab_size} '
      'tokens: they do not belong together.'
    )
  return max(map(length, examples))


def sizes(population: Population) -> dict[str, dict[str, dict[str, int]]]:
  """Returns the sizes of training clients (`clients`) and new ones (`new`).

  By the client's name: `examples` and `tokens` count its training examples,
  `heldout` its other examples; for a new client they count all its examples.
  Examples without texts have no tokens.

  >>> import numpy as np
  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(5, dtype=np.int32), np.ones(5, bool))
  >>> people = Population(('ann',), train=((text, text),), heldout=((),))
  >>> sizes(people)['clients']['ann']
  {'examples': 2, 'tokens': 10, 'heldout': 0}
  """
  return {
    'clients': {
      name: {'examples': len(a), 'tokens': num_tokens(a), 'heldout': len(b)}
      for name, a, b in zip(
        population.names, population.train, population.heldout, strict=True
      )
    },
    'new': {
      name: {'examples': len(own), 'tokens': num_tokens(own)}
      for name, own in zip(population.new_names, population.new, strict=True)
    },
  }


def digest(population: Population) -> str:
  """Returns a checksum of every client's examples.

  A resumed run must have the same checksum.

  >>> import numpy as np
  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(5, dtype=np.int32), np.ones(5, bool))
  >>> ann = Population(('ann',), train=((text,),), heldout=((),))
  >>> len(digest(ann)), digest(ann) == digest(ann._replace(names=('bob',)))
  (32, False)
  """
  checksum = hashlib.blake2b(digest_size=16)
  sides = (
    (population.names, population.train),
    (population.names, population.heldout),
    (population.new_names, population.new),
  )
  for names, part in sides:
    for name, own in zip(names, part, strict=True):
      checksum.update(repr((name, len(own))).encode())
      for example in own:
        texts = batching.texts_of(example)
        lengths = ' '.join(repr(len(text.tokens)) for text in texts)
        checksum.update(lengths.encode() + content(example))
        if label_of(example) is not None:
          checksum.update(repr(label_of(example)).encode())
  return checksum.hexdigest()
