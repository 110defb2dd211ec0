"""The node of FedTT: a change of a weight as a train of small cores."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank


class TensorTrain(NamedTuple):
  """Trained cores: W' = W + scale * (the product of the cores).

      dW[i1 ... id, j1 ... jd] = scale G1[i1] ... Gd[id] Gd+1[j1] ... G2d[jd]

  The first half of the cores spans the inputs, the second half the features.

  >>> cores = (jnp.ones((1, 3, 2)), jnp.ones((2, 4, 1)))
  >>> node = TensorTrain(cores, jnp.float32(1))
  >>> node.weight_shape(), float(node.factors().change()[0, 0])
  ((3, 4), 2.0)
  """

  cores: tuple[Any, ...]  # each [L, R, modes, R]; R = 1 at both ends
  scale: Any  # [L]

  FROZEN = ('scale',)

  def factors(self) -> LowRank:
    half = len(self.cores) // 2
    left, right = self.cores[:half], self.cores[half:]
    a, b = _chain(left), _chain(right)
    a = a.reshape(*a.shape[:-3], -1, a.shape[-1])
    b = b.reshape(*b.shape[:-3], b.shape[-3], -1)
    return LowRank(a, b, self.scale)

  def weight_shape(self) -> tuple[int, ...]:
    half = len(self.cores) // 2
    size = lambda cores: math.prod(jnp.shape(core)[-2] for core in cores)
    lead = jnp.shape(self.cores[0])[:-3]
    return (*lead, size(self.cores[:half]), size(self.cores[half:]))


def _chain(cores: Sequence[Any]) -> Any:
  """Multiplies a chain of cores out, [..., R, product of the modes, R']."""
  total = cores[0]
  for core in cores[1:]:
    total = jnp.einsum('...ris,...sjt->...rijt', total, core)
    total = total.reshape(*total.shape[:-3], -1, total.shape[-1])
  return total
