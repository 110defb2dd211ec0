"""Clients: draws of a round's clients, their batches, profiles and states.

sampling   round -> Draw
valued     the same, by the values of an earlier run
staged     the same, of clients with an example of the round's stage
cohorts    Draw -> Cohort [K, S, B, T]
store      private state of N clients
upgraded   the same, from rows of an earlier version
system     devices and links of N clients
timed      round -> Draw, by the simulated time of arrival
compass    the same, with local steps dealt by measured speed
attendance who is available, as time goes on
profiles   capacities of N clients
"""

from fedjax_llm.clients import (
  cohorts,
  compass,
  profiles,
  sampling,
  staged,
  store,
  system,
  timed,
  upgraded,
  valued,
)
from fedjax_llm.clients.sampling import (
  by_size,
  cyclic,
  full,
  poisson,
  rotating,
  uniform,
)

__all__ = [
  'compass',
  'cohorts',
  'profiles',
  'sampling',
  'staged',
  'store',
  'system',
  'timed',
  'upgraded',
  'valued',
  # samplers
  'uniform',
  'by_size',
  'cyclic',
  'full',
  'poisson',
  'rotating',
]
