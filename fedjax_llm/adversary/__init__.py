"""Adversaries: simulated malicious clients, to test robust rules.

Builders return an `Adversary`, `(uploads, key) -> uploads`, which `fed_opt`
applies between the clients and the rule. It replaces the updates of the
malicious clients of the cohort and leaves the rest of `Uploads` as it is.
Attacks on what they train on are in `poisoning`.
"""

from fedjax_llm.adversary import poisoning as poisoning
from fedjax_llm.adversary.alone import free_riders as free_riders
from fedjax_llm.adversary.alone import gaussian as gaussian
from fedjax_llm.adversary.alone import model_replacement as model_replacement
from fedjax_llm.adversary.alone import sign_flip as sign_flip
from fedjax_llm.adversary.assembly import assembled as assembled
from fedjax_llm.adversary.colluding import alie as alie
from fedjax_llm.adversary.colluding import ipm as ipm

__all__ = [
  'alie',
  'assembled',
  'free_riders',
  'gaussian',
  'ipm',
  'model_replacement',
  'sign_flip',
]
