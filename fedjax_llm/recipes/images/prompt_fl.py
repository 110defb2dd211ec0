"""PromptFL: federated averaging of the context of class names.

Guo et al. 2022, arXiv 2208.11625.
"""

from typing import Any

from fedjax_llm import local, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Context
from fedjax_llm.recipes.composing import compose, only
from fedjax_llm.recipes.images.scored import IMAGES
from fedjax_llm.types import FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {'prompt_fl': {**IMAGES, 'adapter': dict(name='context', length=4)}}


def prompt_fl(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """PromptFL: clients train rows in front of class names, the server averages.

      p(c | x) = softmax_c(scale cos(f(x), t([P, name_c]))),
      P <- sum_k w_k P_k

  Guo et al. 2022, arXiv 2208.11625: CoOp (arXiv 2109.01134) with federated
  averaging; both towers are frozen, and a client sends P D numbers. In the
  paper P = 16 rows, SGD with the rate 1e-3, one to five local epochs.

  Raises:
    Error: from `init`, an adapter without a context.

  >>> from jax import numpy as jnp
  >>> method = prompt_fl(None, local.optimizer('sgd'))
  >>> method.init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: prompt_fl trains a context: adapter.name=context.
  """
  has_context = lambda params: (
    isinstance(params, dict) and isinstance(params.get('scores'), Context)
  )
  inner = parts.pop('scope', None) or scopes.everything()
  scope = only(
    'prompt_fl', inner, has_context, 'trains a context: adapter.name=context.'
  )
  return compose(local.sgd(loss, optimizer), scope=scope, **parts)
