"""The time of a round on this machine, measured on a short part of it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.plan import work


def seconds(planned: work.Work, read: Callable[..., work.Work]) -> float:
  """Returns the seconds of a round on one device of this kind.

  `read(num_layers=, num_steps=, cohort_size=)` returns the work of a smaller
  round of the same config. One step of one block of clients is timed on random
  weights, with one layer and with two; time is linear in layers, steps and
  blocks.
  """
  sizes = planned.sizes
  depth = planned.model.config.num_layers
  taken = [
    _step(read(num_layers=layers, num_steps=1, cohort_size=sizes.block))
    for layers in (1, 2)[: min(depth, 2)]
  ]
  each = max(taken[-1] - taken[0], 0.0)
  step = taken[0] + each * (depth - 1)
  return step * sizes.steps * sizes.num_blocks


def _step(small: work.Work) -> float:
  """Returns the median time of three runs, after one that compiles."""
  rng = np.random.default_rng(0)

  def fill(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(x.dtype, jnp.floating):
      values = rng.standard_normal(x.shape, np.float32)
      return jnp.asarray(0.02 * values).astype(x.dtype)
    return jnp.zeros(x.shape, x.dtype)

  state, base = jax.tree.map(fill, (small.state, small.base))
  K, S, B, T = small.sizes.clients, *small.sizes[2:]
  filled = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), small.cohort)
  cohort = filled._replace(
    ids=np.arange(K, dtype=np.int32),
    batches=small.filled(K, S, B, T),
    weight=np.ones(K, np.float32),
    valid=np.ones(K, bool),
  )
  step = jax.jit(small.algorithm.round)
  jax.block_until_ready(step(state, cohort, base))
  taken = []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(step(state, cohort, base))
    taken.append(time.perf_counter() - began)
  return statistics.median(taken) / S
