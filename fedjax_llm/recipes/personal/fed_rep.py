"""FedRep: clients train a private head first, then the shared body.

Collins et al. 2021, arXiv 2102.07089.
"""

from typing import Any

from fedjax_llm import local, scopes
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.recipes import dual
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import FederatedAlgorithm, Frozen, Loss, Private

# What the config of each method changes.
NEEDS = {
  'fed_rep': {},
}


def fed_rep(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private: str = '/b$',
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRep: clients train a private head first, then the shared body.

      h_k <- h_k - eta grad_h F_k(phi, h_k)   (many times),
      phi_k <- phi - eta grad_phi F_k(phi, h_k),   phi <- sum_k w_k phi_k

  Collins et al. 2021, arXiv 2102.07089, algorithm 1. On low-rank factors the
  head is b and the body a, the analogue of its linear representations x a b_k;
  FedSA-LoRA trains both at once. The paper's last layer is another pattern.

  Args:
    private: a pattern on the names of the leaves that clients keep; '' keeps
      none, which is FedAvg.
    private_steps: see `recipes.dual`; the paper gives the body one epoch.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_rep(None, local.optimizer('adamw'))
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> kept = method.init_client({'q': node}).private['q']
  >>> kept.a, kept.b.shape
  (None, (2, 3))
  """
  step = local.sgd(loss, optimizer)
  if not private:
    return compose(step, **parts)
  refuse('fed_rep', 'scope', parts)
  head = scopes.labelled({private: Private, '': Frozen})
  update = local.phases(
    Phase(step, head),
    Phase(step, scopes.frozen(private)),
    steps=dual.first_steps(private_steps),
  )
  return compose(update, scope=scopes.private(private), **parts)
