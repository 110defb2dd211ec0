"""FedTPG: a network makes the context from the names of a client's classes.

Qiu et al. 2024, arXiv 2310.06123.
"""

from typing import Any

from fedjax_llm import aggregators
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Generated
from fedjax_llm.recipes.composing import compose
from fedjax_llm.recipes.images.scored import IMAGES, in_round, node_of
from fedjax_llm.types import FederatedAlgorithm, Loss, LossSum

# What the config of each method changes.
NEEDS = {
  'fed_tpg': {**IMAGES, 'adapter': dict(name='generated_context', heads=4)}
}


def fed_tpg(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedTPG: clients with different classes train one prompt generator.

      P_k = g_phi(t(name_c), c in C_k),
      L_k = CE over C_k of scale cos(f(x), t([P_k, name_c])),
      phi <- mean_k phi_k

  Qiu et al. 2024, arXiv 2310.06123: the context is computed from the features
  of the class names by cross-attention, so that the same network serves classes
  that no client has seen. C_k are the classes in the client's batches of the
  round; the mean is unweighted, as in the authors' code. Served are all classes
  of the task. In that code 4 rows, 4 heads, SGD with 3e-3, momentum 0.9, weight
  decay 1e-5 and a cosine schedule over 500 rounds.

  Raises:
    Error: from `init`, an adapter without a generated context.

  >>> from fedjax_llm import local
  >>> method = fed_tpg(None, local.optimizer('sgd'))
  >>> method.init(None, {'w': 1.0})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_tpg needs adapter.name=generated_context.
  """

  def build(start, batches, context) -> Loss:
    del start, context

    def total(base, params, batch, key) -> LossSum:
      node = params['scores']._replace(classes=batches.label)
      return loss(base, {**params, 'scores': node}, batch, key)

    return total

  parts.setdefault('aggregator', aggregators.uniform_mean())
  algorithm = compose(in_round(build, optimizer), **parts)

  def init(key, params):
    node_of('fed_tpg', params, Generated, 'generated_context')
    return algorithm.init(key, params)

  return algorithm._replace(init=init)
