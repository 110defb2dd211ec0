"""The rate of matrix products of this process's devices, measured once.

The share of this rate that a round reaches is comparable between machines,
where tokens per second are not. A data sheet's rate is never reached and is
unknown for a CPU, so the rate is measured: square products of one dtype, on
all devices of the process at the same time, the best of several calls.
"""

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_llm.devices import compilation

FILE = 'peaks.json'
_SIDES = {'cpu': 1024}  # 2 GFLOP take milliseconds on a CPU core
_SIDE = 8192  # 1.1 TFLOP fill an accelerator


def measure(
  dtype: Any = 'float32', *, side: int | None = None, calls: int = 5
) -> float:
  """Measures the operations per second of products in `dtype`.

  Every device of this process multiplies two matrices [side, side] at the same
  time. A product counts 2 side^3 operations; the result is the sum over the
  devices, from the fastest of `calls` calls after one that compiles.

  Args:
    dtype: of both matrices; float32 products run as JAX runs them by default,
      so on GPUs that have it in TF32.
    side: the width of the matrices; None: 1,024 on a CPU, 8,192 elsewhere.
    calls: the number of timed calls.

  >>> measure('float32', side=64, calls=1) > 0
  True
  """
  devices = jax.local_devices()
  side = side or _SIDES.get(devices[0].platform, _SIDE)
  mesh = Mesh(np.asarray(devices), ('all',), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, P('all'))
  shape = (len(devices), side, side)

  # Zeros are faster than numbers on some devices.
  rng = np.random.default_rng(0)
  kind = jnp.dtype(dtype)
  draw = lambda: rng.standard_normal(shape[1:], np.float32).astype(kind)
  x, y = (jax.device_put(np.broadcast_to(draw(), shape), split) for _ in 'xy')
  product = jax.jit(jnp.matmul, out_shardings=split)
  jax.block_until_ready(product(x, y))
  best = float('inf')
  for _ in range(calls):
    began = time.perf_counter()
    jax.block_until_ready(product(x, y))
    best = min(best, time.perf_counter() - began)
  return 2.0 * len(devices) * side**3 / best


def known(
  dtype: Any,
  measured: Callable[[Any], float] = measure,
  *,
  again: bool = False,
) -> float | None:
  """Returns the rate of `dtype` from the cache of this machine, or measures it.

  The cache is `peaks.json` in the cache folder (FEDJAX_LLM_CACHE, or
  ~/.cache/fedjax_llm), with one number for each kind of machine, kind and
  number of devices, and dtype. A file that cannot be read is written anew; one
  that cannot be written is left. Remove it to measure again, or set `again`,
  which keeps the larger rate: a busy machine measures one too low.
  """
  file, name = path(), key(dtype)
  rates = _read(file)
  rate = rates.get(name)
  before = float(rate) if isinstance(rate, int | float) and rate > 0 else 0.0
  if before and not again:
    return before
  rate = max(measured(dtype), before)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f'{FILE}.{os.getpid()}')
    new.write_text(json.dumps({**_read(file), name: rate}, indent=1) + '\n')
    new.replace(file)
  except OSError:
    pass
  return rate


def path() -> pathlib.Path:
  """Returns the file of the measured rates."""
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  return pathlib.Path(cache).expanduser() / FILE


def key(dtype: Any) -> str:
  """Returns the name of this machine's rate in the file of rates."""
  devices = jax.local_devices()
  where = f'{len(devices)} x {devices[0].device_kind}'
  parts = [compilation.machine(), where, jnp.dtype(dtype).name]
  if flags := os.environ.get('XLA_FLAGS'):  # they may change the rate
    parts.append(f'XLA_FLAGS={flags}')
  return ', '.join(parts)


def share(
  flops: Mapping[str, float], seconds: float, rate: Callable[[Any], float]
) -> float:
  """Returns the share of the measured rate that a program reached.

      sum_d flops_d / rate(d) / seconds

  Args:
    flops: operations by dtype, as `costs.operations` counts them.
    seconds: of the program.
    rate: operations per second by dtype. Dtypes with less than a hundredth of
      the operations count with the rate of the most frequent one.

  >>> share({'bfloat16': 300.0, 'float32': 1.0}, 2.0, lambda dtype: 301.0)
  0.5
  """
  total = sum(flops.values())
  if not total or seconds <= 0:
    return 0.0
  most = max(flops, key=lambda dtype: flops[dtype])
  ideal = sum(
    done / rate(dtype if done >= total / 100 else most)
    for dtype, done in flops.items()
  )
  return ideal / seconds


def memory() -> int | None:
  """Returns the bytes in use on the first device of this process.

  On a CPU that is the resident memory of the process; None where neither is
  known.
  """
  device = jax.local_devices()[0]
  statistics = device.memory_stats() or {}
  if 'bytes_in_use' in statistics:
    return int(statistics['bytes_in_use'])
  if device.platform != 'cpu':
    return None
  try:
    pages = pathlib.Path('/proc/self/statm').read_text().split()[1]
    return int(pages) * os.sysconf('SC_PAGE_SIZE')
  except (OSError, ValueError, IndexError):
    return None


def _read(file: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
