"""How many clients train at once: what `block_size='auto'` means."""

import os
from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm import batching
from fedjax_llm.plan import costs
from fedjax_llm.types import Cohort, Error, FederatedAlgorithm

# Rows m * B * T of a block's products with the base. On two CPU cores blocks
# of 1024 rows took 0.83 and 0.85 of the time of blocks of 512 for clients of 64
# rows (widths 64 and 256), and 0.95 for clients of 512; whole cohorts of 4,096
# rows and more took longer again: what a layer leaves in the caches is gone
# when the next one begins (`scripts/benchmarks/ours.py --block`, 2026-11-22).
_CPU_ROWS = 1024
# On accelerators a product of this many rows is bound by arithmetic, not by
# reading the weights; more only costs memory. Reckoned, not measured.
_ROWS = 16384
# Of the host's memory that is free.
_HOST_SHARE = 0.8


def rule(rows: int, num_clients: int, platform: str | None = None) -> int:
  """Clients a block by speed alone, for `rows` = B * T of one client's step.

  The largest block that stays within the rows above, evened out so that the
  last block is not nearly empty.

  >>> rule(64, 16, 'cpu'), rule(512, 16, 'cpu'), rule(64, 10, 'cpu')
  (16, 2, 10)
  """
  platform = platform or jax.default_backend()
  most = (_CPU_ROWS if platform == 'cpu' else _ROWS) // max(rows, 1)
  most = min(max(most, 1), num_clients)
  return -(-num_clients // -(-num_clients // most))


def memory() -> int | None:
  """Bytes that a program may take on the first device; None if unknown.

  An accelerator's own limit, or four fifths of the host's free memory (of the
  container's, where that is less).
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return int(stats['bytes_limit'])
  if jax.default_backend() != 'cpu':
    return None
  found = []
  try:
    with open('/proc/meminfo') as file:
      fields = dict(line.split(':', 1) for line in file)
    found.append(int(fields['MemAvailable'].split()[0]) * 1024)
    with open('/sys/fs/cgroup/memory.max') as file:
      limit = file.read().strip()
    with open('/sys/fs/cgroup/memory.current') as file:
      used = int(file.read())
    if limit != 'max':
      found.append(int(limit) - used)
  except (OSError, KeyError, ValueError):
    pass
  if not found and hasattr(os, 'sysconf'):
    found.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  return int(_HOST_SHARE * min(found)) if found else None


def choose(
  needs: Callable[[int], int | None],
  guess: Callable[[int], int],
  *,
  rows: int,
  num_clients: int,
  limit: int | None,
) -> int:
  """The block size of a run.

  It starts at `rule` and is lowered until the program fits: `guess(m)` says
  what the traced program needs, and `needs(m)` what the compiled one does,
  asked for where the guess comes within half of the limit.

  Raises:
    Error: not even one client fits.

  >>> choose(lambda m: 3 * m, lambda m: 2 * m, rows=64, num_clients=8, limit=12)
  4
  """
  size = rule(rows, num_clients)
  while limit is not None:
    found = guess(size)
    if found <= limit / 2:
      break
    if found <= 1.2 * limit:
      found = needs(size) or found
      if found <= limit:
        break
    if size == 1:
      raise Error(
        f'block_size=auto: one client needs {found / 1e9:.2f} GB, and there '
        f'are {limit / 1e9:.2f} GB: set model.remat=full, or lower '
        'cohort.batch_size or population.max_length.'
      )
    size = -(-size // 2)
  return size


def auto(
  method: Callable[[int], FederatedAlgorithm],
  params: Any,
  cohort: Cohort,
  base: Any,
  *,
  num_rows: int = 1,
  num_model: int = 1,
) -> int:
  """`choose` for a run that stands ready: its method, a cohort, its base.

  `method(m)` builds the algorithm with blocks of m clients; `num_rows` and
  `num_model` are the axes of its mesh.
  """
  num_clients = -(-len(cohort.ids) // num_rows)
  all_clients, steps, places = batching.axes(cohort.batches)

  def work(m):
    algorithm = method(m)
    state = jax.eval_shape(algorithm.init, jax.random.key(0), params)
    newcomer = jax.eval_shape(algorithm.init_client, state.params)
    several = lambda x: jax.ShapeDtypeStruct((all_clients, *x.shape), x.dtype)
    states = jax.tree.map(several, newcomer)
    return algorithm.round, state, cohort._replace(states=states)

  def guess(m):
    round, state, full = work(m)
    found = costs.of(jax.make_jaxpr(round)(state, full, base), trips=steps)
    split = costs.num_bytes(base) // num_model
    split += costs.num_bytes(full) // num_rows
    return split + costs.num_bytes(state) + found.temporary

  def needs(m):
    if not all(
      getattr(x, 'is_fully_addressable', True) for x in jax.tree.leaves(base)
    ):
      return None  # what several processes run is not compiled by one
    round, state, full = work(m)
    program = jax.jit(round, donate_argnums=0).lower(state, full, base)
    return costs.compiled_bytes(program.compile())

  return choose(
    needs,
    guess,
    rows=places,
    num_clients=num_clients,
    limit=memory(),
  )
