"""A round on a mesh of devices that are not there: shards and lowering.

`table` lists the shard of every tensor on one device. `lower` lowers the round
for TPUs or GPUs: JAX then checks every type and sharding and writes the
program that a compiler of that platform would get, without a device and
without weights. Two things need more:

- The collectives over 'model' are chosen by the compiler from the shardings, so
  a lowered program only names those over 'clients' (one for each leaf, which
  the compiler combines). `compiled_collectives` counts them all in a program
  compiled for a real mesh, such as that of `topology`.
- Compiling for TPUs needs no TPU but the package libtpu (`topology`). For GPUs
  JAX has no description of absent devices: their programs are compiled where a
  GPU is.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_llm.devices import sharding
from fedjax_llm.plan.work import Work
from fedjax_llm.run import costs
from fedjax_llm.types import Error

PLATFORMS = ('tpu', 'cuda', 'rocm', 'cpu')
_COLLECTIVES = (
  *('all_reduce', 'all_gather', 'reduce_scatter', 'all_to_all'),
  'collective_permute',
)


class Shard(NamedTuple):
  """A tensor of the base: its path, shape, partition, and part of a device."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  spec: P
  part: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """The bytes of the part of one device."""
    return costs.num_bytes(jax.ShapeDtypeStruct(self.part, self.dtype))


def mesh(devices: int, num_model: int) -> AbstractMesh:
  """Returns a ('clients', 'model') mesh without devices.

  Raises:
    Error: `num_model` does not divide the devices.

  >>> dict(mesh(8, 4).shape)
  {'clients': 2, 'model': 4}
  """
  if devices % num_model:
    raise Error(
      f'mesh_model is {num_model}: it must divide the {devices} devices.'
    )
  names = (sharding.CLIENTS, sharding.MODEL)
  sizes = (devices // num_model, num_model)
  return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * 2)


def table(base: Any, mesh: AbstractMesh | Mesh) -> list[Shard]:
  """Returns the shard of every tensor of the base, in the order of the tree.

  >>> base = {'norm': {'scale': jax.ShapeDtypeStruct((6,), np.float32)}}
  >>> [(x.path, x.part, x.num_bytes) for x in table(base, mesh(4, 2))]
  [('norm/scale', (6,), 24)]
  """
  specs = jax.tree.leaves(
    sharding.base_specs(base, mesh),  # type: ignore
    is_leaf=lambda x: isinstance(x, P),
  )
  shards = []
  for (path, x), spec in zip(jax.tree.leaves_with_path(base), specs):
    names = [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
    part = NamedSharding(mesh, spec).shard_shape(x.shape)
    dtype = np.dtype(x.dtype).name
    shards.append(Shard('/'.join(names), x.shape, dtype, spec, part))
  return shards


def lines(shards: list[Shard]) -> list[str]:
  """Returns the table as text, with its sum."""
  cell = lambda shape: ' x '.join(f'{n:,}' for n in shape)
  rows = []
  for shard in shards:
    cut = [i for i, name in enumerate(shard.spec) if name]
    split = f'axis {cut[0]}' if cut else 'whole'
    size = f'{shard.num_bytes / 1e6:,.1f} MB'
    rows.append((shard.path, cell(shard.shape), split, cell(shard.part), size))
  header = ('tensor', 'shape', 'split', 'a device', 'bytes')
  widths = [max(map(len, column)) for column in zip(header, *rows)]
  total = sum(shard.num_bytes for shard in shards)
  return [
    *(
      '  '.join(x.ljust(n) for x, n in zip(row, widths)).rstrip()
      for row in (header, *rows)
    ),
    f'a device holds {total / 1e9:,.2f} GB of the base',
  ]


def inputs(work: Work, mesh: AbstractMesh | Mesh) -> tuple[Any, Any, Any]:
  """Returns state, cohort and base as shapes with their shardings."""
  at = lambda x, spec: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
  )
  specs: Any = sharding.base_specs(work.base, mesh)  # type: ignore
  base = jax.tree.map(at, work.base, specs)
  state = jax.tree.map(lambda x: at(x, P()), work.state)
  rows = mesh.shape[sharding.CLIENTS]
  split = lambda x: P() if x.shape[0] % rows else P(sharding.CLIENTS)
  cohort = jax.tree.map(lambda x: at(x, split(x)), work.cohort)
  return state, cohort, base


def lower(work: Work, mesh: AbstractMesh | Mesh, platform: str) -> Any:
  """Returns the round lowered for a platform; nothing is compiled.

  Args:
    work: of `work.read(..., mesh=mesh)`.
    mesh: of the round.
    platform: one of `PLATFORMS`.

  Raises:
    Error: another platform.
  """
  if platform not in PLATFORMS:
    known = ', '.join(PLATFORMS)
    raise Error(f'--lower {platform} is not one of {known}.')
  step = sharding.compiled(work.algorithm.round, mesh)  # type: ignore
  traced = step.trace(*inputs(work, mesh))
  return traced.lower(lowering_platforms=(platform,))


def collectives(lowered: Any) -> dict[str, int]:
  """Counts the collectives that a lowered program names, by kind."""
  text = lowered.as_text()
  names = re.findall(rf'stablehlo\.({"|".join(_COLLECTIVES)})\b', text)
  return {name: names.count(name) for name in _COLLECTIVES if name in names}


def compiled_collectives(compiled: Any) -> dict[str, int]:
  """Counts the collectives of a compiled program, by kind.

  Each counts once, also in the body of a loop over layers.
  """
  text = compiled.as_text()
  kinds = [name.replace('_', '-') for name in _COLLECTIVES]
  names = re.findall(rf' ({"|".join(kinds)})(?:-start)?\(', text)
  return {name: names.count(name) for name in kinds if name in names}


def topology(name: str, num_model: int) -> Mesh:
  """Returns a mesh of TPUs that are not there, such as 'v5e:2x4'.

  Raises:
    Error: libtpu is not installed, or knows no such topology.
  """
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name=name
    ).devices
  except (RuntimeError, NotImplementedError, ValueError) as error:
    text = ' '.join(str(error).split())[:200]
    raise Error(
      f"--topology {name}: {text} (pip install 'fedjax_llm[tpu]')."
    ) from error
  if math.prod(np.shape(devices)) % num_model:
    raise Error(
      f'mesh_model is {num_model}: it must divide the {len(devices)} devices '
      f'of {name}.'
    )
  return sharding.mesh(num_model, devices)
