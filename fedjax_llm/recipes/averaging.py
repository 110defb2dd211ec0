"""Federated averaging and its relatives, each a call of `fed_opt`.

Every recipe takes a loss and a local optimizer, and hands further keywords
(`aggregator`, `server`, `upload`, `scope`, `block_size`, ...) to `fed_opt`.
Examples that train nothing have no loss, `None`.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import aggregators, local, server, tree, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.types import (
  AnyAggregator,
  Controlled,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  Params,
  ServerState,
)


def compose(update: LocalUpdate, **parts: Any) -> FederatedAlgorithm:
  """`fed_opt` with the defaults of federated averaging for what is not given.

  They are: updates sent as they are, their weighted mean, and a server that
  adds it. Every round tells what it did to low-rank factors
  (`aggregators.measure`).

  >>> method = compose(local.sgd(None, local.optimizer('sgd')))
  >>> method.init_client({'w': jnp.ones(2)})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  parts.setdefault('upload', uploads.identity())
  parts.setdefault('aggregator', aggregators.mean())
  parts.setdefault('server', server.sgd())
  parts.setdefault('measure', aggregators.measure)
  return server.fed_opt(update, **parts)


def fed_avg(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  keep_optimizer: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAvg: local steps, then the weighted mean of the updates.

  McMahan et al. 2017, arXiv 1602.05629, algorithm 1. On LoRA factors it is
  FedIT (Zhang et al. 2023, arXiv 2305.05644), whose mean of factors is not the
  mean of their products.

  >>> import jax
  >>> from fedjax_llm.types import Cohort, LossSum
  >>> slope = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.float32([1, 0]))
  >>> method = fed_avg(slope, local.optimizer('sgd', 1.0))
  >>> state = method.init(jax.random.key(0), {'w': jnp.float32(0)})
  >>> texts, weight = jnp.array([[-2.0], [-6.0]]), jnp.array([3.0, 1.0])
  >>> cohort = Cohort(jnp.arange(2), texts, weight, jnp.array([True, True]))
  >>> state, _, _ = jax.jit(method.round)(state, cohort)
  >>> float(state.params['w'])  # (3 * 2 + 1 * 6) / 4
  3.0
  """
  update = local.sgd(
    loss, optimizer, clip_norm=clip_norm, keep_optimizer=keep_optimizer
  )
  return compose(update, **parts)


def fed_prox(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  mu: float = 0.01,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedProx: FedAvg with mu / 2 * ||p - start||^2 in the local objective.

  Li et al. 2020, arXiv 1812.06127, algorithm 2; mu = 0 is FedAvg.

  >>> fed_prox(None, local.optimizer('sgd'), mu=-1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: prox is -1.0; it must be 0 or more.
  """
  update = local.sgd(loss, optimizer, prox=mu, clip_norm=clip_norm)
  return compose(update, **parts)


def scaffold(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  aggregator: AnyAggregator | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """SCAFFOLD: control variates cancel the drift between clients.

  Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II. Local
  optimizer: plain SGD. The server's c moves by the sum of the changes of c_k
  over all N = `num_clients` clients; it doubles what travels both ways.

  >>> method = scaffold(None, local.optimizer('sgd'), num_clients=10)
  >>> method.init(None, {'w': jnp.float32(5)}).params.control  # c
  {'w': Array(0., dtype=float32)}
  >>> method.init_client(Controlled(*[{'w': jnp.float32(5)}] * 2)).local  # c_k
  {'w': Array(0., dtype=float32)}
  """
  inner = aggregator or aggregators.mean()
  fold = parts.pop('fold', None)
  if fold is not None:  # what is served, not the control variate, folds
    parts['fold'] = lambda base, p: (
      (done := fold(base, p.params))[0],
      p._replace(params=done[1]),
    )
  algorithm = compose(
    local.scaffold(loss, optimizer, clip_norm=clip_norm),
    aggregator=aggregators.control_variates(inner, num_clients),
    **parts,
  )
  scope = parts.get('scope') or scopes.everything()

  def init(key: Key, params: Params) -> ServerState:
    masks = tree.full_masks(params, scope.labels(params))
    control = tree.zeros_like(tree.like(params, masks.trained), jnp.float32)
    return algorithm.init(key, Controlled(params, control))

  def personal(params, state):
    return algorithm.personal(params, state).params

  return algorithm._replace(init=init, personal=personal)


def fed_avgm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  momentum: float | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAvgM: momentum on the server (Hsu et al. 2019, arXiv 1909.06335).

  Defaults of the server's settings are those of `server.fed_avgm`.

  >>> method = fed_avgm(None, local.optimizer('sgd'), momentum=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m
  {'w': Array([0., 0.], dtype=float32)}
  """
  step = server.fed_avgm(
    **_given(learning_rate=server_learning_rate, momentum=momentum)
  )
  return _with_server('fed_avgm', step, loss, optimizer, clip_norm, parts)


def fed_adagrad(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  tau: float | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_adagrad`.

  >>> method = fed_adagrad(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].v  # tau^2
  {'w': Array([0.25, 0.25], dtype=float32)}
  """
  step = server.fed_adagrad(
    **_given(learning_rate=server_learning_rate, b1=b1, tau=tau)
  )
  return _with_server('fed_adagrad', step, loss, optimizer, clip_norm, parts)


def fed_adam(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  b2: float | None = None,
  tau: float | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_adam`.

  >>> method = fed_adam(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m
  {'w': Array([0., 0.], dtype=float32)}
  """
  step = server.fed_adam(
    **_given(learning_rate=server_learning_rate, b1=b1, b2=b2, tau=tau)
  )
  return _with_server('fed_adam', step, loss, optimizer, clip_norm, parts)


def fed_yogi(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  b2: float | None = None,
  tau: float | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_yogi`.

  >>> method = fed_yogi(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].v  # tau^2
  {'w': Array([0.25, 0.25], dtype=float32)}
  """
  step = server.fed_yogi(
    **_given(learning_rate=server_learning_rate, b1=b1, b2=b2, tau=tau)
  )
  return _with_server('fed_yogi', step, loss, optimizer, clip_norm, parts)


def _with_server(name, step, loss, optimizer, clip_norm, parts):
  if 'server' in parts:
    raise Error(
      f'{name} brings its own server optimizer: leave the server section out, '
      'or name fed_avg with the server that you want.'
    )
  return fed_avg(loss, optimizer, clip_norm=clip_norm, server=step, **parts)


def _given(**settings: Any) -> dict[str, Any]:
  """Only what was said: the builder's signature holds the defaults."""
  return {k: v for k, v in settings.items() if v is not None}
