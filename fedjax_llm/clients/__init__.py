"""Clients: who takes part, with which data, in what scope, keeping what.

sampling  round -> Draw             cohorts  Draw -> Cohort [K, S, B, T]
scopes    what a client trains,     store    private state of N clients
          shares and keeps
"""

from fedjax_llm.clients import cohorts, sampling, scopes, store
from fedjax_llm.clients.sampling import by_size, cyclic, full, uniform
from fedjax_llm.clients.scopes import (
  all_private,
  everything,
  frozen,
  labelled,
  private,
)

__all__ = [
  'cohorts',
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
]
