"""Three sizes of devices train one adapter, each by a method that fits it.

A composition of known methods, not one of a paper: the
zeroth-order step is that of FedMeZO (Ling et al. 2024, arXiv 2402.05926), the
mean over the layers that a client trained that of FedRA (arXiv 2311.11227).

    phone    S steps p <- p - eta_0 g z,  g = (L(p + eps z) - L(p - eps z))
             / (2 eps): two forward passes a step, no activation is kept
    laptop   S steps of backpropagation in the upper layers, a row at a time
    server   S steps of backpropagation in all layers
    rule     theta_l <- theta_l + sum_k w_k m_kl u_kl / sum_k w_k m_kl

Defaults: eps = 1e-3, four directions a step, two layers of laptops.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.scopes.ranks import of_profile
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Scope,
)

PHONE, LAPTOP, SERVER = 1, 2, 3  # `profiles.devices`

# What the config of each method changes.
NEEDS = {
  'three_sizes': dict(
    profiles=dict(name='devices'),
    algorithm=dict(laptop_layers=1, phone_learning_rate=1e-2),
  ),
}


def three_sizes(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  laptop_layers: int = 2,
  micro_batch: int | None = 1,
  phone_learning_rate: float = 1e-3,
  eps: float = 1e-3,
  directions: int = 4,
  **parts: Any,
) -> FederatedAlgorithm:
  """Three sizes of devices train one adapter, each by a method that fits it.

  Phones take steps of two forward passes, laptops train the upper layers with
  one row of activations at a time and none of the layers below, servers train
  all. Each entry of the adapter is averaged over the clients that trained it,
  and a client sends only these entries. A client's profile is its kind
  (`profiles.name=devices`). A block computes the steps of the kinds that are in
  it, so `block_size=1`, or blocks of one kind, cost nothing of the others.

  Args:
    laptop_layers: the number of upper layers that laptops train.
    micro_batch: rows of a laptop's micro-batch; None: the whole batch.
    phone_learning_rate: eta_0, of plain SGD.
    eps, directions: see `fed_mezo`.

  Raises:
    Error: no layer; a scope in `parts`; from `init`, an adapter without layers;
      from a round, clients without a kind in their profile.

  >>> method = three_sizes(None, local.optimizer('sgd', 0.1))
  >>> method.init_client({'layers': {'q': jnp.ones((3, 2))}})
  ClientState(private=None, local=(), upload=(), seen=())
  """
  refuse('three_sizes', 'scope', parts)
  if laptop_layers < 1:
    raise Error(
      f'algorithm.laptop_layers is {laptop_layers}; it must be at least 1.'
    )

  def upper(base, params, batch, key):
    below = max(_num_layers(params) - laptop_layers, 0)
    return local.frozen_below(loss, below)(base, params, batch, key)

  slope = local.along(local.two_point(eps), directions=directions)
  sgd = local.optimizer('sgd', phone_learning_rate)
  light = upper if micro_batch is None else _in_parts(upper, micro_batch)
  updates = {
    PHONE: local.sgd(loss, sgd, gradient=slope),
    LAPTOP: local.sgd(light, optimizer),
    SERVER: local.sgd(loss, optimizer),
  }
  parts.setdefault('aggregator', aggregators.masked_mean('mask'))
  return compose(_by_kind(updates), scope=_scope(laptop_layers), **parts)


def _in_parts(loss: Loss, rows: int) -> Loss:
  """Returns the loss over micro-batches of at most `rows` rows that fit."""

  def of_parts(base, params, batch, key):
    total = jax.tree.leaves(batch)[0].shape[0]
    size = max(n for n in range(1, min(rows, total) + 1) if total % n == 0)
    return local.micro_batches(loss, size)(base, params, batch, key)

  return of_parts


def _by_kind(updates: Mapping[int, LocalUpdate]) -> LocalUpdate:
  """Returns the update of a client's kind; that of others sees only padding."""

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    kind = _kind(context)
    outputs = []
    for name, update in updates.items():
      # Steps of padding end the loop of a block without clients of a kind.
      mine = jax.tree.map(
        lambda x, name=name: jnp.where(kind == name, x, jnp.zeros_like(x)),
        jax.tree.map(jnp.asarray, batches),
      )
      outputs.append(update.run(base, start, state, mine, masks, context))
    result = outputs[-1]
    for name, other in list(zip(updates, outputs))[:-1]:
      result = jax.tree.map(
        lambda x, y, name=name: jnp.where(kind == name, x, y), other, result
      )
    return result

  return LocalUpdate(lambda params: (), run)


def _scope(laptop_layers: int) -> Scope:
  """Returns the scope in which laptops train the upper layers only."""
  inner = scopes.everything()

  def labels(params):
    _num_layers(params)
    return inner.labels(params)

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    num = _num_layers(start)
    high = jnp.arange(num) >= num - laptop_layers
    high |= _kind(context) != LAPTOP

    def leaf(x, m):
      return m & high.reshape(-1, *[1] * (x.ndim - 1))

    some = tree.map_present(leaf, start['layers'], masks.trained['layers'])
    return Masks(masks.held, {**masks.trained, 'layers': some})

  return Scope(labels, mask)


def _kind(context: Any) -> Any:
  return of_profile(context.profile, 'device', 'kind of device')


def _num_layers(params: Params) -> int:
  """Returns L, of leaves that are stacked under 'layers', or raises `Error`."""
  below = params.get('layers') if isinstance(params, Mapping) else None
  stacked = [x for x in jax.tree.leaves(below) if jnp.ndim(x)]
  if not stacked or len({x.shape[0] for x in stacked}) > 1:
    raise Error(
      'three_sizes needs an adapter in all of the layers, such as '
      'adapter.name=lora without adapter.layers.'
    )
  return stacked[0].shape[0]
