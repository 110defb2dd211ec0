"""Measures matrix products of this machine and counts those of a round."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import regimes

from fedjax_llm.run import costs

# (m, k) x (k, n): square ones, and a block's rows into an MLP as regimes have.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 256, 688))


def products() -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
  """Returns float32 products through XLA, and the operations of each call."""
  calls: dict[str, Callable[[], Any]] = {}
  done: dict[str, float] = {}
  rng = np.random.default_rng(0)
  for m, k, n in PRODUCTS:
    times = max(1, 2**30 // (m * k * n))  # a call is never very short
    x = jnp.asarray(rng.standard_normal((times, m, k), np.float32))
    y = jnp.asarray(rng.standard_normal((k, n), np.float32))
    one = jax.jit(lambda x, y: jax.lax.map(lambda x: x @ y, x))
    name = f'gemm {m} x {k} x {n}'
    calls[name] = lambda one=one, x=x, y=y: one(x, y)
    done[name] = 2.0 * times * m * k * n
  return calls, done


def rate(taken: dict[str, float], done: dict[str, float]) -> float:
  """Returns the operations per second of the fastest product."""
  return max(done[name] / taken[name] for name in done)


def counted(regime: regimes.Regime, config: Any, needed: int) -> float:
  """Counts the operations that a round needs at least.

      tokens (4 N_matmul + 6 T H Dh L) + 4 D V targets

  N_matmul are the entries of all kernels of the layers: a product forwards and
  one for the gradient of activations. Attention is causal, two products
  forwards and four backwards over half of T x T places, of H heads of Dh.
  Logits are counted for learned tokens, `needed` in each client's batch.
  Factors of the adapter, recomputation, and unneeded gradients of the first
  layer are left out.
  """
  c, t = config, regime.length
  heads = c.num_heads * c.head_dim
  kernels = c.hidden_size * (2 * heads + 2 * c.num_kv_heads * c.head_dim)
  kernels += 3 * c.hidden_size * c.intermediate_size
  token = c.num_layers * (4 * kernels + 6 * t * heads)
  batches = regime.clients * regime.steps
  logits = 4 * c.hidden_size * c.vocab_size * needed
  return float(batches * (regime.batch * t * token + logits))


def executed(program: Any, steps: int) -> float:
  """Counts the operations of all matrix products in the traced round."""
  return math.fsum(costs.of(program, trips=steps).flops.values())
