"""Partitions: assign records to clients.

Every builder returns a function `(records, seed) -> names` with the name of
each record's client. Random partitions depend on the content of the records,
not on their order in a file.
"""

import heapq
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.data.dealing import Partition as Partition
from fedjax_llm.data.dealing import (
  assign,
  check_clients,
  generator,
  labels_of,
  names_of,
  parts,
  shuffled,
)
from fedjax_llm.data.dealing import keyed as keyed
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

__all__ = ['dirichlet', 'iid', 'natural', 'one_label', 'pooled', 'quantity']

# -------------------------------------------------------------- partitions --


def natural() -> Partition:
  """Returns the partition by the clients of the data, `Record.client`.

  Raises `Error` if a record has no client.

  >>> records = [Record(client='ann', text='a'), Record(client='bob', text='b')]
  >>> natural()(records, 0)
  ['ann', 'bob']
  """

  def partition(records, seed):
    del seed
    for record in records:
      if record.client is None:
        raise Error(
          f'{record.where or "record"}: the partition natural needs the client '
          'of each record; give the source a client_key, or choose iid.'
        )
    return [record.client for record in records]

  return partition


class Pooled(NamedTuple):
  """A partition whose clients are tested apart, but train as a single one."""

  of: Partition

  def __call__(self, records: Sequence[Record], seed: int) -> list[str]:
    return self.of(records, seed)


def pooled(of: Partition = natural()) -> Partition:  # noqa: B008 (pure)
  """Returns a partition whose clients' training examples are pooled.

  The clients of `of` hold out examples and are tested as always, but a single
  client, 'all', trains, on the examples of all of them. It takes the steps of a
  whole cohort, so that it computes as much as the federation that it is
  compared with.

  >>> records = [Record(client='ann', text='a'), Record(client='bob', text='b')]
  >>> pooled()(records, 0)
  ['ann', 'bob']
  """
  return Pooled(of)


def iid(num_clients: int) -> Partition:
  """Returns a random partition with sizes as equal as possible.

  Raises `Error` if there are more clients than records.

  >>> records = [Record(text=str(i)) for i in range(5)]
  >>> sorted(Counter(iid(2)(records, 0)).values())
  [2, 3]
  """

  def partition(records, seed):
    check_clients('iid', num_clients, len(records), 'records')
    sizes = parts(len(records), np.ones(num_clients))
    return assign(shuffled(records, seed, 'iid'), sizes.tolist())

  return partition


def dirichlet(
  num_clients: int, alpha: float = 0.5, min_size: int = 1
) -> Partition:
  """Returns a partition with label skew: Dirichlet(alpha) for each label.

      p_c ~ Dirichlet(alpha, ..., alpha)  [N],  client n gets p_c[n] of label c

  Small alpha gives clients with few labels, large alpha approaches iid. A
  client with fewer than `min_size` records then takes random records, each from
  the client that is the largest at that moment.

  Raises `Error` if a record has no label, if alpha is not positive or if there
  are fewer than num_clients * min_size records.

  Source: Yurochkin et al., arXiv 1905.12022, section 4; Li et al., arXiv
  2102.02079, section 4.1.

  >>> records = [Record(text=str(i), label='ab'[i % 2]) for i in range(8)]
  >>> sorted(Counter(dirichlet(2, alpha=100.0)(records, 0)).values())
  [4, 4]
  """

  def partition(records, seed):
    labels = labels_of('dirichlet', records)
    if not alpha > 0 or not np.isfinite(alpha):
      raise Error(f'dirichlet: alpha is {alpha}, but must be positive.')
    if min_size < 0:
      raise Error(
        f'dirichlet: min_size is {min_size}, but must not be negative.'
      )
    most = len(records) // max(1, min_size)
    what = f'that {len(records)} records at min_size={min_size} allow'
    check_clients('dirichlet', num_clients, most, what)
    by_label: dict[str, list[int]] = {
      label: [] for label in sorted(set(labels))
    }
    for place in shuffled(records, seed, 'dirichlet'):
      by_label[labels[place]].append(place)
    held: list[list[int]] = [[] for _ in range(num_clients)]
    for label, mine in by_label.items():
      rng = generator(seed, 'dirichlet', label)
      shares = rng.dirichlet(np.full(num_clients, alpha))
      if not np.isfinite(shares).all():  # alpha so small that all underflow
        shares = np.eye(num_clients)[rng.integers(num_clients)]
      cuts = np.cumsum(parts(len(mine), shares))[:-1]
      for n, part in enumerate(np.split(np.array(mine, int), cuts)):
        held[n] += part.tolist()
    _lift(held, min_size, generator(seed, 'dirichlet', 'lift'))
    names = [''] * len(records)
    for name, places in zip(names_of(num_clients), held):
      for place in places:
        names[place] = name
    return names

  return partition


def _lift(held: list[list[int]], min_size: int, rng) -> None:
  """Moves records from the largest clients to those below min_size."""
  heap = [(-len(places), n) for n, places in enumerate(held)]
  heapq.heapify(heap)
  for places in held:
    while len(places) < min_size:
      size, n = heapq.heappop(heap)
      if -size == len(held[n]):  # otherwise the client has grown: out of date
        places.append(held[n].pop(int(rng.integers(len(held[n])))))
      heapq.heappush(heap, (-len(held[n]), n))


def quantity(num_clients: int, sigma: float = 1.0) -> Partition:
  """Returns a partition with quantity skew: log-normal sizes, iid records.

      size_n ~ exp(sigma * z_n),  z_n ~ N(0, 1),  at least one record each

  Raises `Error` if there are more clients than records or sigma is negative.

  >>> records = [Record(text=str(i)) for i in range(12)]
  >>> sorted(Counter(quantity(3, sigma=2.0)(records, 0)).values())
  [2, 4, 6]
  """

  def partition(records, seed):
    check_clients('quantity', num_clients, len(records), 'records')
    if not sigma >= 0 or not np.isfinite(sigma):
      raise Error(f'quantity: sigma is {sigma}, but must not be negative.')
    z = generator(seed, 'quantity').standard_normal(num_clients)
    shares = np.exp(sigma * (z - z.max()))
    sizes = 1 + parts(len(records) - num_clients, shares)
    return assign(shuffled(records, seed, 'quantity'), sizes.tolist())

  return partition


def one_label(num_clients: int | None = None) -> Partition:
  """Returns a partition with one label for each client, named by the label.

  With `num_clients` the records of a label are split evenly over several
  clients (`label/0000`, ...), more of them for larger labels.

  Raises `Error` if a record has no label or if there are fewer clients than
  labels or more than records.

  >>> records = [Record(text=str(i), label='ab'[i % 2]) for i in range(4)]
  >>> one_label()(records, 0)
  ['a', 'b', 'a', 'b']
  """

  def partition(records, seed):
    labels = labels_of('one_label', records)
    if num_clients is None:
      return labels
    sizes = Counter(labels)
    if not len(sizes) <= num_clients <= len(records):
      raise Error(
        f'one_label: num_clients is {num_clients}, but must be between the '
        f'{len(sizes)} labels and the {len(records)} records.'
      )
    clients = dict.fromkeys(sizes, 1)
    # The next client goes to the label with the largest clients.
    heap = [(-float(size), label) for label, size in sizes.items()]
    heapq.heapify(heap)
    for _ in range(num_clients - len(sizes)):
      _, label = heapq.heappop(heap)
      clients[label] += 1
      heapq.heappush(heap, (-sizes[label] / clients[label], label))
    names, seen = [''] * len(records), Counter()
    for place in shuffled(records, seed, 'one_label'):
      label = labels[place]
      names[place] = f'{label}/{seen[label] % clients[label]:04}'
      seen[label] += 1
    return names

  return partition


# --------------------------------------------------------------- histogram --


def histogram(names: Sequence[str], width: int = 40) -> str:
  """Formats the sizes of the clients as text, in bins that double.

  >>> print(histogram(['a', 'b', 'b', 'c', 'c', 'c'], width=8))
  3 clients, 6 records: min 1, median 2, max 3 a client
        1  ####      1
      2-3  ########  2
  """
  sizes = sorted(Counter(names).values())
  if not sizes:
    return '0 clients, 0 records'
  bins = Counter(size.bit_length() - 1 for size in sizes)
  longest = max(bins.values())
  lines = [
    f'{len(sizes):,} clients, {len(names):,} records: min {sizes[0]:,}, median '
    f'{statistics.median(sizes):,.6g}, max {sizes[-1]:,} a client'
  ]
  low, high = min(bins), max(bins)
  ranges = {
    b: '1' if b == 0 else f'{2**b:,}-{2 ** (b + 1) - 1:,}'
    for b in range(low, high + 1)
  }
  column = max(7, *(len(text) for text in ranges.values()))
  for b, text in ranges.items():
    bar = '#' * -(-bins[b] * width // longest)
    lines.append(f'{text:>{column}}  {bar:<{width}}  {bins[b]:,}')
  return '\n'.join(lines)
