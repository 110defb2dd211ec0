"""Adapters with small trained matrices between frozen bases.

`lora_xs` and `ravan` return an `Adapter` with `Core` nodes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.low_rank.starts import singular
from fedjax_llm.nodes import Core as Core
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def lora_xs(
  rank: int = 8,
  alpha: float = 8.0,
  sigma: float = 1e-5,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns LoRA-XS: an R x R matrix between the base's singular directions.

      W = U S V':   W' = W + s p core q,   p = U_r S_r,   q = V_r',
      s = alpha / rank

  Balazy et al. 2024, arXiv 2405.17604. U_r, S_r, V_r are those of the R largest
  singular values. `core` starts normal with the standard deviation `sigma`,
  near zero. Only `core` is trained, and the change is linear in it: see
  `recipes.fed_sb`.

  Raises:
    Error: as in `lora`; a quantised base, which has no singular vectors.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.diag(jnp.arange(3.0))[None]}}}
  >>> params = lora_xs(rank=1, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].core.shape
  (1, 1, 1, 1)
  """

  def node(key, kernel):
    _check(rank, kernel)
    u, s, v = singular('lora_xs', kernel, rank)
    lead = kernel.shape[:-2]
    core = sigma * jax.random.normal(key, (*lead, 1, rank, rank))
    return Core(
      core=core,
      p=u * s[..., None, :],
      q=v,
      scale=jnp.full(lead, alpha / rank, jnp.float32),
    )

  return _adapter(rank, node, targets, modules_to_save)


def ravan(
  heads: int = 4,
  rank: int = 8,
  alpha: float = 8.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns RAVAN's heads: W + s sum_h p_h core_h q_h, p and q orthonormal.

  Raje et al. 2025, arXiv 2506.05568. All columns of p and all rows of q are
  drawn together and made orthonormal, so that heads do not overlap; cores start
  at zero. s = alpha / rank. H R^2 numbers a matrix are trained, and the change
  has rank up to H R. The gains of `recipes.ravan` exist in training only.

  Raises:
    Error: as in `lora`; no head; heads * rank above a target's smaller side.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((2, 6, 6))}}}
  >>> adapter = ravan(heads=3, rank=2, targets='q_proj')
  >>> node = adapter.init(jax.random.key(0), base)['layers']['q_proj']
  >>> node.core.shape, node.p.shape
  ((2, 3, 2, 2), (2, 6, 6))
  """
  if heads < 1:
    raise Error(f'adapter.heads is {heads}; it must be at least 1.')

  def node(key, kernel):
    _check(heads * rank, kernel, 'heads * rank')
    *lead, d, f = kernel.shape
    keys = jax.random.split(key)

    def orthonormal(key, size):
      drawn = jax.random.normal(key, (*lead, size, heads * rank))
      return linalg.qr(drawn)[0]

    return Core(
      core=jnp.zeros((*lead, heads, rank, rank), jnp.float32),
      p=orthonormal(keys[0], d),
      q=jnp.swapaxes(orthonormal(keys[1], f), -1, -2),
      scale=jnp.full(tuple(lead), alpha / rank, jnp.float32),
    )

  return _adapter(rank, node, targets, modules_to_save)


def with_gains(params: Params) -> Params:
  """Returns the tree with a gain of one for each head of every `Core`."""
  return jax.tree.map(
    lambda x: (
      x._replace(gain=jnp.ones(x.core.shape[:-2], x.core.dtype))
      if isinstance(x, Core)
      else x
    ),
    params,
    is_leaf=lambda x: isinstance(x, Core),
  )


def without_gains(params: Params) -> Params:
  """Multiplies the gains of every `Core` in: core_h <- gain_h core_h."""
  return jax.tree.map(
    lambda x: (
      x._replace(core=x.core * x.gain[..., None, None], gain=None)
      if isinstance(x, Core)
      else x
    ),
    params,
    is_leaf=lambda x: isinstance(x, Core),
  )


def _adapter(rank, node, targets, modules_to_save) -> Adapter:
  if rank < 1:
    raise Error(f'adapter.rank is {rank}; it must be at least 1.')

  def init(key: Key, base: Base) -> Params:
    return targets_lib.grow(base, targets, key, node)

  return saved_beside(Adapter(init, merge, fold), modules_to_save)


def _check(rank: int, kernel: Any, what: str = 'rank') -> None:
  side = min(kernel.shape[-2:])
  if rank > side:
    raise Error(
      f'adapter.{what} is {rank}, above the smaller side of a target, {side}.'
    )
