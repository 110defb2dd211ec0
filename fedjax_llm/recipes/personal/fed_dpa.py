"""FedDPA-T and FedDPA-F: a local adapter beside the global one.

Yang et al. 2024, arXiv 2403.19211.
"""

from typing import Any

from fedjax_llm import local, server
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import composing, dual
from fedjax_llm.types import Error, FederatedAlgorithm, Loss, Scope

# What the config of each method changes.
NEEDS = {
  'fed_dpa_t': {},
  # Both stages within the few rounds of a small run.
  'fed_dpa_f': dict(algorithm=dict(federated_rounds=4)),
}


def fed_dpa_t(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  local_weight: float = 0.5,
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedDPA-T: a local adapter learned in every round beside the global one.

      (i)  local_k on  W x + lambda local_k x + (1 - lambda) global x,
      (ii) global  on  W x + global x,        global <- sum_k w_k global_k

  Yang et al. 2024, arXiv 2403.19211; (i) from the second round on. The model
  served weighs the local adapter with lambda; `evals.instance_weights` returns
  the paper's weight of each text at test time.

  Args:
    local_weight: lambda, 0.5 in the authors' code.
    private_steps: see `recipes.dual`.

  Raises:
    Error: a weight that is not between 0 and 1.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = fed_dpa_t(None, local.optimizer('adamw'), local_weight=0.5)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> start = method.init(jax.random.key(0), params).params
  >>> method.personal(start, method.init_client(start)).a.shape  # side by side
  (4, 4)
  """
  _check_weight(local_weight)
  weights = (local_weight, 1 - local_weight)
  both = lambda p: multi.mix((p.personal, p.shared), weights)
  own = local.sgd(local.viewed(loss, both), optimizer)
  common = local.sgd(local.viewed(loss, dual.shared), optimizer)
  update = local.phases(
    Phase(local.counted(own), dual.OWN, lambda round: round > 0),
    Phase(common, dual.COMMON),
    steps=dual.first_steps(private_steps),
  )
  return dual.compose(
    update,
    dual.weighed(local_weight),
    parts,
    lambda key, p: Dual(p, multi.fresh(key, p)),
  )


def fed_dpa_f(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  federated_rounds: int = 20,
  local_weight: float = 0.5,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedDPA-F: federated averaging first, then a local copy, fine-tuned.

      rounds t < T:   global <- sum_k w_k global_k
      rounds t >= T:  local_k, a copy of global at first, on W x + local_k x

  Yang et al. 2024, arXiv 2403.19211. Served as in `fed_dpa_t`. Nothing is sent
  up from round T on.

  Args:
    federated_rounds: T, of all the rounds of the run.
    local_weight: of the local adapter in the model served.

  Raises:
    Error: a weight that is not between 0 and 1, federated_rounds below one.

  >>> import jax
  >>> from jax import numpy as jnp
  >>> method = fed_dpa_f(None, local.optimizer('adamw'), federated_rounds=5)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(2)}).params
  >>> method.init_client(start).private.personal['w'].shape  # from round 5 on
  (2,)
  """
  _check_weight(local_weight)
  if federated_rounds < 1:
    raise Error(
      f'fed_dpa_f: federated_rounds={federated_rounds} must be at least 1.'
    )

  def build(scope: Scope, **more: Any) -> FederatedAlgorithm:
    def stage(part, view, leaves):
      step = local.sgd(local.viewed(loss, view), optimizer)
      return composing.compose(
        local.phases(Phase(step, leaves)), scope=dual.only(part, scope), **more
      )

    return server.stages(
      (stage('shared', dual.shared, dual.COMMON), federated_rounds),
      (stage('personal', dual.personal, dual.OWN), None),
      between=[_copied],
    )

  return dual.on_both(
    build,
    dual.weighed(local_weight),
    parts,
    lambda key, p: Dual(p, p),
    lambda state: state.local.took[1],
  )


def _copied(both: Dual) -> Dual:
  """Returns both parts, the personal one with the factors of the shared."""
  own = multi.with_residuals(both.shared, both.personal)
  return both._replace(personal=own)


def _check_weight(weight: float) -> None:
  if not 0 <= weight <= 1:
    raise Error(f'local_weight={weight} must be between 0 and 1.')
