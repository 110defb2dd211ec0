"""Terms that a loss gets beside what the data say."""

import jax
import jax.numpy as jnp

from fedjax_llm.types import Error, Loss, LowRank


def frobenius_decay(loss: Loss, strength: float) -> Loss:
  """The token mean of the loss, plus strength / 2 sum ||s a b||_F^2.

  The decay of a product instead of its factors (Khodak et al. 2021, arXiv
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
