"""Differential privacy: rules, codecs, accountants, the section of a config.

clipping     the sum of clipped updates with Gaussian noise, a rule
correlated   the same with noise that cancels in part over rounds, a rule
sent         noise in every message, and in a secure sum: codecs
accounting   epsilon of a number of rounds, the noise for a target
audit        a lower bound on epsilon from one run with canaries
streams      the noise of 'correlated' over rounds: banded, BLT, tree
plan         the plan of central noise: all of it, checked together
mechanisms   the plans of the others
section      the section `privacy` of a config

With 'central' and 'correlated' the server is trusted: it sees the updates and
releases only their noisy sum.
"""

from fedjax_llm.privacy import (
  accounting,
  audit,
  clipping,
  correlated,
  mechanisms,
  plan,
  sent,
  streams,
)
from fedjax_llm.privacy.clipping import noisy_mean
from fedjax_llm.privacy.correlated import correlated_mean
from fedjax_llm.privacy.plan import client_level
from fedjax_llm.privacy.section import section

__all__ = [
  'accounting',
  'audit',
  'clipping',
  'correlated',
  'mechanisms',
  'plan',
  'sent',
  'streams',
  'client_level',
  'correlated_mean',
  'noisy_mean',
  'section',
]
