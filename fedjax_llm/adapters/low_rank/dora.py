"""Weight-decomposed adaptation: a low-rank direction and a magnitude.

`dora` returns an `Adapter` with `Dora` nodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fedjax_llm.adapters import low_rank
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.nodes import Dora, LowRank
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def dora(
  rank: int = 8,
  alpha: float = 16.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
  lora_dropout: float = 0.0,
) -> Adapter:
  """Returns DoRA: low-rank factors for the direction, a vector for the norm.

      V = W + s a b,   W' = m V / ||V||_c,   s = alpha / rank,   m = ||W||_c

  Liu et al. 2024, arXiv 2402.09353, equation 5. ||.||_c [F] is the norm over
  the inputs of each output feature, as in the authors' code and in PEFT, and no
  gradient flows through it (section 4.3). m is a trained leaf. Aggregators of
  LoRA apply to the factors of `direction`; one that is exact for LoRA is exact
  for V, not for W'. The adapted model starts as the base. Arguments and errors
  as in `lora`; a quantised base is refused, as it has no norms to start from.

  >>> import jax
  >>> base = {'layers': {'q_proj': {'kernel': jnp.full((2, 4, 3), 0.5)}}}
  >>> params = dora(rank=2, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].magnitude.tolist()  # [L, F]
  [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
  """
  fresh = low_rank.lora(rank, alpha, targets, lora_dropout=lora_dropout)

  def init(key: Key, base: Base) -> Params:
    return _directed(fresh.init(key, base), base)

  inner = Adapter(init, merge, fold, fresh.peft)
  return saved_beside(inner, modules_to_save)


def _directed(params: Any, base: Any) -> Any:
  if isinstance(params, Mapping):
    return {name: _directed(params[name], base[name]) for name in params}
  assert isinstance(params, LowRank)
  kernel = base['kernel']
  if hasattr(kernel, 'qvalue'):
    raise Error(
      'dora starts from the norms of the weights, which a quantised base does '
      'not have: leave model.quantisation out.'
    )
  square = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)
  return Dora(params, jnp.sqrt(square))
