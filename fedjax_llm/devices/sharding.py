"""Device meshes: clients over one mesh axis, the base over the other.

`shard_map` is manual over 'clients' only: each device row trains its own
clients, and the one collective that crosses 'clients' is the sum at the end of
the round. 'model' stays automatic: the compiler splits the products with the
base according to the sharding of its weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_llm.devices.processes import CLIENTS as CLIENTS
from fedjax_llm.devices.processes import MODEL as MODEL
from fedjax_llm.devices.processes import compiled as compiled
from fedjax_llm.devices.processes import dealt as dealt
from fedjax_llm.devices.processes import everywhere as everywhere
from fedjax_llm.devices.processes import fetched as fetched
from fedjax_llm.devices.processes import held as held
from fedjax_llm.devices.processes import here as here
from fedjax_llm.devices.processes import joined as joined
from fedjax_llm.devices.processes import nearby as nearby
from fedjax_llm.devices.processes import num_rows as num_rows
from fedjax_llm.devices.processes import num_sharing as num_sharing
from fedjax_llm.devices.processes import own_rows as own_rows
from fedjax_llm.devices.processes import widened as widened
from fedjax_llm.types import Base, Error

EXECUTIONS = ('shard_map', 'pmap')

# Linear maps with an input that another one has split: the product is summed.
_ROWS = ('o_proj', 'down_proj')


def split_cpu(num: int) -> None:
  """Makes JAX use the cores of a CPU as `num` devices, before it starts.

  All operations besides matrix products then run on as many cores, each with
  its own clients and its own copy of the base. With an accelerator, and for one
  device, nothing changes.

  Raises:
    Error: JAX has started already, with another number of devices.

  >>> split_cpu(1)
  """
  if num == 1:
    return
  try:
    jax.config.update('jax_num_cpu_devices', num)
  except RuntimeError:  # JAX has started
    there = jax.local_device_count()
    if jax.default_backend() == 'cpu' and there != num:
      raise Error(
        f'cpu_devices is {num}, but JAX has begun with {there} here: set it '
        'before the first computation, in a new process.'
      ) from None


def mesh(num_model: int = 1, devices: Any = None) -> Mesh:
  """Returns a ('clients', 'model') mesh of all devices, `num_model` in a row.

  Raises:
    Error: `num_model` does not divide the devices.

  >>> mesh().shape[MODEL]
  1
  """
  if devices is None:  # the devices of one process are adjacent
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  devices = np.asarray(devices)
  check_mesh(num_model, devices.size)
  return Mesh(
    devices.reshape(-1, num_model),
    (CLIENTS, MODEL),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def check_mesh(
  num_model: int, num_devices: int, execution: str = 'shard_map'
) -> None:
  """Raises `Error` unless this many devices form a mesh with rows of M.

  >>> check_mesh(3, 4)
  Traceback (most recent call last):
  fedjax_llm.types.Error: mesh_model is 3: it must divide the 4 devices.
  """
  if num_model < 1 or num_devices % num_model:
    plural = '' if num_devices == 1 else 's'
    raise Error(
      f'mesh_model is {num_model}: it must divide the {num_devices} '
      f'device{plural}.'
    )
  if execution not in EXECUTIONS:
    raise Error(
      f'execution is {execution!r}; it must be one of {", ".join(EXECUTIONS)}.'
    )
  if execution == 'pmap' and num_model > 1:
    raise Error(
      f'execution=pmap knows no model axis: with mesh_model={num_model} use '
      'shard_map.'
    )


def spec(names: Sequence[str], shape: Sequence[int], num: int) -> P:
  """Returns the partition of one leaf of the base over `num` 'model' devices.

  The vocabulary of the embedding, the outputs of a linear map and the inputs of
  the one that follows it are split (Shoeybi et al. 2019, arXiv 1909.08053,
  section 3); a side that the axis does not divide, and every other leaf, is
  whole on every device. The parts of a quantised kernel are split as it is.

  >>> tuple(spec(['layers', 'o_proj', 'kernel'], (2, 4, 6), 2))
  (None, 'model', None)
  """
  axis = None
  if names[-1] == 'embedding':
    axis = 0
  if 'kernel' in names[1:]:
    rows = names[names.index('kernel') - 1] in _ROWS
    axis = len(shape) - 2 if rows else len(shape) - 1
  if axis is None or shape[axis] % num:
    return P()
  return P(*(MODEL if i == axis else None for i in range(len(shape))))


def placement(mesh: Mesh) -> Callable[[Sequence[str], Any], NamedSharding]:
  """Returns `place(path, shape)`, the shardings for `models.pretrained`."""
  num = mesh.shape[MODEL]
  return lambda path, shape: NamedSharding(mesh, spec(path, shape, num))


def base_specs(base: Base, mesh: Mesh) -> Any:
  """Returns the partition of each leaf of the base over 'model': see `spec`.

  >>> import jax.numpy as jnp
  >>> base = {'layers': {'o_proj': {'kernel': jnp.zeros((2, 4, 6))}}}
  >>> tuple(base_specs(base, mesh())['layers']['o_proj']['kernel'])
  (None, 'model', None)
  """

  def leaf(path, x):
    names = [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
    return spec(names, x.shape, mesh.shape[MODEL])

  return jax.tree.map_with_path(leaf, base)


def place(base: Base, mesh: Mesh) -> Base:
  """Puts the base on the devices of the mesh, split by `base_specs`."""

  def leaf(x, spec):
    where = NamedSharding(mesh, spec)
    if where.is_fully_addressable or not x.is_fully_addressable:
      return jax.device_put(x, where)
    x = np.asarray(x)  # every process has it, and takes its own parts
    # Copies: a view of a part would keep the whole array in memory.
    part = lambda at: np.array(x[at])
    return jax.make_array_from_callback(x.shape, where, part)

  return jax.tree.map(leaf, base, base_specs(base, mesh))


def over_clients(
  train: Callable[[Any, Any], Any], mesh: Mesh, execution: str = 'shard_map'
) -> Callable:
  """Returns `train(shared, rows) -> (sums, rows)`, split over 'clients'.

  Every device row gets its part of the leading axis of `rows`, which the mesh
  axis must divide; `sums` are added over all rows, in one all-reduce.

  Args:
    train: a function that trains the clients of one device row.
    mesh: from `mesh`.
    execution: 'shard_map', or 'pmap', which needs one device a row (no 'model'
      axis).

  Raises:
    Error: another name, or 'pmap' with several devices a row.
  """
  check_mesh(mesh.shape[MODEL], mesh.size, execution)
  if mesh.shape[CLIENTS] == 1:  # one row has all clients: nothing to add
    return train
  if execution == 'pmap':
    return _by_pmap(train, mesh)

  def part(shared, rows):
    sums, rows = train(shared, rows)
    # Adapters stay whole on every device of a row: the compiler would otherwise
    # split the sums over 'model' and move them across rows later.
    sums = jax.lax.with_sharding_constraint(sums, P())
    return jax.lax.psum(sums, CLIENTS), rows

  # check_vma is off: it would sum the gradient of replicated inputs over all
  # clients, and each client needs its own gradient.
  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=(P(), P(CLIENTS)),
    out_specs=(P(), P(CLIENTS)),
    axis_names={CLIENTS},
    check_vma=False,
  )


def _by_pmap(train: Callable[[Any, Any], Any], mesh: Mesh) -> Callable:
  num = mesh.shape[CLIENTS]

  def part(shared, rows):
    sums, rows = train(shared, rows)
    return jax.lax.psum(sums, CLIENTS), rows

  def run(shared, rows):
    split = lambda x: x.reshape(num, -1, *x.shape[1:])
    sums, rows = jax.pmap(
      part,
      axis_name=CLIENTS,
      in_axes=(None, 0),
      out_axes=(None, 0),
      devices=list(mesh.devices[:, 0]),
    )(shared, jax.tree.map(split, rows))
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

  return run
