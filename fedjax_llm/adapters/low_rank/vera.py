"""Trained vectors between frozen random matrices.

`vera` returns an `Adapter` with `Vera` nodes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.nodes import Vera as Vera
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def vera(
  rank: int = 256,
  d_initial: float = 0.1,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns VeRA: shared random matrices and two trained vectors.

      W' = W + p diag(d) q diag(b),   p [D, R], q [R, F] frozen

  Kopiczko et al. 2024, arXiv 2310.11454, section 3.1. p and q are uniform with
  variance 2 / D and 2 / R (Kaiming) from the run's seed, the same in every
  layer and for all weights with that side, so they are never sent. d starts at
  `d_initial` and b at zero: the adapted model starts as the base. R + F numbers
  a matrix are trained. The change is linear in each vector alone, so the mean
  of both vectors is not the mean of the changes, unless a scope freezes '/d$'.

  Args:
    rank: R; costs computation and memory, little communication.
    d_initial: the default is PEFT's; the paper tunes it.
    targets, modules_to_save: see `lora`.

  Raises:
    Error: a rank below one; no matching target.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((2, 6, 4))}}}
  >>> params = vera(rank=3, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].d.shape, params['layers']['q_proj'].b.shape
  ((2, 3), (2, 4))
  """
  if rank < 1:
    raise Error(f'adapter.rank is {rank}; it must be at least 1.')

  def init(key: Key, base: Base) -> Params:
    def draw(tag, lead, shape, inputs):
      bound = (6 / inputs) ** 0.5
      one = jax.random.fold_in(jax.random.fold_in(key, tag), max(shape))
      one = jax.random.fold_in(one, min(shape))
      x = jax.random.uniform(one, shape, jnp.float32, -bound, bound)
      return jnp.tile(x, (*lead, 1, 1))

    def node(_, kernel):
      *lead, d, f = kernel.shape
      return Vera(
        d=jnp.full((*lead, rank), d_initial, jnp.float32),
        b=jnp.zeros((*lead, f), jnp.float32),
        p=draw(0, lead, (d, rank), d),
        q=draw(1, lead, (rank, f), rank),
      )

    return targets_lib.grow(base, targets, key, node)

  return saved_beside(Adapter(init, merge, fold), modules_to_save)
