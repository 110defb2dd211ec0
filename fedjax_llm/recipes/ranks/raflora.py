"""raFLoRA: each rank is averaged over its holders, as products, then the SVD.

arXiv 2602.13486 (2026).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import RANKS, ranked
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'raflora': RANKS,
}


def raflora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_unheld: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """raFLoRA: each rank is averaged over its holders, as products, then the SVD.

      s a b = SVD_R(sum_i sum_{k: r_k > i} v_ki s a_k[:, i] b_k[i]),
      v_ki = w_k / sum_{j: r_j > i} w_j;  client k gets the first r_k columns

  arXiv 2602.13486 (2026), algorithm 1. Directions beyond the smallest rank keep
  their size, which zero padding and FlexLoRA shrink in every round. The
  settings are those of `aggregators.raflora`; its `keep_unheld` decides what
  the paper leaves open.

  >>> from fedjax_llm import local, server
  >>> raflora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  rule = aggregators.raflora(keep_unheld=keep_unheld)
  return ranked('raflora', rule, loss, optimizer, parts)
