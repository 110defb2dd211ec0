"""The adapter of FLoRG: one trained factor between frozen frames.

`florg` returns an `Adapter` with `Gram` nodes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.nodes import Gram
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def florg(
  rank: int = 4,
  alpha: float = 8.0,
  sigma: float = 0.1,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns FLoRG's adapter: W + s p g' g q, with p and q orthonormal.

  arXiv 2602.17095: p [D, k] and q [k, F], k = min(D, F), are drawn from the
  seed, frozen, and the same for all clients, who train and send g [R, k] alone.
  s = alpha / rank. The gradient is zero at g = 0, so g starts normal with the
  standard deviation sigma / sqrt(k), which the paper leaves open: the adapted
  model starts near the base. p and q together take up to twice the memory of
  the square of W's smaller side, and are never sent.

  Raises:
    Error: as in `lora`; a sigma that is not positive.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((2, 6, 4))}}}
  >>> params = florg(rank=3, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].g.shape, params['layers']['q_proj'].p.shape
  ((2, 3, 4), (2, 6, 4))
  """
  if rank < 1:
    raise Error(f'adapter.rank is {rank}; it must be at least 1.')
  if not sigma > 0:
    raise Error(f'adapter.sigma is {sigma}; it must be above 0.')

  def node(key, kernel):
    *lead, d, f = kernel.shape
    k = min(d, f)
    if rank > k:
      raise Error(
        f'adapter.rank is {rank}, above the smaller side of a target, {k}.'
      )
    keys = jax.random.split(key, 3)

    def frame(key, size):
      return linalg.qr(jax.random.normal(key, (*lead, size, k)))[0]

    return Gram(
      g=sigma * k**-0.5 * jax.random.normal(keys[0], (*lead, rank, k)),
      p=frame(keys[1], d),
      q=jnp.swapaxes(frame(keys[2], f), -1, -2),
      scale=jnp.full(tuple(lead), alpha / rank, jnp.float32),
    )

  def init(key: Key, base: Base) -> Params:
    return targets_lib.grow(base, targets, key, node)

  return saved_beside(Adapter(init, merge, fold), modules_to_save)
