"""FedLoRA: clients share full matrices and keep a low-rank change."""

from typing import Any

from fedjax_llm import local
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import dual
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_lora': {},
}


def fed_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedLoRA: clients share full matrices and keep a low-rank change.

      W_k = theta + s a_k b_k:   (i) a_k, b_k at fixed theta,
      (ii) theta at fixed a_k, b_k,    theta <- sum_k w_k theta_k

  "FedLoRA: When Personalized Federated Learning Meets Low-Rank Adaptation"
  (2023, OpenReview). theta starts at the base and moves on the adapter's
  targets alone; whole matrices travel and are trained by every client, so keep
  blocks of clients small.

  Args:
    private_steps: see `recipes.dual`; R_l of the paper, in steps.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_lora(None, local.optimizer('adamw'))
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init(jax.random.key(0), params).params.shared.shape  # theta
  (4, 3)
  """
  both = lambda p: multi.mix((p.personal, p.shared), (1.0, 1.0))
  step = local.sgd(local.viewed(loss, both), optimizer)
  update = local.phases(
    Phase(local.counted(step), dual.OWN),
    Phase(step, dual.COMMON),
    steps=dual.first_steps(private_steps),
  )
  return dual.compose(
    update,
    lambda p, seen: both(p),
    {**parts, 'fold': None},  # theta holds the residuals already
    lambda key, p: Dual(multi.dense_part(p), multi.without_residuals(p)),
  )
