"""FedPepTAO: prompts of some layers are shared; the server has momentum.

Che et al. 2023, arXiv 2310.15080.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, server, tree
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Private,
  Scope,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  'fed_pep_tao': dict(
    adapter=dict(name='prefix'), algorithm=dict(shared_layers=(-1,))
  ),
}


class Momentum(NamedTuple):
  """The rule's state; trees have the structure of the shared prompts."""

  velocity: Any
  before: Any  # the mean change of the round before, old - new
  control: Any  # c
  controls: Any  # c_k, [N, ...]
  rate: Any  # []
  rounds: Any  # [] int32


def fed_pep_tao(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  shared_layers: Sequence[int] | None = None,
  momentum: float = 0.9,
  server_rate: float = 0.05,
  keep_optimizer: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedPepTAO: prompts of some layers are shared; the server has momentum.

      Delta_t = w_t - sum_k p_k w_k,
      c_k <- c_k - c + (w_t - w_k) / (tau_k eta),
      c <- c + (K / N) sum_k tau_k (change of c_k) / sum_k tau_k,
      v <- beta v + (1 - beta) (Delta_{t-1} - Delta_t) + c - sum_k p_k c_k,
      w_{t+1} = sum_k p_k w_k - eta_s v        (in round 1: without v)

  Che et al. 2023, arXiv 2310.15080, in the order of the authors' code, where
  eta_s is `server_rate` * 0.99^t, at least 1e-4, eta the local learning rate
  and tau_k the client's steps. Prompts of the other layers are the client's
  own. The clients train without a correction and keep their optimizer's
  moments. The paper chooses the layers by a score of their features and their
  number by the spectrum of a Hessian; here they are a setting. The control
  variates are the server's: a client sends its prompts and its number of steps.

  Args:
    num_clients: N.
    shared_layers: numbers of layers, negative ones from the end; all if None.
    momentum: beta.
    server_rate: the first eta_s.
    keep_optimizer: whether clients keep their moments.

  Raises:
    Error: an aggregator, a scope or a server in `parts`; from `init`, an
      adapter without layers, or a layer that it does not have.

  >>> from fedjax_llm.nodes import Prefix
  >>> method = fed_pep_tao(
  ...   None, local.optimizer('sgd'), num_clients=2, shared_layers=(-1,))
  >>> params = {'layers': {'self_attn': {'prefix': Prefix(
  ...   jnp.ones((3, 2, 4)), jnp.ones((3, 2, 4)))}}}
  >>> state = method.init(jax.random.key(0), params)
  >>> [jax.tree.leaves(x)[0].shape for x in state.aggregator[2:4]]
  [(3, 2, 4), (2, 3, 2, 4)]
  """
  for section in ('aggregator', 'scope', 'server'):
    refuse('fed_pep_tao', section, parts)
  chosen = functools.partial(_chosen, shared_layers)

  def wrap(key, params: Params) -> Params:
    del key
    chosen(params)
    own = jax.tree.map(jnp.copy, params)
    return {'prompts': Dual(params, own), 'steps': jnp.float32(0)}

  def view(wrapped: Params) -> Params:
    both = wrapped['prompts']
    return _by_layer(chosen(both.shared), both.shared, both.personal)

  step = local.sgd(
    local.viewed(loss, view), optimizer, keep_optimizer=keep_optimizer
  )
  return server.on_part(
    functools.partial(
      compose,
      _with_steps(step),
      scope=_scope(chosen),
      aggregator=_rule(optimizer, num_clients, momentum, server_rate),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=view,
    put=lambda wrapped, part: {**wrapped, 'prompts': Dual(part, part)},
    serve=lambda wrapped, state: view(wrapped),
  )


def _chosen(which: Sequence[int] | None, params: Params) -> jax.Array:
  """Returns booleans [L], True for the shared layers."""
  below = params.get('layers') if isinstance(params, dict) else None
  stacked = jax.tree.leaves(below)
  if not stacked:
    raise Error('fed_pep_tao needs prompts in the layers: adapter.name=prefix.')
  number = stacked[0].shape[0]
  which = range(number) if which is None else which
  for layer in which:
    if not -number <= layer < number:
      raise Error(
        f'algorithm.shared_layers names the layer {layer}; the adapter has the '
        f'layers 0 to {number - 1}.'
      )
  layers = jnp.asarray([layer % number for layer in which], jnp.int32)
  return jnp.zeros(number, bool).at[layers].set(True)


def _by_layer(chosen: jax.Array, one: Params, other: Params) -> Params:
  """Returns the chosen layers of one tree, the rest of them of the other."""
  pick = lambda x, y: jnp.where(_on(chosen, x), x, y)
  return {**one, 'layers': jax.tree.map(pick, one['layers'], other['layers'])}


def _on(chosen: jax.Array, x: jax.Array) -> jax.Array:
  return chosen.reshape(-1, *[1] * (x.ndim - 1))


def _scope(chosen) -> Scope:
  """Returns the scope: shared layers travel, the others are the client's."""
  inner = scopes.everything()

  def labels(params):
    whole = inner.labels(params)
    own = jax.tree.map(
      lambda x: Private if x is Shared else x, whole['prompts'].personal
    )
    return {**whole, 'prompts': whole['prompts']._replace(personal=own)}

  def mask(start, state, context):
    full = tree.full_masks(start, labels(start))
    both = start['prompts']
    layers = chosen(both.shared)

    def narrow(part, masks, wanted, rest):
      some = jax.tree.map(
        lambda x, m: None if m is None else m & _on(wanted, x),
        part['layers'],
        masks['layers'],
      )
      off = jax.tree.map(lambda m: m & rest, masks)
      return {**off, 'layers': some}

    def each(masks, steps):
      own = masks['prompts']
      return {
        'prompts': Dual(
          narrow(both.shared, own.shared, layers, True),
          narrow(both.personal, own.personal, ~layers, False),
        ),
        'steps': jnp.bool_(steps),
      }

    return Masks(each(full.held, False), each(full.trained, True))

  return Scope(labels, mask)


def _with_steps(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner` on the prompts, with the steps taken in the update."""

  def init(trainable):
    return inner.init({**trainable, 'steps': None})

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    own = Masks(*({**m, 'steps': None} for m in masks))
    out = inner.run(base, start, state, batches, own, context)
    steps = jnp.asarray(out.work.steps, jnp.float32)
    return out._replace(update={**out.update, 'steps': steps}, masks=masks)

  return LocalUpdate(init, run)


def _rule(optimizer, num_clients, momentum, server_rate) -> Aggregator:
  def init(params, key):
    del key
    shared = params['prompts'].shared
    labels = scopes.everything().labels(shared)
    chosen = tree.select(shared, labels, Shared)
    # Buffers of their own: a donated state must not hold one buffer twice.
    zeros = lambda: tree.zeros_like(chosen, jnp.float32)
    return Momentum(
      velocity=zeros(),
      before=zeros(),
      control=zeros(),
      controls=tree.broadcast(zeros(), num_clients),
      rate=jnp.float32(server_rate),
      rounds=jnp.int32(0),
    )

  def aggregate(uploads, state, params, key):
    del key
    weight = tree.normalise(by_weight(uploads))
    here = counted(uploads)
    moved = uploads.update['prompts'].shared  # w_k - w_t
    mean = tree.weighted_sum(moved, weight)
    steps = jnp.where(here, uploads.update['steps'], 0.0)
    eta = optimizer.learning_rate(0)
    ids = jnp.maximum(uploads.ids, 0)
    old = tree.take(state.controls, ids)

    def refreshed(c_k, c, change):
      scale = jnp.maximum(steps, 1.0) * eta
      return c_k - c - change / scale.reshape(-1, *[1] * (change.ndim - 1))

    new = tree.map_present(refreshed, old, state.control, moved)
    gain = tree.weighted_sum(tree.sub(new, old), tree.normalise(steps))
    part = jnp.sum(here) / num_clients
    control = tree.add(state.control, tree.scale(gain, part))
    pull = tree.sub(control, tree.weighted_sum(new, weight))

    first = state.rounds == 0
    rate = jnp.maximum(state.rate * 0.99, 1e-4)

    def velocity(v, before, mean, pull):
      return momentum * v + (1 - momentum) * (before + mean) + pull

    faster = tree.map_present(
      velocity, state.velocity, state.before, mean, pull
    )
    keep = lambda x, y: jnp.where(first, x, y)
    faster = tree.map_present(keep, state.velocity, faster)
    rate = keep(state.rate, rate)
    change = tree.map_present(lambda m, v: keep(m, m - rate * v), mean, faster)
    to = jnp.where(here, uploads.ids, num_clients)
    controls = tree.map_present(
      lambda table, row: table.at[to].set(row, mode='drop'),
      state.controls,
      new,
    )
    delta = jax.tree.map(lambda _: None, params)
    delta['prompts'] = delta['prompts']._replace(
      shared=tree.map_present(
        lambda d, p: d.astype(p.dtype), change, params['prompts'].shared
      )
    )
    delta['steps'] = jnp.zeros_like(params['steps'])
    return Aggregate(delta), Momentum(
      faster, tree.scale(mean, -1.0), control, controls, rate, state.rounds + 1
    )

  return Aggregator(init, aggregate, weights=by_weight)
