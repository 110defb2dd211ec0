"""Selection of examples inside each client.

Builders return a `Selection`. A selection either prepares the examples once
(near duplicates, coresets), or orders them in every round (curriculum,
quality), or scores the rows of a round's candidates under the served model
(loss, gradient norm). All are pure functions of the seed and the round.
"""

from fedjax_llm.data.selection.coresets import fed_hds as fed_hds
from fedjax_llm.data.selection.duplicates import (
  near_duplicates as near_duplicates,
)
from fedjax_llm.data.selection.orders import curriculum as curriculum
from fedjax_llm.data.selection.orders import quality as quality
from fedjax_llm.data.selection.scored import by_gradient as by_gradient
from fedjax_llm.data.selection.scored import by_loss as by_loss
from fedjax_llm.data.selection.types import Selection as Selection

__all__ = [
  'by_gradient',
  'by_loss',
  'curriculum',
  'fed_hds',
  'near_duplicates',
  'quality',
]
