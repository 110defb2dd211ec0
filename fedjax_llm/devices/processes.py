"""Arrays of several processes, over the mesh and over their own rows of it.

The devices of all processes compute a round; everything else is computed by
each group of processes with a copy of the base: one process, or the few that
share one row of the mesh (`num_sharing`) and then do the same work. So arrays
have two views that share memory: over the whole mesh, and over the rows with
devices of this process (`nearby`). For a single process the two views are
equal, and most of these functions do nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_llm.types import Base, Draw, Error

CLIENTS, MODEL = 'clients', 'model'  # the axes of a mesh


def nearby(mesh: Mesh) -> Mesh:
  """Returns the rows of the mesh in which this process has devices.

  These are rows of its own, or one row that it shares with other processes.

  Raises:
    Error: processes have different numbers of devices, or a row would end
      among the devices of a process.
  """
  if jax.process_count() == 1:
    return mesh
  num = mesh.shape[MODEL]
  owners = np.vectorize(lambda d: d.process_index)(mesh.devices)
  each = np.bincount(owners.ravel(), minlength=jax.process_count())
  if len(set(each.tolist())) > 1 or (each[0] % num and num % each[0]):
    raise Error(
      f'mesh_model is {num}: it must divide the devices of each process, or be '
      f'a multiple of them; process 0 has {each[0]}, and all must have the '
      'same number.'
    )
  return Mesh(
    mesh.devices[(owners == jax.process_index()).any(axis=1)],
    mesh.axis_names,
    axis_types=mesh.axis_types,
  )


def num_sharing(mesh: Mesh | None) -> int:
  """Returns the number of processes that share one copy of the base.

  >>> from fedjax_llm.devices.sharding import mesh
  >>> num_sharing(mesh())
  1
  """
  if mesh is None:
    return 1
  return len({device.process_index for device in mesh.devices[0]})


def num_rows(mesh: Mesh | None) -> int:
  """Returns the number of device rows that train clients side by side.

  >>> from fedjax_llm.devices.sharding import mesh
  >>> num_rows(None), num_rows(mesh()) == len(jax.devices())
  (1, True)
  """
  return 1 if mesh is None else mesh.shape[CLIENTS]


def compiled(round: Callable, mesh: Mesh | None) -> Callable:
  """Returns `FederatedAlgorithm.round` as a program that donates the state.

  On a mesh its inputs come from `everywhere`, `joined` and `widened`; the state
  comes out whole on every device. On several processes so do the metrics, and
  the states of clients come out split as the clients are.
  """
  if mesh is None:
    return jax.jit(round, donate_argnums=0)
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(CLIENTS))
  out = (
    (whole, split, whole) if jax.process_count() > 1 else (whole, None, None)
  )
  return jax.jit(round, donate_argnums=0, out_shardings=out)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
  """Returns values that all processes have as arrays whole on every device.

  `compiled` returns its state in the same way, so the second round reuses the
  program of the first.
  """
  if mesh is None:
    return tree
  whole = NamedSharding(mesh, P())
  if jax.process_count() == 1:
    return jax.device_put(tree, whole)

  def leaf(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = leaf(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, whole, lambda at: x[at])

  return jax.tree.map(leaf, tree)


def widened(base: Base, mesh: Mesh | None) -> Base:
  """Returns the base, held on each process's `nearby` rows, over the mesh."""
  if mesh is None or jax.process_count() == 1:
    return base
  return jax.tree.map(lambda x: _seen(x, mesh, x.sharding.spec), base)


def here(tree: Any, mesh: Mesh | None) -> Any:
  """Returns arrays that are whole on every device over the `nearby` rows."""
  if mesh is None or jax.process_count() == 1:
    return tree
  near = nearby(mesh)
  return jax.tree.map(lambda x: _seen(x, near, P()), tree)


def _seen(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  """Returns the same shards as an array over another mesh."""
  shards = [shard.data for shard in x.addressable_shards]
  where = NamedSharding(mesh, spec)
  return jax.make_array_from_single_device_arrays(x.shape, where, shards)


def fetched(tree: Any) -> Any:
  """Returns arrays that processes share whole, in NumPy, on each process.

  All processes must call it together. Stacks [L, ...] travel one layer at a
  time, since the whole stack may fit on no device. Other arrays stay as they
  are.
  """

  def leaf(x):
    if getattr(x, 'is_fully_addressable', True):
      return x
    if x.is_fully_replicated:
      return np.asarray(x)
    if x.ndim > 2:
      return np.stack([leaf(x[i]) for i in range(len(x))])
    whole = NamedSharding(x.sharding.mesh, P())
    return np.asarray(jax.device_put(x, whole))

  return jax.tree.map(leaf, tree)


def dealt(draw: Draw, sizes: Sequence[int], mesh: Mesh) -> Draw:
  """Distributes the clients of a draw over the mesh rows, large ones first.

  `sizes[id]` is the amount of work of a client, which all processes know
  without each other's texts. Rows of padding come last.

  >>> from fedjax_llm.devices.sharding import mesh
  >>> draw = Draw(np.array([0, 1, 2, -1]), np.array([1, 1, 1, 0], bool))
  >>> dealt(draw, [5, 9, 7], mesh()).ids.tolist()
  [1, 2, 0, -1]
  """
  num, ids = len(draw.ids), np.asarray(draw.ids)
  size = np.where(ids < 0, -1, np.asarray(sizes)[np.maximum(ids, 0)])
  order, rows = np.lexsort((np.arange(num), -size)), mesh.shape[CLIENTS]
  places = np.append(order, np.full(-num % rows, -1))
  places = places.reshape(-1, rows).T.ravel()
  return jax.tree.map(lambda x: np.asarray(x)[places[places >= 0]], draw)


def own_rows(draw: Draw, mesh: Mesh | None) -> tuple[Draw, slice]:
  """Pads a draw to a multiple of the mesh rows; returns it and our slice of it.

  Padding is added at its end; a single process gets its draw back.
  """
  if mesh is None or jax.process_count() == 1:
    return draw, slice(0, len(draw.ids))
  pad = -len(draw.ids) % mesh.shape[CLIENTS]
  ids = np.append(draw.ids, np.full(pad, -1)).astype(np.int32)
  reports = np.append(draw.reports, np.zeros(pad)).astype(bool)
  sharing = num_sharing(mesh)  # these have the same rows
  each = len(ids) * sharing // jax.process_count()
  start = each * (jax.process_index() // sharing)
  more = lambda x: x if x is None else np.append(x, np.zeros(pad, x.dtype))
  padded = Draw(
    ids, reports, more(draw.started), more(draw.steps), more(draw.tier)
  )
  return padded, slice(start, start + each)


def joined(rows: Any, mesh: Mesh | None) -> Any:
  """Puts the rows of clients, each process's own, on the devices of the mesh.

  The result is split over 'clients', or whole on every device where the axis
  does not divide the rows. The call returns at once: the transfer overlaps with
  computation.

  >>> from fedjax_llm.devices.sharding import mesh
  >>> joined(np.zeros((3, 2)), mesh()).shape
  (3, 2)
  """
  if mesh is None:
    return jax.device_put(rows)
  split, whole = NamedSharding(mesh, P(CLIENTS)), NamedSharding(mesh, P())
  if jax.process_count() == 1:
    even = lambda x: len(x) % mesh.shape[CLIENTS] == 0
    where = jax.tree.map(lambda x: split if even(x) else whole, rows)
    return jax.device_put(rows, where)
  give = lambda x: jax.make_array_from_process_local_data(split, np.asarray(x))
  return jax.tree.map(give, rows)


def held(rows: Any) -> Any:
  """Returns this process's rows of arrays split over 'clients', in NumPy."""
  if jax.process_count() == 1:
    return jax.device_get(rows)

  def leaf(x):
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])

  return jax.tree.map(leaf, rows)
