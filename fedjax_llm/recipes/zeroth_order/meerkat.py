"""Meerkat: zeroth-order steps on a fixed thousandth of the parameters.

arXiv 2506.03337.

    m:       the u P entries of the largest mean squared gradient at the start
    client:  g_t = (L(w + eps z_t m) - L(w - eps z_t m)) / (2 eps),
             w <- w - eta g_t z_t m,   z_t the same for all clients of a round
    server:  rebuilds every client's path from (seed, g_t) and averages the ends

Defaults: u = 0.001, eps = 1e-3. The variant with early stopping of clients
(Meerkat-VP) is left out: its thresholds are not published.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.gradients import backprop
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.zeroth_order.decomfl import (
  along_shared,
  on_pieces,
  pieces,
)
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Params,
  Scope,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  'meerkat': dict(
    local=dict(name='sgd', learning_rate=2e-2),
    algorithm=dict(density=0.1),  # of an adapter, not of a whole model
  ),
}


def meerkat(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_steps: int = 1,
  density: float = 1e-3,
  eps: float = 1e-3,
  distribution: str = 'normal',
  log_rounds: int = 64,
  scores: Callable[[Params], Any] | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Meerkat: zeroth-order steps on a fixed share of the parameters.

  arXiv 2506.03337. A client sends a scalar a step and replays missed rounds as
  in `decomfl`; since directions are shared, the mean of the scalars is the mean
  of the clients' ends. The paper's server takes the squared gradients on a
  subset of C4: pass them as `scores`. Without them round 0 trains nothing:
  each of its clients sends the mean squared gradient of its batches, by
  backpropagation and as large as the parameters, and the server chooses the
  entries by their mean. With a density of one it is `decomfl` with central
  differences and one direction a step.

  Args:
    num_steps: S, local steps a round: `cohort.num_steps`.
    density: u, the share of the trained entries that ever move.
    eps: the distance of the two points.
    distribution, log_rounds: see `decomfl`.
    scores: `(trained leaves) -> scores` in their structure: the largest stay.

  Raises:
    Error: a density outside of (0, 1]; as `decomfl`; an aggregator in `parts`.

  >>> method = meerkat(None, local.optimizer('sgd', 1e-3), density=0.5,
  ...                  scores=lambda params: params)
  >>> state = method.init(jax.random.key(0), {'w': jnp.arange(4.0)})
  >>> state.params.mask['w'].tolist()
  [0, 0, 1, 1]
  """
  if not 0 < density <= 1:
    raise Error(f'meerkat: density={density} must be above 0 and at most 1.')
  refuse('meerkat', 'aggregator', parts)

  def chosen(score: Any) -> Any:
    size = sum(x.size for x in jax.tree.leaves(score))
    largest = tree.largest(score, max(round(density * size), 1))
    return jax.tree.map(lambda m: m.astype(jnp.uint8), largest)

  scope = parts.pop('scope', None) or scopes.everything()
  settings: dict[str, Any] = dict(
    num_steps=num_steps,
    perturbations=1,
    distribution=distribution,
    log_rounds=log_rounds,
    scope=scope,
  )
  common = ('meerkat', loss, optimizer, local.two_point(eps))
  if scores is not None:
    mask = lambda trained: chosen(scores(trained))
    return along_shared(*common, mask=mask, **settings, **parts)

  # The mask's leaves are numbers: first scores, then zeros and ones.
  empty = lambda trained: tree.zeros_like(trained, jnp.float32)
  made = pieces(*common, mask=empty, **settings)

  def after(state, base, data, key):
    first = state.round == 1
    state = made.after(state, base, data, key)
    best = jax.tree.map(
      lambda m: m.astype(jnp.float32), chosen(state.params.mask)
    )
    mask = jax.tree.map(
      lambda b, m: jnp.where(first, b, m), best, state.params.mask
    )
    return state._replace(params=state.params._replace(mask=mask))

  update = calibrated(made.update, loss, scope.labels)
  rule = aggregators.replaying(aggregators.uniform_mean(), log_rounds)
  whole = made._replace(update=update, after=after)
  return on_pieces(whole, rule, _first_scores(), **parts)


def calibrated(
  inner: LocalUpdate, loss: Loss, labels: Callable[[Params], Any]
) -> LocalUpdate:
  """Returns `inner` whose update also has the scores of round 0.

  The scores are the squared gradient of the token mean, averaged over the
  client's batches; in later rounds they are zero and not computed.

  >>> from fedjax_llm.nodes import Seeded
  >>> from fedjax_llm.types import ClientOutput, Context, LossSum
  >>> loss = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.ones(2))
  >>> start = Seeded({'w': jnp.float32(1)}, jnp.zeros((1, 1)))
  >>> def still(base, start, state, batches, masks, context):
  ...   return ClientOutput(Seeded({'w': None}, start.coefficients), masks)
  >>> update = calibrated(
  ...   LocalUpdate(None, still), loss, lambda p: {'w': Shared})
  >>> context = Context(round=jnp.int32(0), key=jax.random.key(0))
  >>> out = update.run(None, start, (), jnp.array([3.0, 1.0]), None, context)
  >>> float(out.update.mask['w'])  # (3^2 + 1^2) / 2
  5.0
  """

  def run(base, start, state, batches, masks, context):
    out = inner.run(base, start, state, batches, masks, context)
    trained = tree.select(start.params, labels(start.params), Shared)
    zeros = tree.zeros_like(trained, jnp.float32)

    def one(total, batch):
      grads, sums = backprop(
        loss, base, trained, start.params, batch, context.key
      )
      real = (sums.count > 0).astype(jnp.float32)
      squares = jax.tree.map(
        lambda t, g: t + real * g.astype(jnp.float32) ** 2, total[0], grads
      )
      return (squares, total[1] + real), None

    def squared():
      start_at = (zeros, jnp.float32(0))
      batch = jax.tree.map(jnp.asarray, batches)
      (total, count), _ = jax.lax.scan(one, start_at, batch)
      return tree.scale(total, 1 / jnp.maximum(count, 1.0))

    scores = jax.lax.cond(context.round == 0, squared, lambda: zeros)
    return out._replace(update=out.update._replace(mask=scores))

  return LocalUpdate(inner.init, run)


def _first_scores() -> Scope:
  """Returns a scope: round 0 sends the scores, all others the coefficients."""
  inner = scopes.frozen(r'^(params|log)(/|$)')

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    first = jnp.asarray(context.round == 0)
    trained = masks.trained._replace(
      coefficients=~first,
      mask=jax.tree.map(lambda _: first, masks.trained.mask),
    )
    return masks._replace(trained=trained)

  return inner._replace(mask=mask)
