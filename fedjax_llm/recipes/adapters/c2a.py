"""C2A: one network makes the adapters of each client.

Kim et al. 2023, "Client-Customized Adaptation for Parameter-Efficient Federated
Learning", Findings of ACL.

    y' = y + gelu(y D + b) U + c,   D and U two shapes of one vector w_l
    w_l = (classes(h) + layer_l + text(z_l)) H,   rows of H of norm one
    H, classes, layer, text, b, c <- sum_k n_k (...)_k / sum_k n_k

where h is the histogram of the labels of the batch, and z_l the mean over its
texts of the direction of the mean state (`nodes.Customised`). The equations and
the defaults (R 16, E 8, rank of H 32) are as in the authors' program.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes.customised import Customised
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import CLASSES, only
from fedjax_llm.types import Error, FederatedAlgorithm, Loss, Params

# What the config of each method changes. Of two texts, the histogram of a batch
# would be their labels, and training would learn nothing else.
NEEDS = {
  'c2a': {
    **CLASSES,
    'cohort': dict(batch_size=16),
    'adapter': dict(
      name='c2a', size=4, modules_to_save=('pooler', 'classifier')
    ),
  },
}


def c2a(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """C2A: clients train a network that makes their adapters.

  Kim et al. 2023, Findings of ACL. A step reads the labels of its own batch, as
  in the authors' program; the model is served and evaluated with a uniform
  distribution of the classes. The texts of a batch share one adapter, so a
  prediction depends on the texts beside it, in evaluation too. The program
  averages states over padding, this method over tokens. Small batches let the
  histogram tell their labels: use the paper's 64 texts, or many.

  Args:
    loss: of `task.name=classification`.
    optimizer: of the clients.
    parts: of `fed_avg`.

  Raises:
    Error: privacy of examples; from `init`, an adapter that is not `c2a`; from
      the round, batches without labels.

  >>> from fedjax_llm import local
  >>> c2a(None, local.optimizer('sgd')).init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: c2a trains a network of adapters: adapter.name=c2a.
  """
  if optimizer.gradient is not None:
    raise Error(
      'c2a reads the labels of a whole batch, and privacy.mechanism=examples '
      'takes each text alone, whose histogram is its label: use another method '
      'or another mechanism.'
    )
  inner = parts.pop('scope', None) or scopes.everything()
  hint = 'trains a network of adapters: adapter.name=c2a.'
  scope = only('c2a', inner, _customised, hint)
  return fed_avg(informed(loss), optimizer, scope=scope, **parts)


def _customised(params: Params) -> bool:
  node = params.get('generator') if isinstance(params, dict) else None
  return isinstance(node, Customised)


def informed(loss: Loss) -> Loss:
  """Returns the loss of a network that knows the classes of the batch.

  Labels are numbers [B], -1 for none, or distributions [B, classes]. Without
  one, the distribution stays as it is.

  Raises:
    Error: from the loss, batches without labels.
  """

  def of_batch(base, params, batch, key):
    label = getattr(batch, 'label', None)
    if label is None:
      raise Error('c2a reads labels of texts: set task.name=classification.')
    node = params['generator']
    labels = distribution(label, node.labels)
    known = {**params, 'generator': node._replace(labels=labels)}
    return loss(base, known, batch, key)

  return of_batch


def distribution(label: Any, otherwise: Any) -> Any:
  """Returns the share of each class in labels, [Y].

  >>> distribution(jnp.array([2, -1, 0, 2, 2]), jnp.full(3, 1 / 3)).tolist()
  [0.25, 0.0, 0.75]
  """
  label = jnp.asarray(label)
  classes = jnp.arange(otherwise.shape[-1])
  soft = label if label.ndim == 2 else label[:, None] == classes
  count = soft.astype(jnp.float32).sum(0)
  total = count.sum()
  return jnp.where(total > 0, count / jnp.maximum(total, 1e-9), otherwise)
