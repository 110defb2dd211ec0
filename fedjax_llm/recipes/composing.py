"""What recipes share: the defaults of `fed_opt`, refusals, and common needs.

Every recipe takes a loss and a local optimizer, and hands further keywords
(`aggregator`, `server`, `upload`, `scope`, `block_size`, ...) to `fed_opt`.
"""

from typing import Any

from fedjax_llm import aggregators, local, server, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Scope,
)

# Clients of two sizes, in halves.
RANKS = dict(profiles=dict(name='ranks', choices=(2, 4)))
# Moments of eight rounds: the papers' rates are for hundreds.
SLOWLY = dict(algorithm=dict(server_learning_rate=0.003))


def compose(update: LocalUpdate, **parts: Any) -> FederatedAlgorithm:
  """`fed_opt` with the defaults of federated averaging for what is not given.

  They are: updates sent as they are, their weighted mean, and a server that
  adds it. Every round tells what it did to low-rank factors
  (`aggregators.measure`).

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
  """Raises an `Error` if a part is given that the method brings itself."""
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
  """Federated averaging with a rule that makes the method what it is.

  Raises:
    Error: another aggregator is given as well.
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
  """`with_rule`, where each client holds the ranks of its profile."""
  return with_rule(
    name, rule, loss, optimizer, {'scope': scopes.ranks(), **parts}
  )


def on_cores(name: str) -> Scope:
  """Shares everything, of parameters that have cores (`adapters.cores`).

  Raises:
    Error: from `labels`, parameters without a leaf named core.
  """
  inner = scopes.everything()

  def labels(params):
    if not any(path.endswith('/core') for path in scopes.leaf_paths(params)):
      raise Error(
        f'{name} trains matrices between frozen bases: adapter.name=lora_xs or '
        'ravan.'
      )
    return inner.labels(params)

  return inner._replace(labels=labels)
