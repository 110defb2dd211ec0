"""FedHM: factorised weights of each client's rank, averaged as weights.

Yao et al. 2021, arXiv 2111.14655.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import (
  compose,
  refuse,
)
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  # The smaller side of the weights as the rank, so that means are exact.
  'fed_hm': dict(
    adapter=dict(name='factorised', rank=32),
    profiles=dict(name='ranks', choices=(16, 32)),
  ),
}


def fed_hm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  decay: float = 1e-4,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedHM: factorised weights of each client's rank, averaged as weights.

      client:  W_k = a_k b_k of rank r_k; loss + decay / 2 sum ||a_k b_k||_F^2,
      server:  W <- sum_k w_k a_k b_k,   a, b <- its SVD, truncated on the way

  Yao et al. 2021, arXiv 2111.14655: the rule of FlexLoRA on the adapter
  `factorised`. The adapter's rank is the server's and must be the smaller side
  of the weights for an exact mean. The decay is that of the product; tune it.

  >>> fed_hm(None, local.optimizer('adamw'), decay=-1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: frobenius_decay: strength=-1.0 must not be negative.
  """
  refuse('fed_hm', 'aggregator', parts)
  update = local.sgd(frobenius_decay(loss, decay), optimizer)
  return compose(
    update,
    aggregator=aggregators.flexlora(),
    **{'scope': scopes.ranks(), **parts},
  )


def frobenius_decay(loss: Loss, strength: float) -> Loss:
  """Returns the token mean of the loss plus strength / 2 sum ||s a b||_F^2.

  It is the decay of a product instead of its factors (Khodak et al. 2021, arXiv
  2105.01029), through Gram matrices: ||a b||_F^2 = tr((a' a)(b b')). The sum is
  over all `LowRank` nodes and layers.

  Raises:
    Error: a negative strength.

  >>> from fedjax_llm.types import LossSum
  >>> flat = lambda base, params, batch, key: LossSum(0.0, 1.0, 0.0)
  >>> node = LowRank(jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0), 1.0)
  >>> float(frobenius_decay(flat, 0.5)(None, {'q': node}, None, None).total)
  9.0
  """
  if strength < 0:
    raise Error(f'frobenius_decay: strength={strength} must not be negative.')

  def size(node: LowRank) -> jax.Array:
    across = jnp.swapaxes(node.a, -1, -2) @ node.a
    along = node.b @ jnp.swapaxes(node.b, -1, -2)
    return jnp.sum(jnp.square(node.scale) * jnp.sum(across * along, (-1, -2)))

  def penalised(base, params, batch, key):
    sums = loss(base, params, batch, key)
    is_node = lambda x: isinstance(x, LowRank)
    nodes = filter(is_node, jax.tree.leaves(params, is_leaf=is_node))
    decay = 0.5 * strength * sum(map(size, nodes))
    return sums._replace(total=sums.total + sums.count * decay)

  return loss if strength == 0 else penalised
