"""Selections that order the examples of a client in every round."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedjax_llm import batching
from fedjax_llm.data.selection.types import Examples, Orders, Selection
from fedjax_llm.types import Error

Score = Callable[[Sequence[Any]], np.ndarray]  # a client's examples -> [n]


def length(own: Sequence[Any]) -> np.ndarray:
  """Returns the number of tokens of each example, [n].

  >>> from fedjax_llm.types import Example
  >>> text = Example(np.arange(3, dtype=np.int32), np.ones(3, bool))
  >>> length([text, text._replace(tokens=text.tokens[:2])]).tolist()
  [3.0, 2.0]
  """
  return np.array([batching.length(x) for x in own], np.float64)


def rarity(own: Sequence[Any]) -> np.ndarray:
  """Returns -sum_t log p(x_t) of each example, [n], in nats.

  p are the frequencies of tokens in the client's own examples (Platanios et al.
  2019, arXiv 1903.09848, section 3.1).

  >>> from fedjax_llm.types import Example
  >>> text = lambda *x: Example(np.array(x, np.int32), np.ones(len(x), bool))
  >>> rarity([text(1, 1), text(1, 2)]).round(3).tolist()  # p = 3/4, 1/4
  [0.575, 1.674]
  """
  texts = [
    np.concatenate([text.tokens for text in batching.texts_of(x)]) for x in own
  ]
  names, counts = np.unique(np.concatenate(texts), return_counts=True)
  nats = -np.log(counts / counts.sum())
  return np.array([nats[np.searchsorted(names, x)].sum() for x in texts])


SCORES: dict[str, Score] = {'length': length, 'rarity': rarity}


def curriculum(
  rounds: int, start: float = 0.1, score: str = 'length'
) -> Selection:
  """Returns a selection of easy examples first.

      c(t) = min(1, sqrt(t (1 - c0^2) / rounds + c0^2))

  In round t (from 0) a client draws from its ceil(c(t) n) examples of the
  smallest score, at random. Competence by the square root, Platanios et al.
  2019, arXiv 1903.09848, equation 8.

  Args:
    rounds: until all examples are in use.
    start: c0, the share of the first round.
    score: 'length' in tokens, or 'rarity' of its words; ties by place.

  Raises:
    Error: no round, a share out of range, an unknown score.

  >>> competence(np.arange(4), 3, 0.5).round(3).tolist()
  [0.5, 0.707, 0.866, 1.0]
  """
  if rounds < 1:
    raise Error(f'selection.rounds is {rounds}; it must be at least 1.')
  if not 0 < start <= 1:
    raise Error(
      f'selection.start is {start}; it is a share above 0 and at most 1.'
    )
  of = _score(score)

  def order(examples: Examples) -> Orders:
    ranked = [np.argsort(of(own), kind='stable') for own in examples]

    def kept(client: int, round: int) -> int:
      share = competence(round, rounds, start)
      return int(np.ceil(share * len(ranked[client]) - 1e-9))

    def passes(client, round, rng) -> Iterator[np.ndarray]:
      easy = ranked[client][: kept(client, round)]
      while True:
        yield rng.permutation(easy)

    return Orders(passes, kept)

  return Selection(order=order)


def competence(round: Any, rounds: int, start: float) -> Any:
  """Returns the share of the examples in use in a round; see `curriculum`.

  >>> float(competence(9, 3, 0.5))
  1.0
  """
  return np.minimum(
    1.0, np.sqrt(np.asarray(round) * (1 - start**2) / rounds + start**2)
  )


def quality(score: str = 'rarity', temperature: float = 1.0) -> Selection:
  """Returns a selection in which examples count by a weight of their own.

      q = softmax(z / temperature),  z = (s - mean s) / std s

  A pass draws n examples with replacement, each with probability q_i, so the
  mean of a step is, in expectation, the mean of the examples weighted by q_i.

  Args:
    score: s, of each of the client's n examples: 'rarity' of its words a token,
      or 'length' in tokens.
    temperature: above 0; large: all count the same.

  Raises:
    Error: a temperature that is not positive, an unknown score.

  >>> weights(np.array([1.0, 3.0]), 1.0).round(3).tolist()
  [0.119, 0.881]
  """
  if not temperature > 0:
    raise Error(f'selection.temperature is {temperature}; it must be above 0.')
  of = _score(score)

  def order(examples: Examples) -> Orders:
    def value(own):
      raw = of(own)
      return raw if score == 'length' else raw / np.maximum(length(own), 1)

    shares = [weights(value(own), temperature) for own in examples]

    def passes(client, round, rng) -> Iterator[np.ndarray]:
      del round
      q = shares[client]
      while True:
        yield rng.choice(len(q), len(q), p=q)

    return Orders(passes, lambda client, round: len(shares[client]))

  return Selection(order=order)


def weights(score: np.ndarray, temperature: float) -> np.ndarray:
  """Returns softmax of the standardised scores over a temperature, [n].

  >>> weights(np.array([2.0, 2.0]), 1.0).tolist()  # equal scores
  [0.5, 0.5]
  """
  score = np.asarray(score, np.float64)
  spread = score.std()
  z = (score - score.mean()) / (spread if spread > 0 else 1.0)
  grown = np.exp((z - z.max()) / temperature)
  return grown / grown.sum()


def _score(name: str) -> Score:
  if name not in SCORES:
    raise Error(
      f'selection.score is {name!r}; it is one of {", ".join(SCORES)}.'
    )
  return SCORES[name]
