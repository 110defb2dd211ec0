"""FDLoRA: a global adapter by Nesterov momentum, fused with a personal copy.

Qi et al. 2024, arXiv 2406.07925.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_llm import aggregators, local, tree
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.local.phases import Counted
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import dual
from fedjax_llm.recipes.composing import (
  refuse,
)
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  ServerOptimizer,
)

# What the config of each method changes.
NEEDS = {
  'fd_lora': dict(algorithm=dict(sync_every=4)),
}


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
  """FDLoRA: a global adapter by Nesterov momentum, fused with a personal copy.

      round 0:  theta_p,k = local steps,   theta_s = mean theta_p,k
      then:     delta = theta_s - mean_k theta_k,   theta_s <- Nesterov(delta),
                theta_p,k <- theta_k every H rounds
      served:   w_1 theta_p,k + w_2 theta_s

  Qi et al. 2024, arXiv 2406.07925. Clients count the same; the paper's K inner
  steps are the local steps of a round. A client first drawn after round 0 sets
  its theta_p in its first round. The outer settings are those of DiLoCo (arXiv
  2311.08105), which the paper builds on; `evals.fuse` searches (w_1, w_2) for a
  client.

  Args:
    sync_every: H.
    server_learning_rate, momentum: of the server.
    fusion: (w_1, w_2) of the model served, on the factors.

  >>> method = fd_lora(None, local.optimizer('adamw'), sync_every=5)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(2)}).params
  >>> method.init_client(start).private.personal['w'].shape  # theta_p,k
  (2,)
  """
  refuse('fd_lora', 'server', parts)
  step = local.sgd(local.viewed(loss, dual.shared), optimizer)
  update = synced(local.phases(Phase(step, dual.COMMON)), every=sync_every)
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


def _first_as_it_is(inner: ServerOptimizer) -> ServerOptimizer:
  """Returns `inner`, with the plain mean of the clients as its first step."""

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


def synced(inner: LocalUpdate, *, every: int) -> LocalUpdate:
  """Returns `inner`; in some rounds the shared part overwrites the personal.

  The trained shared part is copied in rounds 0, `every`, 2 `every`, ... and in
  a client's first. The state counts the client's rounds.

  Raises:
    Error: `every` below one.

  >>> from fedjax_llm.types import ClientOutput, Context
  >>> still = LocalUpdate(lambda p: (), lambda base, start, *rest: ClientOutput(
  ...   Dual(jnp.float32(2), jnp.float32(0)), None))
  >>> start = Dual(shared=jnp.float32(5), personal=jnp.float32(1))
  >>> update = synced(still, every=10)
  >>> out = update.run(None, start, update.init(start), None, None, Context())
  >>> float(start.personal + out.update.personal)  # 5 + 2
  7.0
  """
  if every < 1:
    raise Error(f'synced: every={every} must be at least 1.')

  def init(trainable):
    return Counted(jnp.int32(0), inner.init(trainable))

  def run(base, start, state, batches, masks, context):
    out = inner.run(base, start, state.inner, batches, masks, context)
    now = (context.round % every == 0) | (state.rounds == 0)
    copied = tree.map_present(
      lambda u, w, v, old: jnp.where(now, w + u - v, old),
      out.update.shared,
      start.shared,
      start.personal,
      out.update.personal,
    )
    return out._replace(
      update=out.update._replace(personal=copied),
      state=Counted(state.rounds + 1, out.state),
    )

  return LocalUpdate(init, run)
