"""Arrays that travel between processes, through their devices.

The private states of clients lie with process 0: every round their rows travel
to the processes that train the clients and back again. Most methods keep no
private state, and then nothing travels.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_llm.devices import hosts

_PIECE = 1 << 26  # bytes that travel at once


def copied(tree: Any) -> Any:
  """Returns process 0's arrays on every process, bit for bit, in NumPy.

  The others pass arrays of the same shapes; typed keys stay typed keys.

  >>> copied({'a': np.float32(-0.0)})
  {'a': np.float32(-0.0)}
  """
  if not hosts.several():
    return tree

  def leaf(x):
    dtype = getattr(x, 'dtype', np.dtype(float))
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
      data = leaf(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return _spread(x.reshape(1, -1)).reshape(x.shape)

  return jax.tree.map(leaf, tree)


def rows_from_first(
  ask: Callable[[], Any], template: Any, num: int, mine: slice
) -> Any:
  """Returns rows `mine` of the stack [num, ...] of `ask()` on process 0.

  All rows pass through all processes, in pieces of 64 MB, and each process
  keeps its own: a call sends num rows over the network into every process. A
  template (one row) without arrays costs nothing.
  """
  if not hosts.several():
    return ask()
  stack = ask() if hosts.first() and jax.tree.leaves(template) else None

  def leaf(x, rows):
    x = np.asarray(x)
    if rows is None:
      rows = np.zeros((num, *x.shape), x.dtype)
    return _spread(np.asarray(rows))[mine]

  if stack is None:
    return jax.tree.map(lambda x: leaf(x, None), template)
  return jax.tree.map(leaf, template, stack)


def rows_to_first(rows: Any, num_sharing: int = 1) -> Any:
  """Concatenates the rows [n, ...] of all processes on process 0.

  The other processes return their input. All rows travel over the network into
  every process, in pieces of 64 MB. Each group of `num_sharing` consecutive
  processes has the same rows, which are taken once.
  """
  if not hosts.several():
    return rows

  def leaf(x):
    x = np.asarray(x)
    flat, parts = _bytes(x), []
    for start in range(0, len(flat), _step(flat)):
      piece = flat[start : start + _step(flat)]
      parts.append(_gathered(piece) if piece.size else None)
    if not hosts.first() or not flat.size:
      return x
    whole = np.concatenate(parts, axis=1)  # [processes, n, bytes]
    whole = np.ascontiguousarray(whole[::num_sharing])
    return whole.view(x.dtype).reshape(-1, *x.shape[1:])

  return jax.tree.map(leaf, rows)


def shared(store: Any, template: Any) -> Any:
  """Returns the store of private states as all processes read it together.

  `gather(ids)` and `seen()` return process 0's results on every process.
  """

  def gather(ids):
    ask = lambda: store.gather(ids)
    return rows_from_first(ask, template, len(ids), slice(None))

  def seen():
    return np.array(hosts.from_first(lambda: store.seen().tolist()), np.int64)

  return store._replace(gather=gather, seen=seen)


def _spread(rows: np.ndarray) -> np.ndarray:
  """Returns process 0's rows [n, ...] on every process."""
  from jax.experimental import multihost_utils

  flat = _bytes(rows)
  out = np.empty_like(flat)
  for start in range(0, len(flat), _step(flat)):
    piece = slice(start, start + _step(flat))
    if flat.size:
      # The broadcast sums with zeros; as bytes, since -0.0 + 0 would be 0.
      out[piece] = multihost_utils.broadcast_one_to_all(flat[piece])
  return out.view(rows.dtype).reshape(rows.shape)


def _gathered(piece: np.ndarray) -> np.ndarray:
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(piece))


def _bytes(rows: np.ndarray) -> np.ndarray:
  flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
  return flat.view(np.uint8)


def _step(flat: np.ndarray) -> int:
  return max(1, _PIECE // max(1, flat.shape[1]))
