"""Selective layers: each client trains the layers with the largest gradients.

Sun et al. 2024, arXiv 2408.15600.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, local, scopes, server, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Reports,
  Scope,
  known,
)

# What the config of each method changes.
NEEDS = {
  'selective_layers': dict(profiles=dict(name='layers', choices=(1, 2))),
}


def selective_layers(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  profiles: Mapping[str, np.ndarray] | None = None,
  strength: float = 0.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """Selective layers: each client trains the layers with the largest gradients.

      max_z sum_k sum_l z_kl ||g_kl||^2 - lambda sum_{i != j} ||z_i - z_j||_1
      with z_kl in {0, 1},  sum_l z_kl <= R_k,
      theta_l <- sum_k w_k z_kl theta_kl / sum_k w_k z_kl

  Sun et al. 2024, arXiv 2408.15600: g_kl is the gradient of client k with
  respect to layer l, R_k the layers that it can train, and lambda makes clients
  agree (0: each chooses alone; large: all train the same layers). Layers that
  nobody chose keep their value; leaves outside of layers are trained by all.
  The host decides between rounds (`choose`) from the norms that a client
  reported when it last took part, at the parameters that it had received. A
  client without a report has the norms 0, and of equal layers the last ones
  are chosen. The paper trains whole layers; here the layer's part of any
  adapter is meant.

  Args:
    num_clients, profiles: N, and {'layers': [N]}, the R_k
      (`profiles.name=layers`).
    strength: lambda.

  Raises:
    Error: no number of layers, a negative strength, a scope or an aggregator in
      `parts`; from `init`, an adapter without layers.

  >>> method = selective_layers(
  ...   None, local.optimizer('sgd'), num_clients=2,
  ...   profiles={'layers': np.array([1, 2])})
  >>> params = {'layers': {'q': jnp.ones((3, 2))}}
  >>> state = method.init(jax.random.key(0), params)
  >>> state.aggregator.profiles['chosen'].astype(int).tolist()
  [[0, 0, 1], [0, 1, 1]]
  """
  for section in ('scope', 'aggregator'):
    refuse('selective_layers', section, parts)
  if profiles is None or 'layers' not in profiles:
    raise Error(
      'selective_layers needs the number of layers that each client can train: '
      'profiles.name=layers.'
    )
  if known(strength) and strength < 0:
    raise Error(f'algorithm.strength is {strength}; it must be 0 or more.')
  budgets = np.asarray(profiles['layers'])
  algorithm = compose(
    measured(local.sgd(loss, optimizer), loss),
    scope=_scope(),
    aggregator=aggregators.masked_mean('mask'),
    **parts,
  )

  def first(params: Params):
    num = num_layers(params)
    none = np.zeros((num_clients, num), bool)
    return {'chosen': none}, np.zeros(num, np.float32)

  def policy(round: int, reports: Reports, plan: Any):
    if round and not (reports.round == round).any():
      return plan  # no new report
    norms = np.asarray(reports.values, float)
    return {**plan, 'chosen': choose(norms, budgets, strength)}

  return server.planned(
    algorithm, lambda params: policy, first=first, num_clients=num_clients
  )


def num_layers(params: Params) -> int:
  """Returns L, of leaves that are stacked under 'layers', or raises `Error`.

  >>> num_layers({'layers': {'q': jnp.ones((3, 2))}, 'head': jnp.ones(2)})
  3
  """
  below = params.get('layers') if isinstance(params, Mapping) else None
  stacked = [x for x in jax.tree.leaves(below) if jnp.ndim(x)]
  if not stacked:
    raise Error('selective_layers needs an adapter in the layers.')
  if len({x.shape[0] for x in stacked}) > 1:
    raise Error('selective_layers needs an adapter in all of the layers.')
  return stacked[0].shape[0]


def measured(inner: LocalUpdate, loss: Loss) -> LocalUpdate:
  """Returns `inner`, with ||g_l||^2 at the received parameters as the report.

  The gradient is that of the token mean over all batches; [L].
  """

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    held = tree.like(start, masks.held)

    def mean(layers):
      params = tree.merge({**held, 'layers': layers}, start)
      each = jax.lax.map(
        lambda batch: loss(base, params, batch, context.key), batches
      )
      total, count = jnp.sum(each.total), jnp.sum(each.count)
      return total / jnp.maximum(count, 1.0)

    slope = jax.grad(mean)(held['layers'])
    square = lambda x: jnp.sum(
      jnp.square(x.astype(jnp.float32)), tuple(range(1, x.ndim))
    )
    report = sum(square(x) for x in jax.tree.leaves(slope))
    out = inner.run(base, start, state, batches, masks, context)
    return out._replace(report=report)

  return LocalUpdate(inner.init, run)


def _scope() -> Scope:
  """Returns the scope: a client holds everything and trains chosen layers."""
  inner = scopes.everything()

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    chosen = context.profile['chosen']

    def leaf(x, m):
      return m & chosen.reshape(-1, *[1] * (x.ndim - 1))

    some = tree.map_present(leaf, start['layers'], masks.trained['layers'])
    return Masks(masks.held, {**masks.trained, 'layers': some})

  return Scope(inner.labels, mask)


def objective(chosen: np.ndarray, norms: np.ndarray, strength: float) -> float:
  """Returns the value of a choice [N, L], with ordered pairs i != j.

  >>> z = np.array([[1, 0], [0, 1]])
  >>> objective(z, np.array([[5.0, 1.0], [1.0, 5.0]]), strength=0.5)
  8.0
  """
  z = np.asarray(chosen, float)
  apart = np.abs(z[:, None] - z).sum()
  return float((z * norms).sum() - strength * apart)


def choose(
  norms: np.ndarray, budgets: np.ndarray, strength: float = 0.0
) -> np.ndarray:
  """Returns the layers of each client, booleans [N, L].

  The clients choose in turn, each the best answer to the others' choice, until
  nobody changes; this starts from the choice of each alone and from the layers
  with the largest sum, and the better end is returned. It is exact for a
  strength of 0, and where all agree.

  >>> norms = np.array([[5.0, 1.0], [3.0, 4.0]])
  >>> choose(norms, np.array([1, 1])).astype(int).tolist()
  [[1, 0], [0, 1]]
  >>> choose(norms, np.array([1, 1]), strength=1.0).astype(int).tolist()
  [[1, 0], [1, 0]]
  """
  norms = np.asarray(norms, float)
  number, layers = norms.shape
  budgets = np.minimum(budgets, layers)

  def best(gain: np.ndarray, budget: int) -> np.ndarray:
    # Of equal gains the last layers come first.
    order = np.lexsort((-np.arange(layers), -gain))[:budget]
    row = np.zeros(layers, bool)
    row[order] = gain[order] >= 0
    return row

  def settled(z: np.ndarray) -> np.ndarray:
    for _ in range(100):
      before = z.copy()
      for k in range(number):
        others = z.sum(0) - z[k]
        # Of each ordered pair: 1 - 2 z_jl more disagreement if z_kl is 1.
        gain = norms[k] - 2 * strength * ((number - 1) - 2 * others)
        z[k] = best(gain, budgets[k])
      if (z == before).all():
        break
    return z

  alone = np.stack([best(norms[k], budgets[k]) for k in range(number)])
  if not strength:
    return alone
  together = np.stack([best(norms.sum(0), r) for r in budgets])
  ends = [settled(alone), settled(together)]
  return max(ends, key=lambda z: objective(z, norms, strength))
