"""A selection without near duplicates, by MinHash (extra `select`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm import batching
from fedjax_llm.data.selection.types import Examples, Features, Selection
from fedjax_llm.types import Error


def near_duplicates(
  threshold: float = 0.7, ngram: int = 5, permutations: int = 128
) -> Selection:
  """Returns a selection of examples that resemble no earlier one.

      J(A, B) = |A and B| / |A or B| >= threshold

  A and B are the sets of a text's n-grams of tokens. Within each client, in the
  order of its examples, an example is left out if the estimate of its Jaccard
  similarity with one that was kept reaches the threshold (Broder 1997). The
  signatures and their index are those of the package datasketch; its index
  proposes candidates, and the estimates decide. Examples of different clients
  are not compared: nothing is sent.

  Args:
    threshold: the similarity from which an example is a duplicate.
    ngram: tokens of a shingle; a shorter text is one shingle.
    permutations: hash functions of a signature; the standard error of an
      estimate is at most 0.5 / sqrt(permutations).

  Raises:
    Error: a value out of range; when it runs, no package datasketch.

  >>> selection = near_duplicates(0.8)
  >>> selection.prepare is not None
  True
  """
  if not 0 < threshold < 1:
    raise Error(
      f'selection.threshold is {threshold}; it is a similarity between 0 and 1.'
    )
  for name, value in (('ngram', ngram), ('permutations', permutations)):
    if value < 1:
      raise Error(f'selection.{name} is {value}; it must be at least 1.')

  def prepare(
    examples: Examples, features: Features, seed: int
  ) -> list[np.ndarray]:
    del features
    return [
      _distinct(own, threshold, ngram, permutations, seed) for own in examples
    ]

  return Selection(prepare=prepare)


def shingles(example: Any, ngram: int) -> set[bytes]:
  """Returns the set of n-grams of an example's tokens, as bytes.

  >>> from fedjax_llm.types import Example
  >>> text = Example(np.array([1, 2, 1, 2], np.int32), np.ones(4, bool))
  >>> len(shingles(text, 2)), len(shingles(text, 9))  # 12 and 21; all
  (2, 1)
  """
  result = set()
  for text in batching.texts_of(example):
    tokens = np.ascontiguousarray(text.tokens, np.int32)
    last = max(len(tokens) - ngram, 0)
    result |= {tokens[i : i + ngram].tobytes() for i in range(last + 1)}
  return result


def _distinct(
  own: Sequence[Any], threshold: float, ngram: int, size: int, seed: int
) -> np.ndarray:
  try:
    import datasketch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise Error(
      'selection.name=near_duplicates needs the package datasketch: install '
      'the extra `select`.'
    ) from error
  index = datasketch.MinHashLSH(threshold=threshold, num_perm=size)
  signatures, kept = {}, []
  for place, example in enumerate(own):
    signature = datasketch.MinHash(num_perm=size, seed=seed + 1)
    for shingle in sorted(shingles(example, ngram)):
      signature.update(shingle)
    alike = index.query(signature)
    if any(signature.jaccard(signatures[i]) >= threshold for i in alike):
      continue
    index.insert(place, signature)
    signatures[place] = signature
    kept.append(place)
  return np.array(kept, np.int64)
