"""Deals records to clients: the steps that partitions have in common.

Every random choice is keyed by the seed and the content of a record.
"""

import collections
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

Partition = Callable[[Sequence[Record], int], list[str]]


def keyed(seed: int, *parts: Hashable) -> bytes:
  """Returns 16 random bytes that depend only on the seed and the parts.

  Sorting by them is a keyed permutation: the order of two items does not depend
  on the other items.
  """
  return hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=16).digest()


def generator(seed: int, *parts: Hashable) -> np.random.Generator:
  """Returns a generator of numbers that depends on the seed and the parts."""
  return np.random.default_rng(list(keyed(seed, *parts)))


# Fields that keys have always held; later ones count where they have a value,
# so that the deals of earlier versions stay.
_FIELDS = (
  *('client', 'prompt', 'response', 'text', 'messages', 'label'),
  *('where', 'pair'),
)


def content(record: Record) -> Any:
  """Returns a record's content without its place, as keys are made of it.

  >>> content(Record(text='hi', where='a:1', image=None))._fields[-2:]
  ('where', 'pair')
  """
  record = record._replace(where='')
  names = [
    name
    for name in record._fields
    if name in _FIELDS or getattr(record, name) is not None
  ]
  values = [getattr(record, name) for name in names]
  return collections.namedtuple('Record', names)(*values)


def shuffled(records: Sequence[Record], seed: int, tag: str) -> list[int]:
  """Returns the places of the records in keyed order."""
  keys = [keyed(seed, tag, content(r)) for r in records]
  return sorted(range(len(records)), key=keys.__getitem__)


def names_of(num_clients: int) -> list[str]:
  """Returns names of clients that sort as their numbers."""
  digits = max(4, len(str(num_clients - 1)))  # so that they sort as numbers
  return [f'client{i:0{digits}}' for i in range(num_clients)]


def check_clients(rule: str, num_clients: int, most: int, what: str) -> None:
  """Raises an `Error` for a number of clients outside 1 to `most`."""
  if not 1 <= num_clients <= most:
    raise Error(
      f'{rule}: num_clients is {num_clients}, but must be between 1 and the '
      f'{most} {what}.'
    )


def assign(order: Sequence[int], sizes: Sequence[int]) -> list[str]:
  """Assigns records in `order`: the first `sizes[0]` to client 0, and so on."""
  names: list[str] = [''] * len(order)
  owners = np.repeat(np.arange(len(sizes)), sizes)
  clients = names_of(len(sizes))
  for place, owner in zip(order, owners):
    names[place] = clients[owner]
  return names


def parts(total: int, shares: np.ndarray) -> np.ndarray:
  """Rounds shares [N] to whole numbers that sum to `total`."""
  exact = total * shares / shares.sum()
  sizes = np.floor(exact).astype(int)
  most = np.argsort(sizes - exact, kind='stable')
  sizes[most[: total - sizes.sum()]] += 1
  return sizes


def labels_of(rule: str, records: Sequence[Record]) -> list[str]:
  """Returns the labels; raises an `Error` for a record without one."""
  labels = []
  for record in records:
    if record.label is None:
      raise Error(
        f'{record.where or "record"}: the partition {rule} needs the label of '
        'each record; give the source a label_key.'
      )
    labels.append(record.label)
  return labels
