"""FedBF: clients train biases alone (FedPEFT's choice).

Zhang et al. 2023, Findings of ACL, "FedPETuning"; Sun et al. 2022, arXiv
2210.01708.
"""

import re
from typing import Any

import jax

from fedjax_llm import scopes, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import CLASSES, refuse
from fedjax_llm.scopes.labels import compiled
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Frozen,
  Loss,
  Scope,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  'fed_bf': {
    **CLASSES,
    'adapter': dict(name='bitfit', modules_to_save=('pooler', 'classifier')),
  },
}


def fed_bf(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  also: str = '^(pooler|classifier|lm_head)/',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedBF: clients train the biases and the head, the server averages them.

      b <- sum_k w_k b_k   for every bias b of the model; weights stay

  The bias baseline of Zhang et al. 2023, "FedPETuning", and the choice of Sun
  et al. 2022 (FedPEFT, arXiv 2210.01708), on BitFit (arXiv 2106.10199): about a
  thousandth of the parameters travels. Whatever else the adapter holds is
  frozen, so a method beside it differs by its scope alone.

  Args:
    also: a pattern on the names of further leaves that are trained, the head of
      a classifier; '' for none.

  Raises:
    Error: a scope in `parts`; from `init`, an adapter without a bias.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> fed_bf(None, local.optimizer('sgd')).init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_bf trains biases: adapter.name=bitfit.
  """
  refuse('fed_bf', 'scope', parts)
  return fed_avg(loss, optimizer, scope=_biases(also), **parts)


def _biases(also: str) -> Scope:
  inner = scopes.everything()
  bias = re.compile(r'(^|/)bias(/value)?$')
  head = compiled(also) if also else None

  def labels(params):
    names = scopes.leaf_paths(params)
    if not any(map(bias.search, names)):
      raise Error('fed_bf trains biases: adapter.name=bitfit.')
    default, treedef = jax.tree.flatten(inner.labels(params))

    def chosen(name, label):
      trained = bias.search(name) or (head and head.search(name))
      return label if label is not Shared or trained else Frozen

    return jax.tree.unflatten(treedef, map(chosen, names, default))

  def mask(start, state, context):
    del state, context
    return tree.full_masks(start, labels(start))

  return Scope(labels, mask)
