"""Clients: who takes part, with which data, in what scope, keeping what.

sampling  round -> Draw             cohorts  Draw -> Cohort [K, S, B, T]
scopes    what a client trains,     store    private state of N clients
          shares and keeps         profiles what clients can carry
policies  what the host decides    allotment ranks that it gives to weights
          between rounds           assignment experts that it gives to clients
"""

from fedjax_llm.clients import (
  allotment,
  assignment,
  cohorts,
  policies,
  profiles,
  sampling,
  scopes,
  store,
)
from fedjax_llm.clients.sampling import by_size, cyclic, full, uniform
from fedjax_llm.clients.scopes import (
  all_private,
  alternating,
  everything,
  frozen,
  labelled,
  private,
  ranks,
  untrained,
)

__all__ = [
  'allotment',
  'assignment',
  'cohorts',
  'policies',
  'profiles',
  'sampling',
  'scopes',
  'store',
  # samplers
  'uniform',
  'by_size',
  'cyclic',
  'full',
  # scopes
  'everything',
  'private',
  'frozen',
  'labelled',
  'all_private',
  'alternating',
  'ranks',
  'untrained',
]
