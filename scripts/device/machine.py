"""Versions, memory, and the rates of products and copies of this device."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from typing import Any

from stages import Points, attempt

PACKAGES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'torch'),
  *('transformers', 'peft', 'accelerate', 'triton', 'qwix', 'ml-collections'),
  *('datasets', 'tensorboardX', 'jax-cuda13-plugin', 'nvidia-cudnn-cu13'),
)


def points(dry: bool, have: frozenset[str]) -> Points:
  yield from attempt('versions', have, versions)
  yield from attempt('devices', have, devices)
  yield from attempt('rates', have, lambda: rates(dry))
  yield from attempt('torch', have, lambda: in_torch(dry))


def versions() -> dict[str, Any]:
  """Returns versions of packages; None for one that is not installed."""

  def version(name: str) -> str | None:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {
    'python': platform.python_version(),
    'cores': os.cpu_count(),
    **{name: version(name) for name in PACKAGES},
  }


def devices() -> dict[str, Any]:
  """Returns the devices of JAX with their memory, and the driver."""
  import jax

  first = jax.devices()[0]
  result: dict[str, Any] = {
    'backend': jax.default_backend(),
    'kind': first.device_kind,
    'number': jax.device_count(),
    'memory': (first.memory_stats() or {}).get('bytes_limit'),
  }
  try:
    query = '--query-gpu=name,driver_version,memory.total'
    done = subprocess.run(
      ['nvidia-smi', query, '--format=csv,noheader'],
      capture_output=True,
      text=True,
      timeout=20,
    )
    result['driver'] = done.stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    result['driver'] = None
  return result


def rates(dry: bool) -> dict[str, Any]:
  """Returns operations per second by dtype, and bytes per second of a copy."""
  import jax
  import jax.numpy as jnp

  from fedjax_llm.run import peaks

  side = 64 if dry else None
  result: dict[str, Any] = {
    dtype: peaks.measure(dtype, side=side) for dtype in ('bfloat16', 'float32')
  }
  with jax.default_matmul_precision('highest'):
    result['float32, highest'] = peaks.measure('float32', side=side)
  x = jnp.ones(1 << (16 if dry else 30), jnp.int8)  # 1 GiB
  copy = jax.jit(lambda x: x + 1)
  jax.block_until_ready(copy(x))
  taken = []
  for _ in range(5):
    began = time.perf_counter()
    jax.block_until_ready(copy(x))
    taken.append(time.perf_counter() - began)
  result['copy_bytes'] = 2 * x.nbytes / statistics.median(taken)
  return result


def in_torch(dry: bool) -> dict[str, Any]:
  """Returns the rate of torch's bf16 products on the same device."""
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  side = 64 if dry else 8192 if device == 'cuda' else 1024
  x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
  y = torch.randn(side, side, device=device, dtype=torch.bfloat16)
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  x @ y
  wait()
  taken = []
  for _ in range(5):
    began = time.perf_counter()
    x @ y
    wait()
    taken.append(time.perf_counter() - began)
  return {'device': device, 'bfloat16': 2.0 * side**3 / min(taken)}
