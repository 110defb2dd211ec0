"""Personalised federated LoRA: a shared part and one that stays at home.

Most methods here carry `Dual(shared, personal)` parameters: the server
averages the first, every client keeps its own second (`clients/store.py`), and
`FederatedAlgorithm.personal` is the view of both that a client is served. A
client never trained on is served the shared part. Recipes turn the adapter
that they are given into both parts, so configs name `lora` as ever.

Where a phase trains nothing of the other part, `private_steps` says how many of
a client's S batches the private part takes, and the shared one takes the rest;
without it both walk over all S, which doubles a round's computation.
Examples that train nothing have no loss, `None`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_llm import aggregators, local
from fedjax_llm.adapters import multi
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.recipes import averaging, dual
from fedjax_llm.recipes.homogeneous import refuse
from fedjax_llm.types import (
  Dual,
  Error,
  FederatedAlgorithm,
  Frozen,
  Loss,
  Private,
  ServerOptimizer,
)


def fed_rep(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private: str = '/b$',
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRep: first the client's head at a fixed body, then the body, shared.

      h_k <- h_k - eta grad_h F_k(phi, h_k)   (many times),
      phi_k <- phi - eta grad_phi F_k(phi, h_k),   phi <- sum_k w_k phi_k

  Collins et al. 2021, arXiv 2102.07089, algorithm 1. On low-rank factors the
  head is b and the body a, the analogue of its linear representations x a b_k;
  FedSA-LoRA trains both at once. The paper's last layer is another pattern.

  Args:
    private: what clients keep, as a pattern on the names of leaves; with ''
      nothing, which is FedAvg.
    private_steps: see the module; the paper gives the body one epoch.

  >>> from fedjax_llm.types import LowRank
  >>> method = fed_rep(None, local.optimizer('adamw'))
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> kept = method.init_client({'q': node}).private['q']
  >>> kept.a, kept.b.shape
  (None, (2, 3))
  """
  step = local.sgd(loss, optimizer)
  if not private:
    return averaging.compose(step, **parts)
  refuse('fed_rep', 'scope', parts)
  head = scopes.labelled({private: Private, '': Frozen})
  update = local.phases(
    Phase(step, head),
    Phase(step, scopes.frozen(private)),
    steps=_first(private_steps),
  )
  return averaging.compose(update, scope=scopes.private(private), **parts)


def ditto(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float = 0.1,
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Ditto: federated averaging, and beside it a model of one's own, tethered.

      w <- sum_k w_k (local steps on F_k from w),
      v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w))

  with w as received (Li et al. 2021, arXiv 2012.04221, algorithm 1). The
  distance is that of the factors. lambda = 0 is local training; the larger it
  is, the closer v_k follows w, as long as eta lambda < 1.

  Args:
    strength: lambda, which the paper tunes.
    private_steps: see the module.

  >>> method = ditto(None, local.optimizer('adamw'), strength=0.1)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(2)}).params
  >>> method.init_client(start).private
  Dual(shared={'w': None}, personal={'w': Array([1., 1.], dtype=float32)})
  """
  own = local.tethered(loss, optimizer, strength=strength)
  common = local.sgd(local.viewed(loss, dual.shared), optimizer)
  update = local.phases(
    Phase(local.counted(own), dual.OWN),
    Phase(common, dual.COMMON),
    steps=_first(private_steps),
  )
  return dual.compose(
    update, dual.own_or_shared, parts, lambda key, p: Dual(p, p)
  )


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

  Yang et al. 2024, arXiv 2403.19211; (i) from the second round on. What is
  served weighs the local adapter with lambda; `evals.instance_weights` gives
  the paper's weight of each text at test time.

  Args:
    local_weight: lambda, 0.5 in the authors' code.
    private_steps: see the module.

  Raises:
    Error: a weight that is not between 0 and 1.

  >>> from fedjax_llm.types import LowRank
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
    steps=_first(private_steps),
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
    local_weight: of the local adapter in what is served.

  Raises:
    Error: a weight that is not between 0 and 1, federated_rounds below one.

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
  step = lambda view: local.sgd(local.viewed(loss, view), optimizer)
  update = local.phases(
    Phase(
      local.forked(step(dual.personal)),
      dual.OWN,
      lambda t: t >= federated_rounds,
    ),
    Phase(step(dual.shared), dual.COMMON, lambda t: t < federated_rounds),
  )
  return dual.compose(
    update, dual.weighed(local_weight), parts, lambda key, p: Dual(p, p)
  )


def fed_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private_steps: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedLoRA: full matrices are shared, and a low-rank change is one's own.

      W_k = theta + s a_k b_k:   (i) a_k, b_k at fixed theta,
      (ii) theta at fixed a_k, b_k,    theta <- sum_k w_k theta_k

  "FedLoRA: When Personalized Federated Learning Meets Low-Rank Adaptation"
  (2023, OpenReview). theta starts at the base and moves on the adapter's
  targets alone; whole matrices travel and are trained by every client, so keep
  blocks of clients small.

  Args:
    private_steps: see the module; R_l of the paper, in steps.

  >>> from fedjax_llm.types import LowRank
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
    steps=_first(private_steps),
  )
  return dual.compose(
    update,
    lambda p, seen: both(p),
    {**parts, 'fold': None},  # theta holds what was to be folded
    lambda key, p: Dual(multi.dense_part(p), multi.without_residuals(p)),
  )


def fd_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  sync_every: int = 10,
  server_learning_rate: float = 0.7,
  momentum: float = 0.9,
  fusion: tuple[float, float] = (0.5, 0.5),
  **parts: Any,
) -> FederatedAlgorithm:
  """FDLoRA: a global adapter by Nesterov momentum, a personal copy, fused.

      round 0:  theta_p,k = local steps,   theta_s = mean theta_p,k
      then:     delta = theta_s - mean_k theta_k,   theta_s <- Nesterov(delta),
                theta_p,k <- theta_k every H rounds
      served:   w_1 theta_p,k + w_2 theta_s

  Qi et al. 2024, arXiv 2406.07925. Clients count the same; K inner steps are
  the local steps of a round. A client first drawn later takes its theta_p
  there. The outer settings are those of DiLoCo (arXiv 2311.08105), which the
  paper builds on; `evals.fuse` finds (w_1, w_2) for a client.

  Args:
    sync_every: H.
    server_learning_rate, momentum: of the server.
    fusion: (w_1, w_2) of what is served, on the factors.

  >>> method = fd_lora(None, local.optimizer('adamw'), sync_every=5)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(2)}).params
  >>> method.init_client(start).private.personal['w'].shape  # theta_p,k
  (2,)
  """
  refuse('fd_lora', 'server', parts)
  step = local.sgd(local.viewed(loss, dual.shared), optimizer)
  update = local.synced(
    local.phases(Phase(step, dual.COMMON)), every=sync_every
  )
  outer = optax.sgd(server_learning_rate, momentum, nesterov=True)

  def serve(p, seen):
    fused = multi.blend((p.personal, p.shared), fusion)
    return dual.where(seen, fused, p.shared)

  return dual.compose(
    update,
    serve,
    {
      'aggregator': aggregators.uniform_mean(),
      **parts,
      'server': _first_as_it_is(outer),
    },
    lambda key, p: Dual(p, p),
  )


def _first(steps: int | None) -> tuple[int, ...] | None:
  return None if steps is None else (steps,)


def _check_weight(weight: float) -> None:
  if not 0 <= weight <= 1:
    raise Error(f'local_weight={weight} must be between 0 and 1.')


def _first_as_it_is(inner: ServerOptimizer) -> ServerOptimizer:
  """The first step is the mean of what clients found; then `inner`."""

  def init(params):
    return jnp.int32(0), inner.init(params)

  def update(updates, state, params=None):
    count, moments = state
    steps, new = inner.update(updates, moments, params)
    pick = lambda one, other: jax.tree.map(
      lambda x, y: jnp.where(count == 0, x, y), one, other
    )
    plain = jax.tree.map(jnp.negative, updates)
    return pick(plain, steps), (count + 1, pick(moments, new))

  return optax.GradientTransformation(init, update)
