"""FedOTP: a common and an own context, matched with the patches of an image.

Li et al. 2024, arXiv 2403.00041.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Context, Transported
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
  known,
)

# What the config of each method changes.
NEEDS = {'fed_otp': {**IMAGES, 'adapter': dict(name='context', length=4)}}


def fed_otp(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  mass: float = 0.8,
  temperature: float = 0.1,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedOTP: optimal transport between patches and two contexts.

      logit_c = scale sum_mn T_mn cos(patch m, t([P_n, name_c])),   n = g, k,
      T = argmin_T sum T (1 - cos) + e sum T (log T - 1),
          T 1 <= 1/M,   T' 1 = mass/2,
      P_g <- sum_k w_k P_g,k,   P_k stays with client k

  Li et al. 2024, arXiv 2403.00041 (equations 7 to 9): the common context meets
  the patches that all clients know, the own one those of its client, and a part
  1 - mass of the patches nothing. T gets no gradient. Each plan takes 100
  iterations, where the authors' code stops when a batch has converged. In the
  authors' scripts 4 rows for CIFAR-100 and 16 else, mass 0.8, SGD with 1e-3.

  Args:
    mass: gamma, the part of the patches that is moved; 1: all (Sinkhorn).
    temperature: e.

  Raises:
    Error: a scope in `parts`, a mass or a temperature out of range; from
      `init`, an adapter without a context.

  >>> method = fed_otp(None, local.optimizer('sgd'), mass=0.7)
  >>> params = {'scores': Context(jnp.ones((3, 8)))}
  >>> kept = method.init_client(method.init(jax.random.key(0), params).params)
  >>> kept.private['scores'].own.shape
  (3, 8)
  """
  refuse('fed_otp', 'scope', parts)
  if known(mass) and not 0 < mass <= 1:
    raise Error(f'algorithm.mass is {mass}; it must be above 0 and at most 1.')
  if known(temperature) and temperature <= 0:
    raise Error(f'algorithm.temperature is {temperature}; it must be above 0.')

  def wrap(key: Key, params: Params) -> Params:
    rows = node_of('fed_otp', params, Context, 'context').rows
    own = jax.random.normal(jax.random.fold_in(key, 1), rows.shape)
    node = Transported(
      common=rows,
      own=(jnp.std(rows) * own).astype(rows.dtype),
      mass=jnp.float32(mass),
      temperature=jnp.float32(temperature),
    )
    return {**params, 'scores': node}

  return server.on_part(
    functools.partial(
      compose,
      local.sgd(loss, optimizer),
      scope=scopes.private('^scores/own$'),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: wrapped,
    put=lambda wrapped, part: part,
  )
