"""An adapter of random directions of whole weights: zeroth-order methods."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import changes
from fedjax_llm.adapters.targets import grow
from fedjax_llm.nodes import Swayed
from fedjax_llm.types import Adapter


def swayed(targets: str | Sequence[str] = 'all-linear') -> Adapter:
  """Returns an adapter with a `Swayed` node at every target.

  The targets are changed as a whole by a method that writes directions into
  the nodes (`recipes.fed_kseed_base`); no parameter of it is trained.
  Embeddings and norms are no targets.

  Args:
    targets: see `adapters.lora`.

  >>> base = {'q': {'kernel': jnp.ones((2, 4, 3))}}
  >>> swayed('q').init(None, base)['q'].sizes.shape
  (2, 1)
  """

  def node(key, kernel):
    del key
    num = kernel.shape[0]
    return Swayed(
      keys=jnp.zeros((num, 1, 2), jnp.uint32),
      sizes=jnp.zeros((num, 1), jnp.float32),
      count=jnp.ones(num, jnp.int32),
    )

  def init(key, base):
    return grow(base, targets, jax.random.key(0), node)

  return Adapter(init, changes.merge, changes.fold)
