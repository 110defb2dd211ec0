"""Parts that recipes share: the defaults of `fed_opt`, checks, common needs.

Builders return a `FederatedAlgorithm`. Every recipe takes a loss and a local
optimizer, and passes further keywords (`aggregator`, `server`, `upload`,
`scope`, `block_size`, ...) to `fed_opt`.
"""

from collections.abc import Callable
from typing import Any

from fedjax_llm import aggregators, local, scopes, server, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Params,
  Scope,
)

# Two ranks, each of half of the clients.
RANKS = dict(profiles=dict(name='ranks', choices=(2, 4)))
# Short texts with a label each, the genre of a speech, skewed over clients.
CLASSES = dict(
  task=dict(name='classification'),
  partition=dict(name='dirichlet', num_clients=12, alpha=0.3, min_size=10),
  population=dict(max_length=32),
  model=dict(name='random_encoder'),
)
# A rate for the moments of eight rounds: the papers' are for hundreds.
SLOWLY = dict(algorithm=dict(server_learning_rate=0.003))


def compose(update: LocalUpdate, **parts: Any) -> FederatedAlgorithm:
  """Returns `fed_opt` with the defaults of federated averaging.

  For parts left out they are: uncompressed updates, their weighted mean, a
  server that adds it, and metrics of low-rank factors (`aggregators.measure`).

  >>> from jax import numpy as jnp
  >>> method = compose(local.sgd(None, local.optimizer('sgd')))
  >>> method.init_client({'w': jnp.ones(2)})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  parts.setdefault('upload', uploads.identity())
  parts.setdefault('aggregator', aggregators.mean())
  parts.setdefault('server', server.sgd())
  parts.setdefault('measure', aggregators.measure)
  return server.fed_opt(update, **parts)


def refuse(name: str, section: str, parts: dict[str, Any]) -> None:
  """Raises `Error` if `parts` has a section that the method sets itself."""
  if section in parts:
    raise Error(
      f'{name} brings its own {section}: leave the {section} section out, or '
      f'name fed_avg with the {section} that you want.'
    )


def with_rule(
  name: str,
  rule: Any,
  loss: Loss,
  optimizer: LocalOptimizer,
  parts: dict[str, Any],
) -> FederatedAlgorithm:
  """Returns federated averaging with the rule of a method.

  Raises:
    Error: `parts` has an aggregator as well.
  """
  refuse(name, 'aggregator', parts)
  return compose(local.sgd(loss, optimizer), aggregator=rule, **parts)


def ranked(
  name: str,
  rule: Any,
  loss: Loss,
  optimizer: LocalOptimizer,
  parts: dict[str, Any],
) -> FederatedAlgorithm:
  """Returns `with_rule` for clients that hold the ranks of their profiles."""
  return with_rule(
    name, rule, loss, optimizer, {'scope': scopes.ranks(), **parts}
  )


def only(
  name: str, inner: Scope, accepts: Callable[[Params], bool], hint: str
) -> Scope:
  """Returns `inner`, for parameters of a method's own kind of adapter.

  Raises:
    Error: from `labels`, parameters that `accepts` does not take.
  """

  def labels(params):
    if not accepts(params):
      raise Error(f'{name} {hint}')
    return inner.labels(params)

  return inner._replace(labels=labels)


def on_cores(name: str) -> Scope:
  """Returns a scope that shares everything, of parameters with cores.

  See `adapters.cores`.

  Raises:
    Error: from `labels`, parameters without a leaf named core.
  """
  has_cores = lambda params: any(
    path.endswith('/core') for path in scopes.leaf_paths(params)
  )
  return only(
    name,
    scopes.everything(),
    has_cores,
    'trains matrices between frozen bases: adapter.name=lora_xs or ravan.',
  )
