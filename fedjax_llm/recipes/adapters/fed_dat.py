"""FedDAT: a shared adapter and a teacher of two adapters teach each other.

Chen et al. 2024, arXiv 2308.12305.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local
from fedjax_llm.adapters import mixing
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.local import LocalOptimizer, distillation
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import dual
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  LossSum,
  Model,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_dat': {},
}


def fed_dat(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  gate: float = 0.5,
  temperature: float = 3.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedDAT: a shared adapter and a teacher of two adapters teach each other.

      z_s of the shared adapter s,
      z_T of gate * c_k + (1 - gate) * s_0, with s_0 = s as it was received,
      s:    1/2 CE(z_s) + 1/2 t^2 KL(p_T || p_s)   (z_T fixed),
      c_k:  1/2 CE(z_T) + 1/2 t^2 KL(p_s || p_T)   (z_s fixed),
      s <- sum_k w_k s_k,   c_k of client k goes on where it stopped

  Chen et al. 2024, arXiv 2308.12305, with the gate and the temperature of the
  authors' code; p are softmax(z / t). Both objectives are computed from the
  same adapters, so their order does not matter, and the optimizer sees them as
  one. The paper's models see pictures and texts; nothing in these equations
  does, and here they are those of the task: tokens or classes of texts. A
  client is served the teacher with its last s. Unlike the loss of the task, it
  keeps all logits of a step in memory.

  Args:
    model: the network; `loss` is not used.
    gate: the part of c_k in the teacher.
    temperature: t of the divergences.

  Raises:
    Error: a gate that is not between 0 and 1, a temperature that is not above
      0.

  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_dat(None, local.optimizer('adamw'), model=None)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> start = method.init(jax.random.key(0), params).params
  >>> method.personal(start, method.init_client(start)).a.shape  # side by side
  (4, 4)
  """
  del loss
  if not 0 <= gate <= 1:
    raise Error(f'algorithm.gate is {gate}; it must be between 0 and 1.')
  if known(temperature) and temperature <= 0:
    raise Error(f'algorithm.temperature is {temperature}; it must be above 0.')

  def both(received: Any) -> Loss:
    def total(base, params, batch, key) -> LossSum:
      del key
      see = lambda part: distillation.predictions(model, base, part, batch)
      student = see(params.shared)
      teacher = see(mixing.mix((params.personal, received), (gate, 1 - gate)))
      stop, mask = jax.lax.stop_gradient, student.mask
      apart = lambda fixed, moving: distillation.divergence(
        stop(fixed.logits), moving.logits, mask, temperature
      )
      nats, hits = distillation.cross_entropy(student)
      own, _ = distillation.cross_entropy(teacher)
      each = nats + apart(teacher, student) + own + apart(student, teacher)
      count = jnp.sum(mask.astype(jnp.float32))
      return LossSum(0.5 * jnp.sum(each), count, jnp.sum(hits))

    return total

  def run(base, start, state, batches, masks, context):
    step = local.sgd(both(start.shared), optimizer)
    return step.run(base, start, state, batches, masks, context)

  update = LocalUpdate(local.sgd(both(None), optimizer).init, run)

  def serve(params: Dual, seen: Any):
    share = jnp.where(seen, gate, 0.0)
    own = multi.without_residuals(params.personal)
    return mixing.mix((own, params.shared), (share, 1 - share))

  return dual.compose(
    local.counted(update),
    serve,
    parts,
    lambda key, p: Dual(p, multi.fresh(key, p)),
  )
