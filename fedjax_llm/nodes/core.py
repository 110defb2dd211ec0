"""The node of LoRA-XS and RAVAN: small matrices between frozen bases."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm.nodes.low_rank import LowRank


class Core(NamedTuple):
  """Trained R x R matrices: W' = W + scale * sum_h gain_h p_h core_h q_h.

  Over H heads of rank R. `gain` (None: ones) is for training: see
  `recipes.ravan`.

  >>> eye = jnp.eye(2)
  >>> node = Core(3 * eye[None], p=eye, q=eye, scale=jnp.float32(2))
  >>> node.factors().change().tolist()
  [[6.0, 0.0], [0.0, 6.0]]
  """

  core: Any  # [L, H, R, R]
  p: Any  # [L, D, H R]
  q: Any  # [L, H R, F]
  scale: Any  # [L]
  gain: Any = None  # [L, H]

  FROZEN = ('p', 'q', 'scale')

  def factors(self) -> LowRank:
    *lead, num, rank, _ = self.core.shape
    core = self.core
    if self.gain is not None:
      core = core * self.gain[..., None, None]
    heads = self.q.reshape(*lead, num, rank, -1)
    b = jnp.matmul(core, heads).reshape(self.q.shape)
    return LowRank(self.p, b, self.scale)

  def weight_shape(self) -> tuple[int, ...]:
    return (*jnp.shape(self.p)[:-1], jnp.shape(self.q)[-1])
