"""FeDeRA: FedIT that starts from the principal directions of the weights.

Yan et al. 2024, arXiv 2404.18848.
"""

from typing import Any

from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'federa': dict(adapter=dict(name='federa', rank=4)),
}


def federa(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FeDeRA: FedIT that starts from the principal directions of the weights.

      W = U S V':   a = U_r sqrt(S_r / s),   b = sqrt(S_r / s) V_r',
                    W <- W - s a b

  and then a <- sum_k w_k a_k, b <- sum_k w_k b_k (Yan et al. 2024, arXiv
  2404.18848). The start is that of the adapter `federa`; the round is
  `fed_avg`.

  >>> from fedjax_llm import local
  >>> method = federa(None, local.optimizer('adamw'))
  >>> method.init_client({'w': 1.0})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  return fed_avg(loss, optimizer, **parts)
