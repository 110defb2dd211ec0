"""The clients of a round: blocks inside a device, devices over a mesh.

`train` returns a `Trained`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.devices import sharding
from fedjax_llm.server.client import Broadcast, Returned
from fedjax_llm.server.metrics import Rows
from fedjax_llm.server.widths import narrowed
from fedjax_llm.types import ClientState, Cohort, Uploads


class Layout(NamedTuple):
  """Blocks, widths and devices: they change only rounding, memory and speed."""

  block_size: int | None = None
  widths: Sequence[int] = ()
  mesh: jax.sharding.Mesh | None = None
  execution: str = 'shard_map'


class Sums(NamedTuple):
  """A sum over clients that is carried from block to block.

  `zero(common) -> sums`; `add(sums, uploads, common) -> sums`. Some shapes are
  known only with the uploads: `begun(zero, uploads or their shapes, common)`
  has the structure of the result of `add`.
  """

  zero: Callable[[Broadcast | None], Any]
  begun: Callable[[Any, Any, Broadcast | None], Any]
  add: Callable[[Any, Uploads, Broadcast | None], Any]


class Trained(NamedTuple):
  """The result of the clients' half of a round."""

  sums: Any  # the total of `Sums`, None without them
  uploads: Uploads | None  # [K, ...]; None where blocks were added up
  states: ClientState  # [K, ...]
  rows: Rows


def train(
  client: Callable[[Broadcast, Any, Cohort], Returned],
  labels: Any,
  common: Broadcast,
  cohort: Cohort,
  layout: Layout,
  *,
  sums: Sums | None = None,
  keep: bool = True,
) -> Trained:
  """Trains a cohort, `vmap`ped inside blocks that a scan iterates over.

  Args:
    client: the round of one client (`client.one_round`).
    labels: of the parameters.
    common: the values that all clients receive.
    cohort: K clients.
    layout: blocks, widths and devices.
    sums: a sum over clients, block by block; memory is then that of one block.
    keep: with sums and a single block, return its uploads as well.
  """

  def on_device(common: Broadcast, cohort: Cohort):
    """Trains the clients of one device row, block by block."""
    num = cohort.ids.shape[0]
    size = min(layout.block_size or num, num)
    run = lambda block: _block(client, labels, common, layout.widths, block)
    total = None if sums is None else sums.zero(common)
    if size == num:
      uploads, states, rows = run(cohort)
      if sums is not None:
        total = sums.add(total, uploads, common)
        uploads = uploads if keep else None
      return total, (uploads, states, rows)

    def body(total, block):
      uploads, states, rows = run(block)
      if sums is not None:
        total, uploads = sums.add(total, uploads, common), None
      return total, (uploads, states, rows)

    blocks = jax.tree.map(
      lambda x: x.reshape(-1, size, *x.shape[1:]), _pad(cohort, size)
    )
    if sums is not None:
      like, *_ = jax.eval_shape(run, tree.take(blocks, 0))
      total = sums.begun(total, like, common)
    total, outs = jax.lax.scan(body, total, blocks)
    flat = lambda x: x.reshape(-1, *x.shape[2:])[:num]
    return total, jax.tree.map(flat, outs)

  mesh = layout.mesh
  if mesh is None:
    total, outs = on_device(common, cohort)
  else:
    num = cohort.ids.shape[0]
    total, outs = sharding.over_clients(on_device, mesh, layout.execution)(
      common, _pad(cohort, mesh.shape[sharding.CLIENTS])
    )
    outs = jax.tree.map(lambda x: x[:num], outs)
  uploads, states, rows = outs
  return Trained(total, uploads, states, rows)


def _block(client, labels, common: Broadcast, widths, block: Cohort):
  """Trains one block by `vmap`; returns uploads, states and rows of metrics."""

  def run(batches):
    return jax.vmap(lambda row: client(common, labels, row))(
      block._replace(batches=batches)
    )

  outs, places = narrowed(run, block.batches, widths)
  valid = block.valid & outs.finite
  if block.started is None:
    staleness = jnp.zeros(len(block.ids), jnp.int32)
  else:
    staleness = jnp.maximum(common.round - block.started, 0)
    valid &= staleness < jax.tree.leaves(common.history)[0].shape[0]
  uploads = Uploads(
    update=tree.where(valid, outs.sent, tree.zeros_like(outs.sent)),
    start=outs.start,
    masks=outs.masks,
    weight=jnp.where(valid, outs.weight, 0.0).astype(jnp.float32),
    valid=valid,
    ids=block.ids,
    profiles=block.profiles,
    staleness=staleness,
    reports=outs.report,
  )
  states = tree.where(valid, outs.states, block.states)
  # The places of the whole block are counted on its first client.
  turns = jnp.max(outs.work.turns) * len(block.ids)
  first = jnp.arange(len(block.ids)) == 0
  places = jnp.where(first, turns * places, 0)
  rows = Rows(
    reported=valid,
    finite=outs.finite | ~block.valid,
    weight=uploads.weight,
    work=outs.work,
    metrics=outs.metrics,
    bytes_up=outs.bytes_up,
    bytes_down=outs.bytes_down,
    reports=outs.report,
    places=places,
  )
  return uploads, states, rows


def _pad(cohort: Cohort, multiple: int) -> Cohort:
  """Returns a cohort padded to a multiple of clients with rows not valid."""
  num = cohort.ids.shape[0]
  pad = -num % multiple

  def leaf(x):
    x = jnp.asarray(x)
    # The last client is repeated: made-up data could overflow.
    return jnp.concatenate([x, jnp.repeat(x[-1:], pad, axis=0)]) if pad else x

  padded = jax.tree.map(leaf, cohort)
  real = jnp.arange(num + pad) < num
  return padded._replace(valid=padded.valid & real)
