"""FLoRIST: the stack's singular directions of most of its energy.

arXiv 2506.09199 (2025).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import ranked, refuse
from fedjax_llm.types import Download, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  # Below the server's rank, which then keeps what their stack needs.
  'florist': dict(profiles=dict(name='ranks', choices=(1, 2))),
}


def florist(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  energy: float = 0.9,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLoRIST: the stack's singular directions of most of its energy.

      U S V' = sum_k w_k s a_k b_k:   s a = U_p S_p,   b = V_p',
      p = min{p: sum_{i<=p} S_i^2 >= energy sum_i S_i^2}

  arXiv 2506.09199 (2025), through the small SVD of `aggregators.florist`. p
  differs between matrices and rounds and is at most the rank of the adapter.
  All clients download the p columns of every matrix, and a client of rank r_k
  trains the first r_k: the others are cut off, as in the paper, and columns
  beyond p are zeros.

  >>> from fedjax_llm import local
  >>> florist(None, local.optimizer('adamw'), energy=0.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: florist: energy=0.0 must be above 0 and at most 1.
  """
  rule = aggregators.florist(energy=energy)
  refuse('florist', 'download', parts)
  parts = {**parts, 'download': occupied()}
  return ranked('florist', rule, loss, optimizer, parts)


def occupied() -> Download:
  """Returns a download of the columns of factors that are not zero.

  A column that is zero in both factors costs nothing.

  >>> node = LowRank(jnp.eye(3)[:, :2], jnp.zeros((2, 5)), None)
  >>> cut = node._replace(a=node.a.at[:, 1].set(0))
  >>> codec = occupied()
  >>> [int(x) for x in codec.num_bytes({'q': cut}, None)['q'][:2]]  # 1 of 2
  [12, 20]
  """
  is_node = lambda x: x is None or isinstance(x, LowRank)

  def num_bytes(message, masks):
    del masks

    def count(x):
      if not isinstance(x, LowRank):
        return jnp.int32(x.size * x.dtype.itemsize)
      some = jnp.any(x.a != 0, axis=-2) | jnp.any(x.b != 0, axis=-1)
      num = jnp.sum(some, dtype=jnp.int32)
      size = lambda factor, side: num * side * factor.dtype.itemsize
      return LowRank(size(x.a, x.a.shape[-2]), size(x.b, x.b.shape[-1]), None)

    return jax.tree.map(
      lambda x: None if x is None else count(x), message, is_leaf=is_node
    )

  return uploads.identity()._replace(num_bytes=num_bytes)
