"""Differential privacy of whole clients: the rule, the accountant, the plan.

clipping     the sum of clipped updates with Gaussian noise, a rule
accounting   epsilon of a number of rounds, the noise for a target
audit        a lower bound on epsilon from one run with canaries
plan         the section `privacy` of a config: all of it, checked together

The server is trusted: it sees the updates and releases only their noisy sum.
"""

from fedjax_llm.privacy import accounting, audit, clipping, plan
from fedjax_llm.privacy.clipping import noisy_mean
from fedjax_llm.privacy.plan import client_level

__all__ = [
  'accounting',
  'audit',
  'clipping',
  'plan',
  'client_level',
  'noisy_mean',
]
