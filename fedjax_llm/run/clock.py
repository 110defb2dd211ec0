"""A client's round in numbers: the operations and bytes behind the clock.

`job` returns the `Job` of a run's method, for samplers with a clock
(`clients.timed`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_llm import tree
from fedjax_llm.clients.system import Job
from fedjax_llm.run import costs, rates
from fedjax_llm.types import Draw, Error, FederatedAlgorithm

# The samplers with a clock.
TIMED = ('buffered', 'compass', 'deadline', 'tiered')


def check(name: Any, has_system: bool) -> None:
  """Raises an `Error` unless a sampler with a clock comes with a system.

  >>> check('uniform', has_system=False)
  >>> check('deadline', has_system=False)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: clients.name=deadline has a clock and needs the \
section system, such as system.name=fleet.
  """
  if name in TIMED and not has_system:
    raise Error(
      f'clients.name={name} has a clock and needs the section system, such as '
      'system.name=fleet.'
    )
  plain = isinstance(name, str) and name not in TIMED and ':' not in name
  if plain and has_system:
    raise Error(
      f'clients.name={name} has no clock, so nothing reads the section system: '
      f'leave it out, or name one of {", ".join(TIMED)}.'
    )


def check_tiers(algorithm: Mapping[str, Any], clients: Any) -> None:
  """Raises an `Error` unless a method of tiers has those of the clients.

  >>> check_tiers({'name': 'fed_at', 'num_tiers': 3},
  ...             {'name': 'tiered', 'num_tiers': 2})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.num_tiers is 3 and clients.num_tiers is 2; \
they must be the same.
  """
  own, theirs = (
    section.get('num_tiers') if isinstance(section, Mapping) else None
    for section in (algorithm, clients)
  )
  if None not in (own, theirs) and own != theirs:
    raise Error(
      f'algorithm.num_tiers is {own} and clients.num_tiers is {theirs}; they '
      'must be the same.'
    )


def job(
  algorithm: FederatedAlgorithm,
  params: Any,
  base: Any,
  make_cohort: Callable[[Draw, int], Any],
) -> Job:
  """Returns the operations and bytes of one client's round.

  Operations are those of the matrix products in the traced round of one client
  with all its steps; bytes are those that the ledger counts for client 0 in
  round 0. Nothing is trained where the bytes do not depend on training: the
  compiler leaves it out.
  """
  zero = np.zeros(1, np.int32)
  one = make_cohort(Draw(zero, np.ones(1, bool), tier=zero), 0)
  state = algorithm.init(jax.random.key(0), params)
  newcomer = algorithm.init_client(state.params)
  one = one._replace(states=tree.broadcast(newcomer, 1))
  num_steps = rates.num_steps(one.batches)
  traced = jax.make_jaxpr(algorithm.round)(state, one, base)
  flops = sum(costs.operations(traced, trips=num_steps).values())

  @jax.jit
  def ledger(state, one, base):
    info = algorithm.round(state, one, base)[2]
    return info.bytes_up, info.bytes_down

  counts = jax.device_get(ledger(state, one, base))
  up, down = (int(np.sum(x, dtype=np.int64)) for x in counts)
  return Job(float(flops), float(down), float(up), num_steps)
