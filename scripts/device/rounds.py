"""Rounds of fedjax_llm: tokens per second, operations, memory, compile time."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from clock import median
from stages import Points, attempt

import fedjax_llm as fl
from fedjax_llm import batching, models
from fedjax_llm.devices import sharding
from fedjax_llm.models.network import attention
from fedjax_llm.run import blocks, costs
from fedjax_llm.types import Batch, Cohort, Error


def main_points(dry: bool, have: frozenset[str]) -> Points:
  """64 clients in both row shapes, and the attention implementations."""
  for work in shapes.main(dry):
    yield from point(work, 'ours', have)
  long = shapes.main(dry)[-1]
  for name in implementations():
    yield from point(long, f'ours, {name}', have, attention=name)


def other_points(dry: bool, have: frozenset[str]) -> Points:
  for work in shapes.others(dry):
    yield from point(work, 'ours', have)


def billion_points(dry: bool, have: frozenset[str]) -> Points:
  work = shapes.billion(dry)
  yield from point(work, 'ours', have)
  yield from point(work, 'ours, int8', have, quantisation='int8')


def compile_points(dry: bool, have: frozenset[str]) -> Points:
  """Seconds to trace and to compile one round, by layers in a scan step."""
  work = shapes.main(dry)[0]
  for unroll in sorted({1, 2, work.model['num_layers']}):
    name = f'{work.name}, unroll {unroll}'
    more = {'unroll': unroll}
    yield from attempt(name, have, lambda more=more: times(work, **more)[0])


def point(
  work: shapes.Work, label: str, have: frozenset[str], **settings: Any
) -> Points:
  name = f'{work.name}, {label}'
  yield from attempt(name, have, lambda: measured(work, **settings))


def measured(work: shapes.Work, **settings: Any) -> dict[str, Any]:
  """Returns the median seconds of a round with its memory."""
  compiling, run = times(work, **settings)
  return {**work.result(median(run)), **compiling, 'peak_bytes': peak_bytes()}


def times(work: shapes.Work, **settings: Any) -> tuple[dict[str, Any], Any]:
  """Compiles a round; returns the seconds, and the function that runs one."""
  loaded, params, cohort, loss = setting(work, **settings)
  block = blocks.rule(work.batch * work.length, work.clients)
  algorithm = fl.recipes.fed_avg(
    loss,
    fl.local.optimizer('adamw', 1e-3, weight_decay=0.0),
    block_size=block,
    measure=None,
  )
  state = algorithm.init(jax.random.key(0), params)
  step = sharding.compiled(algorithm.round, None)
  began = time.perf_counter()
  traced = step.trace(state, cohort, loaded.base)
  traced_at = time.perf_counter()
  compiled = traced.lower().compile()
  ended = time.perf_counter()
  flops = costs.operations(traced.jaxpr, trips=work.steps)
  result = {
    'block': block,
    'trace_seconds': traced_at - began,
    'compile_seconds': ended - traced_at,
    'executed': sum(flops.values()),
    'program_bytes': costs.compiled_bytes(compiled),
  }

  def run() -> None:
    nonlocal state
    state, _, info = compiled(state, cohort, loaded.base)
    jax.block_until_ready((state.params, info))

  return result, run


def setting(work: shapes.Work, **settings: Any) -> Any:
  """Returns the model in bf16, its adapter, a cohort, and the loss."""
  loaded = models.random(
    max_positions=max(work.length, 128),
    **work.model,
    dtype='bfloat16',
    **{'compute_dtype': 'bfloat16', **settings},
  )
  adapter = fl.adapters.lora(shapes.RANK, shapes.ALPHA)
  params = adapter.init(jax.random.key(0), loaded.base)
  return loaded, params, cohort(work), fl.local.causal_lm(loaded.model)


def cohort(work: shapes.Work, seed: int = 0) -> Cohort:
  """Returns random rows on the device, with a loss on their second half."""
  k, b, t = work.clients, work.batch, work.length
  rng = np.random.default_rng(seed)
  shape = (k, work.steps, b, t)
  tokens = rng.integers(0, work.model['vocab_size'], shape).astype(np.int32)
  places = np.arange(t, dtype=np.int32)
  batches = Batch(
    tokens,
    np.broadcast_to(places >= t - t // 2, shape),
    np.ones(shape, np.int32),
    np.broadcast_to(places, shape),
  )
  return Cohort(
    ids=jnp.arange(k, dtype=jnp.int32),
    batches=jax.tree.map(jnp.asarray, batching.bounded(batches)),
    weight=jnp.ones(k),
    valid=jnp.ones(k, bool),
  )


def implementations() -> list[str]:
  """Returns the attention implementations that this backend has."""
  names = []
  for name in attention.IMPLEMENTATIONS:
    try:
      attention.choose(name, compute_dtype=jnp.bfloat16)
    except Error:
      continue
    names.append(name)
  return names


def peak_bytes() -> int | None:
  """Returns the most memory that this process held on the device so far."""
  numbers = jax.local_devices()[0].memory_stats() or {}
  return numbers.get('peak_bytes_in_use')
