"""Devices: clients over one mesh axis, the base over the other.

`shard_map` is manual over 'clients' only: each device row trains its own
clients, and the one collective that crosses 'clients' is the sum at the end of
the round. 'model' stays automatic: the compiler splits the products with the
base by how its weights lie.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_llm.types import Base, Error

CLIENTS, MODEL = 'clients', 'model'

# Linear maps whose input is what another one has split: the product is summed.
_ROWS = ('o_proj', 'down_proj')


def mesh(num_model: int = 1, devices: Any = None) -> Mesh:
  """A ('clients', 'model') mesh of all devices, `num_model` of them a row.

  Raises:
    Error: the devices do not divide into rows.

  >>> mesh().shape[MODEL]
  1
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  if num_model < 1 or devices.size % num_model:
    raise Error(
      f'mesh_model is {num_model}: it must divide the {devices.size} devices.'
    )
  return Mesh(
    devices.reshape(-1, num_model),
    (CLIENTS, MODEL),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def base_specs(base: Base, mesh: Mesh) -> Any:
  """How the weights of the base lie over 'model', leaf by leaf.

  The vocabulary of the embedding, the outputs of a linear map and the inputs of
  the one that follows it are split (Shoeybi et al. 2019, arXiv 1909.08053,
  section 3); a side that the axis does not divide, and all else, is whole on
  every device.

  >>> import jax.numpy as jnp
  >>> base = {'layers': {'o_proj': {'kernel': jnp.zeros((2, 4, 6))}}}
  >>> tuple(base_specs(base, mesh())['layers']['o_proj']['kernel'])
  (None, 'model', None)
  """
  num = mesh.shape[MODEL]

  def leaf(path, x):
    names = [getattr(k, 'key', None) for k in path]
    axis = None
    if names[-1] == 'embedding':
      axis = 0
    elif names[-1] == 'kernel':
      axis = x.ndim - 2 if names[-2] in _ROWS else x.ndim - 1
    if axis is None or x.shape[axis] % num:
      return P()
    return P(*(MODEL if i == axis else None for i in range(x.ndim)))

  return jax.tree.map_with_path(leaf, base)


def place(base: Base, mesh: Mesh) -> Base:
  """The base on the devices of the mesh, split by `base_specs`."""
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    base,
    base_specs(base, mesh),
  )


def over_clients(train: Callable[[Any, Any], Any], mesh: Mesh) -> Callable:
  """`train(shared, rows) -> (sums, rows)` with the rows split over 'clients'.

  Every device row gets its part of the leading axis of `rows`, which the axis
  must divide; `sums` are added up over all of them, in one all-reduce.
  """

  def part(shared, rows):
    sums, rows = train(shared, rows)
    # Adapters are whole on every device of a row: left to itself the compiler
    # splits the sums over 'model' in ways that move them across rows later.
    sums = jax.lax.with_sharding_constraint(sums, P())
    return jax.lax.psum(sums, CLIENTS), rows

  # The check of what varies is off: it would have the gradient of what all
  # clients receive summed over them, and each client wants its own.
  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=(P(), P(CLIENTS)),
    out_specs=(P(), P(CLIENTS)),
    axis_names={CLIENTS},
    check_vma=False,
  )
