"""Partitions by size, meaning and time, beside those of `partition`.

Like all partitions they return `(records, seed) -> names`, depend on the
content of the records and not on their order, and give every record once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_llm.data.dealing import (
  Partition,
  assign,
  check_clients,
  content,
  generator,
  keyed,
  names_of,
  parts,
  shuffled,
)
from fedjax_llm.data.partition import dirichlet
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

__all__ = ['clusters', 'exponential', 'linear', 'square', 'time_drift']

# Returns vectors [records, D].
Embed = Callable[[Sequence[Record]], Any]


def linear(num_clients: int) -> Partition:
  """Returns a partition with sizes in proportion to 1, 2, ..., N.

      size_n ~ n + 1,  at least one record each,  iid records

  Raises `Error` if there are more clients than records.

  >>> records = [Record(text=str(i)) for i in range(6)]
  >>> names = linear(3)(records, 0)
  >>> [names.count(f'client000{n}') for n in range(3)]
  [1, 2, 3]
  """
  return _sized('linear', num_clients, lambda n: n + 1.0)


def square(num_clients: int) -> Partition:
  """Returns a partition with sizes in proportion to 1, 4, ..., N^2.

      size_n ~ (n + 1)^2,  at least one record each,  iid records

  Raises `Error` if there are more clients than records.

  >>> records = [Record(text=str(i)) for i in range(14)]
  >>> names = square(3)(records, 0)
  >>> [names.count(f'client000{n}') for n in range(3)]
  [1, 4, 9]
  """
  return _sized('square', num_clients, lambda n: (n + 1.0) ** 2)


def exponential(num_clients: int, rate: float = 1.0) -> Partition:
  """Returns a partition with sizes that grow by a factor from client to client.

      size_n ~ exp(rate * n),  at least one record each,  iid records

  Raises `Error` if there are more clients than records, or if the rate is
  negative.

  >>> records = [Record(text=str(i)) for i in range(14)]
  >>> names = exponential(3)(records, 0)
  >>> [names.count(f'client000{n}') for n in range(3)]
  [1, 4, 9]
  """
  if not rate >= 0 or not np.isfinite(rate):
    raise Error(f'exponential: rate is {rate}, but must not be negative.')
  return _sized(
    'exponential', num_clients, lambda n: np.exp(rate * (n - n.max()))
  )


def _sized(
  rule: str, num_clients: int, share: Callable[[np.ndarray], np.ndarray]
) -> Partition:
  """Returns a partition of iid records with shares of the client's number.

  One record is set aside for each client and the others are divided by the
  shares, so that no client is empty.
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    check_clients(rule, num_clients, len(records), 'records')
    shares = share(np.arange(num_clients, dtype=float))
    sizes = _sizes(len(records), shares)
    return assign(shuffled(records, seed, rule), sizes.tolist())

  return partition


def _sizes(total: int, shares: np.ndarray) -> np.ndarray:
  """Rounds shares [N] to sizes of at least one with the sum `total`."""
  sizes = parts(total, shares)
  if sizes.min() < 1:
    sizes = 1 + parts(total - len(shares), shares)
  return sizes


def time_drift(num_clients: int, drift: float = 1.0) -> Partition:
  """Returns a partition in which each client holds a period of time.

  The records, sorted by `Record.date` (as text, or as numbers where all are
  numbers), are cut into N periods of equal size; client n holds period n. Of
  each period a share 1 - drift is dealt to random clients instead: 1 is one
  period a client, 0 is iid.

  Raises `Error` if a record has no date, if drift is outside 0 to 1, or if
  there are more clients than records.

  >>> records = [Record(text=d, date=d) for d in ('2020', '2022', '2019')]
  >>> time_drift(3)(records, 0)
  ['client0001', 'client0002', 'client0000']
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    if not 0 <= drift <= 1:
      raise Error(f'time_drift: drift is {drift}, but must be from 0 to 1.')
    check_clients('time_drift', num_clients, len(records), 'records')
    dates = []
    for record in records:
      if record.date is None:
        raise Error(
          f'{record.where or "record"}: the partition time_drift needs the '
          'date of each record; give the source a date_key.'
        )
      dates.append(record.date)
    when = times(dates)
    order = sorted(shuffled(records, seed, 'time_drift'), key=when.__getitem__)
    sizes = parts(len(records), np.ones(num_clients))
    names = assign(order, sizes.tolist())
    keys = [keyed(seed, 'moved', content(r)) for r in records]
    moved = sorted(range(len(records)), key=keys.__getitem__)
    moved = moved[: round((1 - drift) * len(records))]
    # The moved records change places among themselves: sizes stay.
    given = generator(seed, 'time_drift').permutation(len(moved))
    swapped = [names[moved[place]] for place in given]
    for place, name in zip(moved, swapped, strict=True):
      names[place] = name
    return names

  return partition


def times(dates: Sequence[str]) -> list[Any]:
  """Returns dates as numbers where all are numbers, else as text.

  >>> times(['10', '9'])
  [10.0, 9.0]
  """
  try:
    return [float(date) for date in dates]
  except ValueError:
    return list(dates)


def hashed_words(records: Sequence[Record]) -> np.ndarray:
  """Returns vectors [records, 256] of the words of each record.

  Each word counts at a place and with a sign that its hash tells, weighted by
  log(records / records with the word); rows have norm one. It is a stand-in for
  the vectors of a sentence encoder.

  >>> hashed_words([Record(text='to be'), Record(text='not to be')]).shape
  (2, 256)
  """
  sets = [set(_text(record).lower().split()) for record in records]
  seen: dict[str, int] = {}
  for words in sets:
    for word in words:
      seen[word] = seen.get(word, 0) + 1
  vectors = np.zeros((len(records), 256))
  for row, words in zip(vectors, sets, strict=True):
    for word in sorted(words):
      digest = keyed(0, 'word', word)
      sign = 1 if digest[1] % 2 else -1
      row[digest[0]] += sign * np.log((1 + len(records)) / seen[word])
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.maximum(norms, 1e-12)


def _text(record: Record) -> str:
  if record.messages is not None:
    return ' '.join(str(m.get('content') or '') for m in record.messages)
  return ' '.join(x for x in (record.prompt, record.text, record.pair) if x)


def clusters(
  num_clients: int,
  num_clusters: int | None = None,
  alpha: float | None = None,
  embed: Embed | None = None,
) -> Partition:
  """Returns a partition by meaning: k-means clusters of embeddings.

  Each cluster is a client; with `alpha`, the clusters (`num_clusters` of them,
  by default as many as clients) take the place of labels in
  `partition.dirichlet(num_clients, alpha)`. `embed` returns vectors [records,
  D], for example those of a sentence encoder; the default is `hashed_words`.
  K-means starts from records chosen far from each other (k-means++) and ends
  when no record moves, at most after 100 steps; an empty cluster takes the
  record that is the farthest from its centre.

  Raises `Error` if there are more clusters than records, or if the embeddings
  are not finite vectors, one a record.

  >>> words = ['the cat', 'a cat', 'my ship', 'the ship']
  >>> names = clusters(2)([Record(text=word) for word in words], 0)
  >>> sorted(set(names))
  ['client0000', 'client0001']
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    number = num_clusters or num_clients
    if alpha is None and number != num_clients:
      raise Error(
        f'clusters: num_clusters is {num_clusters} and num_clients is '
        f'{num_clients}; without alpha each cluster is a client.'
      )
    check_clients('clusters', number, len(records), 'records')
    order = shuffled(records, seed, 'clusters')
    function = embed or hashed_words
    vectors = np.asarray(function([records[i] for i in order]), float)
    if vectors.ndim != 2 or len(vectors) != len(records):
      raise Error(
        f'clusters: embed returned an array {vectors.shape}, but must return '
        f'[{len(records)}, D].'
      )
    if not np.isfinite(vectors).all():
      raise Error('clusters: embed returned a value that is not finite.')
    owners = _kmeans(vectors, number, generator(seed, 'clusters'))
    names, clients = [''] * len(records), names_of(number)
    for place, owner in zip(order, owners, strict=True):
      names[place] = clients[owner]
    if alpha is None:
      return names
    relabelled = [
      r._replace(label=name) for r, name in zip(records, names, strict=True)
    ]
    return dirichlet(num_clients, alpha=alpha)(relabelled, seed)

  return partition


def _kmeans(vectors: np.ndarray, number: int, rng) -> np.ndarray:
  """Returns the cluster [records] of each of the vectors [records, D]."""
  centres = [vectors[rng.integers(len(vectors))]]
  nearest = np.full(len(vectors), np.inf)
  for _ in range(number - 1):
    nearest = np.minimum(nearest, ((vectors - centres[-1]) ** 2).sum(1))
    total = nearest.sum()
    weight = nearest / total if total > 0 else None
    centres.append(vectors[rng.choice(len(vectors), p=weight)])
  means, owners = np.stack(centres), np.full(len(vectors), -1)
  for _ in range(100):
    distance = (
      (vectors**2).sum(1)[:, None]
      - 2 * vectors @ means.T
      + (means**2).sum(1)[None]
    )  # [records, clusters]
    new = distance.argmin(1)
    for empty in np.flatnonzero(np.bincount(new, minlength=number) == 0):
      crowded = np.bincount(new, minlength=number)[new] > 1
      own = np.where(crowded, distance[np.arange(len(new)), new], -np.inf)
      new[own.argmax()] = empty
    if (new == owners).all():
      break
    owners = new
    means = np.stack([vectors[owners == k].mean(0) for k in range(number)])
  return owners
