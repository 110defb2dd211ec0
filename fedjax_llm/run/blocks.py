"""The number of clients that train at once, for `block_size='auto'`.

`auto` chooses it by the speed of matrix products and by the memory of a device.
"""

import os
from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm import batching
from fedjax_llm.run import costs
from fedjax_llm.types import Cohort, Error, FederatedAlgorithm

# Rows m * B * T of a block's products with the base. On two CPU cores blocks
# of 1024 rows took 0.83 and 0.85 of the time of blocks of 512 for clients of 64
# rows (widths 64 and 256), and 0.95 for clients of 512; whole cohorts of 4,096
# rows and more took longer again: a layer's outputs have left the caches when
# the next layer begins (`scripts/benchmarks/ours.py --block`, 2026-11-22).
_CPU_ROWS = 1024
# On accelerators a product of this many rows is bound by arithmetic, not by
# reading the weights; more only costs memory. Calculated, not measured.
_ROWS = 16384
# The share of the host's free memory that a program may take.
_HOST_SHARE = 0.8


def rule(rows: int, num_clients: int, platform: str | None = None) -> int:
  """Returns the fastest block size, for `rows` = B * T of one client's step.

  It is the largest block that stays within the rows above, evened out so that
  the last block is not nearly empty.

  >>> rule(64, 16, 'cpu'), rule(512, 16, 'cpu'), rule(64, 10, 'cpu')
  (16, 2, 10)
  """
  platform = platform or jax.default_backend()
  most = (_CPU_ROWS if platform == 'cpu' else _ROWS) // max(rows, 1)
  most = min(max(most, 1), num_clients)
  return -(-num_clients // -(-num_clients // most))


def memory() -> int | None:
  """Returns the bytes a program may take on the first device, None if unknown.

  That is an accelerator's own limit, or four fifths of the host's free memory
  (of the container's, where that is less).
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return int(stats['bytes_limit'])
  if jax.default_backend() != 'cpu':
    return None
  limits = []
  try:
    with open('/proc/meminfo') as file:
      fields = dict(line.split(':', 1) for line in file)
    limits.append(int(fields['MemAvailable'].split()[0]) * 1024)
    with open('/sys/fs/cgroup/memory.max') as file:
      limit = file.read().strip()
    with open('/sys/fs/cgroup/memory.current') as file:
      used = int(file.read())
    if limit != 'max':
      limits.append(int(limit) - used)
  except (OSError, KeyError, ValueError):
    pass
  if not limits and hasattr(os, 'sysconf'):
    limits.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  return int(_HOST_SHARE * min(limits)) if limits else None


def choose(
  needs: Callable[[int], int | None],
  guess: Callable[[int], int],
  *,
  rows: int,
  num_clients: int,
  limit: int | None,
) -> int:
  """Returns the block size of a run.

  It starts at `rule` and is lowered until the program fits. `guess(m)` returns
  the bytes that the traced program needs, and `needs(m)` those of the compiled
  one; `needs` is called only where the guess exceeds half of the limit.

  Raises:
    Error: a single client does not fit.

  >>> choose(lambda m: 3 * m, lambda m: 2 * m, rows=64, num_clients=8, limit=12)
  4
  """
  size = rule(rows, num_clients)
  while limit is not None:
    needed = guess(size)
    if needed <= limit / 2:
      break
    if needed <= 1.2 * limit:
      needed = needs(size) or needed
      if needed <= limit:
        break
    if size == 1:
      raise Error(
        f'block_size=auto: one client needs {needed / 1e9:.2f} GB, and there '
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
  """Returns the block size of a built run: `choose` on its traced round.

  `method(m)` builds the algorithm with blocks of m clients; `num_rows` and
  `num_model` are the sizes of its mesh axes.
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
    cost = costs.of(jax.make_jaxpr(round)(state, full, base), trips=steps)
    split = costs.num_bytes(base) // num_model
    split += costs.num_bytes(full) // num_rows
    return split + costs.num_bytes(state) + cost.temporary

  def needs(m):
    if not all(
      getattr(x, 'is_fully_addressable', True) for x in jax.tree.leaves(base)
    ):
      return None  # one process cannot compile a program of several
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
