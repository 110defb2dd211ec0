"""Changes of a weight in tensor-train form, a chain of small cores.

`tensor_train` returns an `Adapter` with `TensorTrain` nodes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.nodes import TensorTrain as TensorTrain
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def tensor_train(
  rank: int = 5,
  order: int = 3,
  alpha: float = 5.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns an adapter with changes of weights in tensor-train form.

      dW[i1 ... id, j1 ... jd] = s G1[i1] ... Gd[id] Gd+1[j1] ... G2d[jd],
      D = n1 ... nd,   F = m1 ... md,   s = alpha / rank

  where G[i] are rank x rank matrices (a row and a column at the ends): the
  factors of FedTT (Ghiasvand et al. 2025, arXiv 2410.13097, section 3) and of
  its tensorised adapters. The paper puts bottlenecks of such matrices behind
  attention and perceptron; here they change a weight, as LoRA does, so that the
  change can be merged. It is a change of rank `rank` with structured factors.
  The last core starts at zero: the adapted model starts as the base.

  Args:
    rank: of all inner bonds of the train; 5 in the paper.
    order: d, the number of modes of each side, as equal as possible.
    alpha: numerator of the scale.
    targets, modules_to_save: see `lora`.

  Raises:
    Error: a rank or an order below one; no matching target.

  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((1, 12, 8))}}}
  >>> adapter = tensor_train(rank=2, order=2, targets='q_proj')
  >>> node = adapter.init(jax.random.key(0), base)['layers']['q_proj']
  >>> [core.shape for core in node.cores]
  [(1, 1, 4, 2), (1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 2, 1)]
  """
  if rank < 1 or order < 1:
    raise Error(
      f'adapter.rank is {rank} and adapter.order {order}; both must be at '
      'least 1.'
    )

  def node(key, kernel):
    *lead, d, f = kernel.shape
    modes = [*split(d, order), *split(f, order)]
    ranks = [1, *[rank] * (2 * order - 1), 1]
    keys = jax.random.split(key, len(modes))
    cores = []
    for i, size in enumerate(modes):
      # The left half's product has the variance of LoRA's a, 1 / (3 D).
      variance = 1 / (size if i < order else 1) / (3 if i == 0 else ranks[i])
      shape = (*lead, ranks[i], size, ranks[i + 1])
      core = variance**0.5 * jax.random.normal(keys[i], shape)
      cores.append(core if i < len(modes) - 1 else jnp.zeros_like(core))
    return TensorTrain(
      tuple(cores), jnp.full(tuple(lead), alpha / rank, jnp.float32)
    )

  def init(key: Key, base: Base) -> Params:
    return targets_lib.grow(base, targets, key, node)

  return saved_beside(Adapter(init, merge, fold), modules_to_save)


def split(size: int, order: int) -> list[int]:
  """Factors `size` into `order` whole numbers that are nearly equal.

  >>> split(768, 3), split(7, 2)
  ([12, 8, 8], [7, 1])
  """
  parts = []
  for left in range(order, 0, -1):
    goal = size ** (1 / left) - 1e-9
    part = (
      next(n for n in range(math.ceil(goal), size + 1) if size % n == 0)
      if size > 1
      else 1
    )
    parts.append(part)
    size //= part
  return sorted(parts, reverse=True)
