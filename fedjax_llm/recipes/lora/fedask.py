"""FedASK without noise: the SVD of the mean product from a common sketch.

arXiv 2507.09990 (2025).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss, Upload

# What the config of each method changes.
NEEDS = {
  'fedask': {},
}


def fedask(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  sketch: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedASK without noise: the SVD of the mean product from a common sketch.

      first pass:   Y = sum_k w_k s b_k' (a_k' O),   Q = qr(Y) goes down,
      second pass:  P = sum_k w_k s a_k (b_k Q),     s a b = SVD_R(P Q')

  arXiv 2507.09990 (2025), with the settings of `aggregators.fedask`. The method
  is made for private training, where clients train b alone and add noise; here
  both factors are trained, as in its variant without noise. A client sends
  `sketch` columns of either side instead of its factors, and receives Q within
  the round: both are billed. The simulation computes the passes from the
  factors.

  >>> from fedjax_llm import local
  >>> fedask(None, local.optimizer('adamw'), sketch=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fedask: sketch=0 must be at least 1.
  """
  rule = aggregators.fedask(sketch=sketch)
  if sketch is not None:
    parts.setdefault('upload', sketched(sketch))
  return with_rule('fedask', rule, loss, optimizer, parts)


def sketched(size: int) -> Upload:
  """Returns an upload billed as `size` columns of both sides of each matrix.

  >>> node = LowRank(jnp.ones((3, 2)), jnp.ones((2, 5)), None)
  >>> [int(x) for x in sketched(4).num_bytes({'q': node}, None)['q'][:2]]
  [48, 80]
  """
  is_node = lambda x: x is None or isinstance(x, LowRank)
  plain = uploads.identity()

  def num_bytes(message, masks):
    del masks

    def count(x):
      if not isinstance(x, LowRank):
        return None if x is None else jnp.int32(x.size * x.dtype.itemsize)
      each = size * x.a.dtype.itemsize
      rows = x.a.size // x.a.shape[-1], x.b.size // x.b.shape[-2]
      return LowRank(jnp.int32(rows[0] * each), jnp.int32(rows[1] * each), None)

    return jax.tree.map(count, message, is_leaf=is_node)

  return plain._replace(num_bytes=num_bytes)
