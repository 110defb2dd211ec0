"""Secure sums: whole numbers under masks that cancel in the sum.

`secure_sum` returns an additive `Codec`; `masked` and `unmasked` are its masks.
One program simulates all clients, so the seeds of pairs are derived from the
round's key; `agreement` has real ones, for processes of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Context, Error

_PAIRS = 401  # the purpose of a key


def _offsets(rows: int, neighbours: int) -> list[int]:
  """Returns distances in the ring of clients, up to `neighbours` a client."""
  return list(range(1, min(neighbours // 2, (rows - 1) // 2) + 1)) or [1]


def _pair(context: Context, first: Any, rows: int, offset: int, like: Any):
  """Returns the mask that rows `first` and `first + offset` share, uint32."""
  key = jax.random.fold_in(context.round_key, _PAIRS)
  key = jax.random.fold_in(jax.random.fold_in(key, offset), first % rows)
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(key, max(len(leaves), 1))
  drawn = [
    jax.random.bits(k, x.shape, jnp.uint32) for k, x in zip(keys, leaves)
  ]
  return jax.tree.unflatten(treedef, drawn)


def masked(numbers: Any, context: Context, neighbours: int = 8) -> Any:
  """Returns a client's uint32 numbers with its masks, modulo 2^32.

      y_k = x_k + sum_d PRG(k, k + d) - sum_d PRG(k - d, k)

  over distances d in the ring of `context.peers`: every mask is added by one
  client and taken away by another (Bonawitz et al. 2017, section 4, with the
  sparse graph of Bell et al. 2020). A message alone is uniform.
  """
  rows = context.peers.shape[0]
  place = jnp.argmax(context.peers == context.client)
  if rows == 1:
    return numbers
  for d in _offsets(rows, neighbours):
    plus = _pair(context, place, rows, d, numbers)
    minus = _pair(context, place - d, rows, d, numbers)
    numbers = jax.tree.map(lambda x, p, m: x + p - m, numbers, plus, minus)
  return numbers


def unmasked(total: Any, context: Context, neighbours: int = 8) -> Any:
  """Returns the sum without the masks that clients without a report left over.

  The server recovers their seeds from shares of the others (`agreement`); here
  it derives them.
  """
  rows = context.peers.shape[0]
  reported = context.reported
  if rows == 1:
    return total

  def without(total):
    for d in _offsets(rows, neighbours):

      def one(total, k, d=d):
        # The pair (k, k + d) is left over where one of the two is missing.
        here = reported[k].astype(jnp.int32)
        left = (here - reported[(k + d) % rows].astype(jnp.int32)).astype(
          jnp.uint32
        )
        mask = _pair(context, k, rows, d, total)
        return jax.tree.map(lambda x, m: x - left * m, total, mask), None

      total, _ = jax.lax.scan(one, total, jnp.arange(rows))
    return total

  return jax.lax.cond(jnp.all(reported), lambda t: t, without, total)


def secure_sum(largest: float = 1.0, neighbours: int = 8) -> Codec:
  """Returns an additive codec of fixed-point numbers whose masks cancel.

      x_k = round(L clip(w_k u_k, -v, v) / v),  L = floor((2^31 - 1) / K)

  modulo 2^32: the server's sum of K messages is exact, and shows no client.
  The error of an entry of the mean is at most v / (2 L) for each client, beside
  what is cut at v. Bytes are 4 an entry.

  Args:
    largest: v, the largest magnitude of an entry of w_k u_k.
    neighbours: the clients that each client shares masks with.

  Raises:
    Error: a number out of range.

  >>> codec, ids = secure_sum(largest=4.0), jnp.arange(3)
  >>> at = lambda k: Context(client=k, peers=ids, round_key=jax.random.key(0),
  ...                        reported=jnp.array([True, True, False]))
  >>> sent = [codec.encode(jnp.array([k + 1.0]), None, (), at(k))[0]
  ...         for k in range(3)]
  >>> codec.decode(sent[0] + sent[1], jnp.zeros(1), at(0)).round(4).tolist()
  [3.0]
  """
  if not largest > 0:
    raise Error(f'upload.largest is {largest}: it must be above 0.')
  if neighbours < 2 or neighbours % 2:
    raise Error(
      f'upload.neighbours is {neighbours}: it must be an even number of at '
      'least 2.'
    )

  def levels(context) -> int:
    return (2**31 - 1) // context.peers.shape[0]

  def encode(update, masks, state, context):
    del masks
    unit = largest / levels(context)

    def leaf(x):
      cut = jnp.clip(x.astype(jnp.float32), -largest, largest)
      # Rounded up, float32 could pass the number of levels.
      most = jnp.float32(levels(context) * (1 - 1e-6))
      return (
        jnp.clip(jnp.round(cut / unit), -most, most)
        .astype(jnp.int32)
        .astype(jnp.uint32)
      )

    return masked(jax.tree.map(leaf, update), context, neighbours), state

  def decode(message, start, context):
    total = unmasked(message, context, neighbours)
    unit = largest / levels(context)
    return tree.map_present(
      lambda x, p: (x.astype(jnp.int32).astype(jnp.float32) * unit).astype(
        p.dtype
      ),
      total,
      start,
    )

  def num_bytes(message, masks):
    del masks
    return jax.tree.map(lambda x: jnp.int32(4 * x.size), message)

  return Codec(
    lambda _: (), encode, decode, num_bytes, additive=True, lossy=True
  )
