"""Partitions by labels and fields, beside those of `partition`.

Like all partitions they return `(records, seed) -> names`, depend on the
content of the records and not on their order, and give every record once.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedjax_llm.data.dealing import (
  Partition,
  check_clients,
  generator,
  labels_of,
  names_of,
  parts,
  shuffled,
)
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

__all__ = ['by_keys', 'inner_dirichlet', 'pathological', 'shards']


def by_keys(keys: Sequence[str] = ('client', 'label')) -> Partition:
  """Returns a partition with a client for each combination of several keys.

  The keys are fields of a record: `client`, `label` or `date`. (A client made
  of several fields of a data set is a list as `data.client_key`.)

  Raises `Error` for another key, or for a record without one of them.

  >>> records = [Record(client='ann', label=x, text=x) for x in 'aba']
  >>> by_keys()(records, 0)
  ['ann/a', 'ann/b', 'ann/a']
  """
  allowed = ('client', 'label', 'date')
  wrong = [key for key in keys if key not in allowed]
  if wrong or not keys:
    raise Error(
      f'partition.keys is {list(keys)}, but must be some of '
      f'{", ".join(allowed)}.'
    )

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    del seed
    names = []
    for record in records:
      values = [getattr(record, key) for key in keys]
      if None in values:
        key = keys[values.index(None)]
        raise Error(
          f'{record.where or "record"}: the partition by_keys needs the {key} '
          f'of each record; give the source a {key}_key.'
        )
      names.append('/'.join(values))
    return names

  return partition


def inner_dirichlet(
  num_clients: int, alpha: float = 0.5, sigma: float = 0.0
) -> Partition:
  """Returns a partition with sizes set first and labels drawn within a client.

      p_n ~ Dirichlet(alpha * N_l * prior)  [labels],  prior_l = share of l

  where N_l is the number of labels. Client n draws its records by p_n one after
  another; a label of which none is left counts no more. Sizes are equal, or
  log-normal with `sigma` (see `partition.quantity`). `partition.dirichlet`
  instead divides each label over the clients, so that sizes follow by chance.

  Raises `Error` if a record has no label, if alpha is not positive, if sigma is
  negative or if there are more clients than records.

  Source: Hsu et al., arXiv 1909.06335, section 3.1; in this form Acar et al.,
  arXiv 2111.04263.

  >>> records = [Record(text=str(i), label='ab'[i % 2]) for i in range(6)]
  >>> names = inner_dirichlet(2, alpha=100.0)(records, 0)
  >>> sorted(names).count('client0000')
  3
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    labels = labels_of('inner_dirichlet', records)
    if not alpha > 0 or not np.isfinite(alpha):
      raise Error(f'inner_dirichlet: alpha is {alpha}, but must be positive.')
    if not sigma >= 0 or not np.isfinite(sigma):
      raise Error(
        f'inner_dirichlet: sigma is {sigma}, but must not be negative.'
      )
    check_clients('inner_dirichlet', num_clients, len(records), 'records')
    z = generator(seed, 'inner', 'sizes').standard_normal(num_clients)
    shares = np.exp(sigma * (z - z.max()))
    sizes = 1 + parts(len(records) - num_clients, shares)
    held = _by_label(records, labels, seed, 'inner_dirichlet')
    left = np.array([len(places) for places in held.values()])  # [labels]
    prior = left / left.sum()
    names, all_places = [''] * len(records), list(held.values())
    for n, name in enumerate(names_of(num_clients)):
      rng = generator(seed, 'inner', n)
      p = rng.dirichlet(np.maximum(alpha * len(left) * prior, 1e-9))
      if not np.isfinite(p).all():
        p = np.eye(len(left))[rng.choice(len(left), p=prior)]
      for _ in range(sizes[n]):
        weight = np.where(left > 0, p, 0.0)
        if not weight.sum() > 0:  # its labels are used up: any other one
          weight = left.astype(float)
        label = rng.choice(len(left), p=weight / weight.sum())
        left[label] -= 1
        names[all_places[label][left[label]]] = name
    return names

  return partition


def shards(num_clients: int, shards_per_client: int = 2) -> Partition:
  """Returns a partition into shards of records sorted by label.

  The records, sorted by label, are cut into num_clients * shards_per_client
  shards of equal size (one more record where it does not divide), and each
  client gets `shards_per_client` random ones. A client has few labels: at most
  those of its shards.

  Raises `Error` if a record has no label, or if there are fewer records than
  shards.

  Source: McMahan et al., arXiv 1602.05629, section 3.

  >>> records = [Record(text=str(i), label='abcd'[i % 4]) for i in range(8)]
  >>> names = shards(2)(records, 0)
  >>> sorted(names).count('client0000')
  4
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    labels = labels_of('shards', records)
    if shards_per_client < 1:
      raise Error(
        f'shards: shards_per_client is {shards_per_client}, but must be at '
        'least 1.'
      )
    most = len(records) // shards_per_client
    what = f'that {len(records)} records in shards allow'
    check_clients('shards', num_clients, most, what)
    held = _by_label(records, labels, seed, 'shards')
    order = [place for places in held.values() for place in places]
    number = num_clients * shards_per_client
    cuts = np.cumsum(parts(len(order), np.ones(number)))[:-1]
    pieces = np.split(np.array(order, int), cuts)
    dealt = generator(seed, 'shards').permutation(number)
    names, clients = [''] * len(records), names_of(num_clients)
    for turn, piece in enumerate(dealt):
      for place in pieces[piece]:
        names[place] = clients[turn // shards_per_client]
    return names

  return partition


def pathological(
  num_clients: int,
  labels_per_client: int = 2,
  assign: Literal['random', 'in_order', 'first_in_order'] = 'random',
) -> Partition:
  """Returns a partition in which each client has a set number of labels.

  Client n has `labels_per_client` of the L labels, sorted by name: with
  `in_order` the labels n, n + 1, ... modulo L; with `random` ones drawn so that
  each label has as many clients as any other, give or take one; with
  `first_in_order` label n modulo L and random others. The records of a label
  are divided evenly over its clients.

  Raises `Error` if a record has no label, if there are fewer labels than
  labels_per_client, if a label would be nobody's, or has fewer records than
  clients.

  >>> records = [Record(text=str(i), label='ab'[i % 2]) for i in range(8)]
  >>> pathological(2, labels_per_client=1, assign='in_order')(records, 0)[:3]
  ['client0000', 'client0001', 'client0000']
  """

  def partition(records: Sequence[Record], seed: int) -> list[str]:
    labels = labels_of('pathological', records)
    held = _by_label(records, labels, seed, 'pathological')
    count, classes = len(held), list(held)
    if not 1 <= labels_per_client <= count:
      raise Error(
        f'pathological: labels_per_client is {labels_per_client}, but must be '
        f'between 1 and the {count} labels.'
      )
    if assign not in ('random', 'in_order', 'first_in_order'):
      raise Error(
        f'pathological: assign is {assign!r}, but must be random, in_order or '
        'first_in_order.'
      )
    check_clients('pathological', num_clients, len(records), 'records')
    if num_clients * labels_per_client < count:
      raise Error(
        f'pathological: {num_clients} clients with {labels_per_client} labels '
        f'each cannot hold {count} labels.'
      )
    chosen = _choose(count, num_clients, labels_per_client, assign, seed)
    names, clients = [''] * len(records), names_of(num_clients)
    for number, label in enumerate(classes):
      owners = [n for n in range(num_clients) if number in chosen[n]]
      if not owners or len(held[label]) < len(owners):
        raise Error(
          f'pathological: the label {label!r} has {len(held[label])} records '
          f'for {len(owners)} clients.'
        )
      for turn, place in enumerate(held[label]):
        names[place] = clients[owners[turn % len(owners)]]
    return names

  return partition


def _choose(
  count: int, num_clients: int, each: int, assign: str, seed: int
) -> list[set[int]]:
  """Returns the labels of each client."""
  if assign == 'in_order':
    return [{(n + i) % count for i in range(each)} for n in range(num_clients)]
  rng = generator(seed, 'pathological')
  chosen, used = [], np.zeros(count)
  for n in range(num_clients):
    mine = {n % count} if assign == 'first_in_order' else set()
    # The least used labels, in random order among equals.
    for label in np.lexsort((rng.random(count), used)):
      if len(mine) < each:
        mine.add(int(label))
    used[list(mine)] += 1
    chosen.append(mine)
  return chosen


def _by_label(
  records: Sequence[Record], labels: Sequence[str], seed: int, tag: str
) -> dict[str, list[Any]]:
  """Returns the places of the records of each label, in keyed order."""
  held: dict[str, list[Any]] = {label: [] for label in sorted(set(labels))}
  for place in shuffled(records, seed, tag):
    held[labels[place]].append(place)
  return held
