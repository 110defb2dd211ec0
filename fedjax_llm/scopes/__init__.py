"""Scopes: the leaves and entries that a client trains, shares and keeps.

Builders return a `Scope`: a label a leaf, and masks inside the round.
`policies` builds plans that the host makes between rounds, `allotment` and
`assignment` turn them into masks.
"""

from fedjax_llm.scopes.draws import drawn as drawn
from fedjax_llm.scopes.labels import all_private as all_private
from fedjax_llm.scopes.labels import everything as everything
from fedjax_llm.scopes.labels import frozen as frozen
from fedjax_llm.scopes.labels import labelled as labelled
from fedjax_llm.scopes.labels import leaf_paths as leaf_paths
from fedjax_llm.scopes.labels import private as private
from fedjax_llm.scopes.layers import layers as layers
from fedjax_llm.scopes.ranks import ranks as ranks
from fedjax_llm.scopes.turns import alternating as alternating
from fedjax_llm.scopes.turns import in_turn as in_turn
from fedjax_llm.scopes.turns import untrained as untrained

__all__ = [
  'all_private',
  'alternating',
  'drawn',
  'everything',
  'frozen',
  'in_turn',
  'labelled',
  'layers',
  'private',
  'ranks',
  'untrained',
]
