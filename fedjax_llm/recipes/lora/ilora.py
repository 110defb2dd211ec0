"""ILoRA's start and rule: QR factors of the weights and of the mean product.

arXiv 2511.16069 (2025).
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'ilora': dict(adapter=dict(name='orthogonal', rank=4)),
}


def ilora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """ILoRA's start and rule: QR factors of the weights and of the mean product.

      start:  W' = Q T:   b = Q[:, :R]',  s a = T[:R]',   W <- W - s a b
      rule:   (sum_k w_k s a_k b_k)' = Q T:   b = Q[:, :R]',  s a = T[:R]'

  arXiv 2511.16069 (2025). The start is that of the adapter `orthogonal`, the
  rule `aggregators.ilora`. The paper's control variates for ranks that differ
  are not known here and are left out, and with them clients of several ranks.

  >>> from fedjax_llm import local
  >>> ilora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ilora brings its own aggregator: leave the ...
  """
  return with_rule('ilora', aggregators.ilora(), loss, optimizer, parts)
