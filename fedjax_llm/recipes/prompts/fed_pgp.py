"""FedPGP: a common prompt with a client's own low-rank change.

Cui et al. 2024, arXiv 2405.09771.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, server
from fedjax_llm.local import LocalOptimizer, distillation
from fedjax_llm.nodes import Prompt
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.prompts.p_fed_pg import rows_of
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_pgp': dict(adapter=dict(name='soft_prompt'), algorithm=dict(rank=2)),
}


class Own(NamedTuple):
  """A client's change of the prompt, left @ right."""

  left: Any  # [P, R]
  right: Any  # [R, D]


def fed_pgp(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  rank: int = 8,
  mu: float = 1.0,
  temperature: float = 0.5,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedPGP: a common prompt with a client's own low-rank change.

      p_k = sigma + U_k V_k,
      L = CE(p_k) + mu mean_x InfoNCE(near = cos(f(x), f(x; sigma)),
                                      far = cos(f(x; sigma), f(x; p_k))),
      sigma <- sum_k w_k sigma_k,   U_k and V_k stay with client k

  Cui et al. 2024, arXiv 2405.09771: the common prompt stays near the knowledge
  of the model without a prompt, the client's own moves away from the common
  one. The paper compares features of class names in CLIP. This is the same
  objective for texts: f is the mean of the last hidden states of a text's
  tokens, without a prompt, under sigma, and under p_k. A step computes three
  forward passes. With mu = 0 and rank = 0 it would be FedPrompt. U_k starts at
  random, V_k at zero.

  Args:
    model: the network.
    rank: columns of U_k.
    mu: weight of the contrastive term.
    temperature: of InfoNCE.

  Raises:
    Error: a scope in `parts`, parameters without a soft prompt, a rank below 1,
      a temperature that is not above 0.

  >>> method = fed_pgp(None, local.optimizer('sgd'), model=None, rank=2)
  >>> params = {'inputs': Prompt(jnp.ones((3, 8)))}
  >>> kept = method.init_client(method.init(jax.random.key(0), params).params)
  >>> kept.private['own'].left.shape, kept.private['own'].right.shape
  ((3, 2), (2, 8))
  """
  checked('fed_pgp', rank, temperature, parts)

  def wrap(key: Key, params: Params) -> Params:
    rows = rows_of('fed_pgp', params)
    name = jax.random.fold_in(key, 1)
    spread = jnp.std(rows) + 1e-3
    left = spread * jax.random.normal(name, (rows.shape[0], rank))
    right = jnp.zeros((rank, rows.shape[1]))
    return {'common': params, 'own': Own(left, right)}

  def total(base, params, batch, key) -> LossSum:
    mine = personal(params)
    sums = loss(base, mine, batch, key)
    if known(mu) and mu == 0:
      return sums
    plain = {n: x for n, x in params['common'].items() if n != 'inputs'}
    f = lambda part: distillation.pooled(model.hidden(base, part, batch), batch)
    zero, common, own = f(plain), f(params['common']), f(mine)
    near = distillation.cosine(jax.lax.stop_gradient(zero), common)
    far = distillation.cosine(common, own)
    terms = distillation.contrast(near, far[:, None], temperature)
    here = jnp.any(jnp.asarray(batch.segments) > 0, -1)
    number = jnp.maximum(jnp.sum(here), 1)
    mean = jnp.sum(jnp.where(here, terms, 0.0)) / number
    return sums._replace(total=sums.total + mu * sums.count * mean)

  return with_own(total, optimizer, wrap, personal, parts)


def personal(wrapped: Params) -> Params:
  """Returns the adapter with the prompt sigma + U V.

  >>> wrapped = {'common': {'inputs': Prompt(jnp.ones((1, 2)))},
  ...            'own': Own(jnp.ones((1, 1)), jnp.array([[1.0, 2.0]]))}
  >>> personal(wrapped)['inputs'].rows.tolist()
  [[2.0, 3.0]]
  """
  rows = changed(wrapped['common']['inputs'].rows, wrapped['own'])
  return {**wrapped['common'], 'inputs': Prompt(rows)}


# ------------------------------------------- shared with FedPGP on images --


def checked(
  name: str, rank: int, temperature: float, parts: dict[str, Any]
) -> None:
  """Raises `Error` for settings that FedPGP does not take.

  They are a scope in `parts`, a rank below 1, a temperature that is not above
  0.
  """
  refuse(name, 'scope', parts)
  if rank < 1:
    raise Error(f'algorithm.rank is {rank}; it must be at least 1.')
  if known(temperature) and temperature <= 0:
    raise Error(f'algorithm.temperature is {temperature}; it must be above 0.')


def changed(rows: jax.Array, own: Own) -> jax.Array:
  """Returns sigma + U V of rows sigma, [P, D].

  >>> one = jnp.ones((1, 1))
  >>> changed(one, Own(one, one)).tolist()
  [[2.0]]
  """
  change = jnp.matmul(own.left, own.right, precision=jax.lax.Precision.HIGHEST)
  return rows + change.astype(rows.dtype)


def with_own(
  total: Loss,
  optimizer: LocalOptimizer,
  wrap: Callable[[Key, Params], Params],
  personal: Callable[[Params], Params],
  parts: dict[str, Any],
) -> FederatedAlgorithm:
  """Returns federated averaging of `common`; `own` stays with each client.

  Args:
    total: the loss of {'common': adapter, 'own': `Own`}.
    optimizer: of the clients.
    wrap: makes those parameters from an adapter.
    personal: returns the adapter that a client uses.
    parts: of `fed_opt`.
  """
  return server.on_part(
    functools.partial(
      compose,
      local.sgd(total, optimizer),
      scope=scopes.private('^own/'),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: wrapped['common'],
    put=lambda wrapped, part: {**wrapped, 'common': part},
    serve=lambda wrapped, state: (
      wrapped['common'] if state is None else personal(wrapped)
    ),
  )
