"""The malicious clients of a population, and attacks on their updates.

`attack` returns an `Adversary` from a function on the stack of updates.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.types import Adversary, Error, Key, Update, Uploads


class Side(NamedTuple):
  """The reporting clients of a cohort on both sides, booleans [K]."""

  malicious: jax.Array
  honest: jax.Array


# (uploads, side, key) -> the updates of malicious clients, [K, ...]; the rows
# of other clients are not read.
Act = Callable[[Uploads, Side, Key], Update]


def ids(
  name: str,
  clients: Sequence[int],
  fraction: float,
  seed: int,
  num_clients: int | None,
) -> np.ndarray:
  """Returns the ids of the malicious clients, ascending, int32.

  They are `clients`, or where that is empty floor(fraction * N) clients of
  N = `num_clients`, drawn by `seed`: the same clients in every round.

  Raises:
    Error: an id outside of 0 ... N - 1; a fraction outside of [0, 1]; a
      fraction without N.

  >>> ids('sign_flip', [4, 1], 0.0, 0, None).tolist()
  [1, 4]
  >>> len(ids('sign_flip', (), 0.29, 0, 100))
  29
  """
  if len(clients):
    for client in clients:
      if client < 0 or (num_clients is not None and client >= num_clients):
        limit = '' if num_clients is None else f' to {num_clients - 1}'
        raise Error(
          f'{name}: clients has {client}, but ids are whole numbers from 0'
          f'{limit}.'
        )
    return np.unique(np.asarray(clients, np.int32))
  if not 0 <= fraction <= 1:
    raise Error(f'{name}: fraction={fraction} must be from 0 to 1.')
  if num_clients is None:
    raise Error(
      f'{name}: a fraction of the clients needs num_clients, the size of the '
      'population; or name the malicious clients: clients=(0, 3).'
    )
  # The decimal as the user wrote it: in binary 0.29 * 100 is below 29.
  num = int(Fraction(str(fraction)) * num_clients)
  order = np.random.default_rng(seed).permutation(num_clients)
  return np.sort(order[:num]).astype(np.int32)


def attack(
  name: str,
  act: Act,
  clients: Sequence[int],
  fraction: float,
  seed: int,
  num_clients: int | None,
) -> Adversary:
  """Returns an adversary that replaces the updates of malicious clients.

  Entries that a client does not train stay zero: a server would notice others.

  Raises:
    Error: as `ids`; from the round, uploads without client ids.

  >>> zero = lambda uploads, side, key: tree.zeros_like(uploads.update)
  >>> away = attack('away', zero, [7], 0.0, 0, None)
  >>> ones = jnp.ones(2)
  >>> sent = Uploads(ones, None, None, ones, ones > 0, ids=jnp.array([7, 8]))
  >>> away(sent, None).update.tolist()
  [0.0, 1.0]
  """
  chosen = ids(name, clients, fraction, seed, num_clients)

  def adversary(uploads: Uploads, key: Key) -> Uploads:
    if uploads.ids is None:
      raise Error(f'{name}: the uploads have no ids of clients (Uploads.ids).')
    bad = jnp.isin(jnp.asarray(uploads.ids), jnp.asarray(chosen))
    valid = jnp.asarray(uploads.valid)
    honest = valid & ~bad & (jnp.asarray(uploads.weight) > 0)
    side = Side(valid & bad, honest)
    sent = act(uploads, side, key)
    if uploads.masks is not None and uploads.masks.trained is not None:
      mask = tree.like(uploads.masks.trained, sent)
      sent = tree.apply_mask(
        sent, tree.map_present(tree.rows, mask, tree.like(sent, mask))
      )
    update = tree.where(side.malicious, sent, uploads.update)
    return uploads._replace(update=update)

  return adversary


def noise(update: Update, ids: Any, key: Key) -> Update:
  """Returns standard normal numbers of a stack's shapes and dtypes.

  They depend on the key and on a client's id, not on its row.

  >>> stack, key = {'w': jnp.zeros((2, 3))}, jax.random.key(0)
  >>> two = noise(stack, jnp.array([5, 9]), key)['w']
  >>> bool((noise(stack, jnp.array([9, 5]), key)['w'] == two[::-1]).all())
  True
  """
  leaves, treedef = jax.tree.flatten(update)

  def one(client):
    own = jax.random.fold_in(key, client)
    return [
      jax.random.normal(jax.random.fold_in(own, i), x.shape[1:])
      for i, x in enumerate(leaves)
    ]

  drawn = jax.vmap(one)(jnp.asarray(ids))
  cast = [d.astype(x.dtype) for d, x in zip(drawn, leaves)]
  return jax.tree.unflatten(treedef, cast)
