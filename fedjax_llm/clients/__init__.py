"""Clients: draws of a round's clients, their batches, profiles and states.

sampling   round -> Draw
cohorts    Draw -> Cohort [K, S, B, T]
store      private state of N clients
system     devices and links of N clients
timed      round -> Draw, by the simulated time of arrival
profiles   capacities of N clients
"""

from fedjax_llm.clients import cohorts, profiles, sampling, store, system, timed
from fedjax_llm.clients.sampling import by_size, cyclic, full, poisson, uniform

__all__ = [
  'cohorts',
  'profiles',
  'sampling',
  'store',
  'system',
  'timed',
  # samplers
  'uniform',
  'by_size',
  'cyclic',
  'full',
  'poisson',
]
