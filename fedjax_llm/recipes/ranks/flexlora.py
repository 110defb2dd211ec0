"""FlexLoRA and HLoRA: the mean product, rounded to each rank by its SVD.

Bai et al. 2024, arXiv 2402.11505.
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import RANKS, ranked
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'flexlora': RANKS,
  'hlora': RANKS,
}


def flexlora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  split: str = 'b',
  **parts: Any,
) -> FederatedAlgorithm:
  """FlexLoRA: the mean product, rounded to each client's rank by its SVD.

      s a b = SVD_R(s sum_k w_k a_k b_k); client k gets the first r_k columns

  Bai et al. 2024, arXiv 2402.11505. The settings are those of
  `aggregators.flexlora`.

  >>> from fedjax_llm import local
  >>> from fedjax_llm import server
  >>> flexlora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  return ranked(
    'flexlora', aggregators.flexlora(split=split), loss, optimizer, parts
  )


def hlora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """HLoRA, as in NVIDIA FLARE's MedGemma example.

      a b = SVD_R(sum_k w_k a_k b_k) with the singular values on a

  and every client truncates it to its rank. FlexLoRA has the same rule with the
  singular values on b. b is the factor beside the output; its rows are
  orthonormal here.

  >>> from fedjax_llm import local
  >>> from fedjax_llm import server
  >>> hlora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  return ranked(
    'hlora', aggregators.flexlora(split='a'), loss, optimizer, parts
  )
