"""FedAP: federated averaging of bottleneck adapters.

Zhang et al. 2023, Findings of ACL, "FedPETuning".
"""

from typing import Any

import jax

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Bottleneck
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import only
from fedjax_llm.types import FederatedAlgorithm, Loss, Params

# What the config of each method changes.
NEEDS = {
  'fed_ap': dict(adapter=dict(name='bottleneck', size=4)),
}


def fed_ap(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedAP: clients train bottlenecks in the layers, the server averages them.

      y + f(y down + b) up + c,
      (down, b, up, c) <- sum_k w_k (down, b, up, c)_k

  The adapter baseline of Zhang et al. 2023, "FedPETuning", Findings of ACL, on
  the adapters of Houlsby et al. 2019, arXiv 1902.00751. As with LoRA, the mean
  of the two matrices is not the mean of the functions.

  Raises:
    Error: from `init`, an adapter without a bottleneck.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> fed_ap(None, local.optimizer('sgd')).init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_ap trains bottlenecks: adapter.name=bottleneck.
  """
  inner = parts.pop('scope', None) or scopes.everything()
  hint = 'trains bottlenecks: adapter.name=bottleneck.'
  scope = only('fed_ap', inner, _has_bottleneck, hint)
  return fed_avg(loss, optimizer, scope=scope, **parts)


def _has_bottleneck(params: Params) -> bool:
  is_node = lambda x: isinstance(x, Bottleneck)
  return any(map(is_node, jax.tree.leaves(params, is_leaf=is_node)))
