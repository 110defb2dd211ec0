"""The section `privacy` of a config, coupled with all that it depends on.

`of` returns the plan, `rule` the aggregator, and `watched` the algorithm, with
checks that nothing of the clients passes the rule by.
"""

from collections.abc import Mapping
from typing import Any

import jax

from fedjax_llm import privacy
from fedjax_llm.run import builders
from fedjax_llm.types import Error, FederatedAlgorithm


def check(conf: Mapping[str, Any]) -> None:
  """Raises `Error` for a config whose sections break its section `privacy`."""
  if not conf.get('privacy'):
    return
  name = builders.named(conf.get('clients'))
  if name != 'poisson':
    raise Error(
      f'clients.name is {name!r}, and privacy counts samples in which each '
      'client is drawn on its own: set clients.name=poisson.'
    )
  if (conf.get('clients') or {}).get('rate') is None:
    raise Error(
      'clients.rate is missing: privacy counts with the probability that a '
      'client is drawn.'
    )
  by = (conf.get('cohort') or {}).get('weight_by', 'examples')
  if by != 'uniform':
    raise Error(
      f'cohort.weight_by is {by!r}, and with privacy all clients count the '
      'same: set cohort.weight_by=uniform.'
    )
  if conf.get('aggregator'):
    name = builders.named(conf['aggregator'])
    raise Error(
      f'aggregator.name is {name!r}, and privacy brings the only rule whose '
      'sensitivity is known, a sum of clipped updates: leave the section '
      'aggregator out.'
    )
  if builders.named(conf.get('partition')) == 'pooled':
    raise Error(
      "partition.name is 'pooled': privacy protects clients, and pooled texts "
      'have only one.'
    )


def of(conf: Mapping[str, Any], num_clients: int) -> privacy.plan.Plan | None:
  """Returns the plan of a config with N clients; None without privacy."""
  check(conf)
  if not conf.get('privacy'):
    return None
  return builders.build(
    conf['privacy'],
    privacy.client_level,
    rate=float(conf['clients']['rate']),
    num_clients=num_clients,
    cohort_size=conf['clients']['cohort_size'],
    num_rounds=conf['num_rounds'],
  )


def rule(conf: Mapping[str, Any], num_clients: int, trains: bool) -> Any:
  """Returns the rule of `privacy` as an argument of recipes, {} without it.

  What only reads a trained state (`trains=False`) needs no accountant.
  """
  check(conf)
  if not conf.get('privacy'):
    return {}
  if not trains:
    return {'aggregator': privacy.noisy_mean(1.0, 1.0, 1.0)}
  plan = of(conf, num_clients)
  assert plan is not None
  return {'aggregator': plan.rule()}


def built(
  private: bool, name: Any, build: Any, *args: Any, **parts: Any
) -> Any:
  """Returns `build(*args, **parts)`; its errors name privacy, if it is set."""
  try:
    return build(*args, **parts)
  except Error as error:
    if not private or str(error).startswith('privacy'):
      raise
    raise Error(
      f'privacy brings the aggregator of the run, and algorithm.name={name} '
      f'was refused with it: {error}'
    ) from error


def watched(algorithm: FederatedAlgorithm, name: Any) -> FederatedAlgorithm:
  """Returns the algorithm with checks of its guarantee and the clip norm.

  Raises:
    Error: the method plans from reports of clients; from `init`, it does not
      use the rule of privacy, or its upload keeps a state at the clients.
  """
  if algorithm.plan is not None:
    raise Error(
      f'privacy: algorithm.name={name} plans from reports of its clients, '
      'which are neither clipped nor noised: take another method.'
    )

  def init(key, params):
    state = algorithm.init(key, params)
    if not isinstance(state.aggregator, privacy.clipping.State):
      raise Error(
        f'privacy: algorithm.name={name} does not take the rule of privacy as '
        'its only aggregator: use a method with one linear rule, such as '
        'fed_avg or ffa_lora.'
      )
    newcomer = jax.eval_shape(algorithm.init_client, state.params)
    if jax.tree.leaves(newcomer.upload):
      raise Error(
        'privacy: this upload carries the error of its compression from round '
        'to round, for which no guarantee is established here: use an upload '
        'without error feedback.'
      )
    return state

  def round(state, cohort, base=None, data=None):
    new, states, info = algorithm.round(state, cohort, base, data)
    clip = {'privacy/clip': state.aggregator.clip}
    return new, states, info._replace(metrics={**info.metrics, **clip})

  return algorithm._replace(init=init, round=round)
