"""FedRS: a softmax that holds back the classes that a client lacks.

Li and Zhan 2021, KDD, doi 10.1145/3447548.3467254.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.observed import Observed
from fedjax_llm.recipes.composing import CLASSES, compose
from fedjax_llm.recipes.images.scored import in_round
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Loss,
  Model,
  Params,
  known,
)

# What the config of each method changes: a head that is trained whole.
NEEDS = {
  'fed_rs': dict(
    **CLASSES,
    adapter=dict(
      name='lora',
      rank=4,
      targets=('q_proj', 'v_proj'),
      modules_to_save=('pooler', 'classifier'),
    ),
  ),
}


def fed_rs(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  alpha: float = 0.5,
  by_counts: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRS: a softmax that holds back the classes that a client lacks.

      p(c | x) = exp(a_c z_c) / sum_j exp(a_j z_j),   z = logits of the model
      a_c = 1 for a class of the client, alpha for any other

  in local training only; the server averages, and the model is served with the
  plain softmax. The weights of a class that a client lacks get no gradient that
  pulls, only one that pushes, which is thus alpha times as long. Li and Zhan
  2021 (KDD), restricted softmax. With `by_counts` it is that of the authors'
  program, a_c = alpha + (1 - alpha) n_c / max_j n_j of n_c examples; both agree
  where a client has as many examples of each of its classes. With alpha = 1 it
  is FedAvg.

  The classes of a client are those of its examples of the round: rows of
  padding and examples without a label count for none. Logits are scaled with
  their bias; the paper's classifier has none.

  Args:
    loss: of a classifier (`local.classification`).
    model: hidden states and a classifier's head.
    alpha: from 0 to 1; 0.5 is the paper's choice.
    by_counts: a_c by numbers of examples.

  Raises:
    Error: alpha out of range; from the round, another loss, a loss in micro-
      batches, or examples without classes.

  >>> sgd = local.optimizer('sgd')
  >>> fed_rs(None, sgd, model=None, alpha=2.0)
  Traceback (most recent call last):
  fedjax_llm.types.Error: fed_rs: alpha is 2.0: it must be from 0 to 1.
  """
  if known(alpha) and not 0 <= alpha <= 1:
    raise Error(f'fed_rs: alpha is {alpha}: it must be from 0 to 1.')

  def build(start: Params, batches: Any, context: Any) -> Loss:
    del start, context
    if not isinstance(loss, Observed) or loss.build is None:
      raise Error(
        'fed_rs changes the softmax of a classifier: it needs task.name='
        'classification or image_classification, without memory.micro_batch '
        'and without chosen layers.'
      )
    return local.on_model(loss, restricted(model, batches, alpha, by_counts))

  return compose(in_round(build, optimizer), **parts)


def restricted(
  model: Model, batches: Any, alpha: float, by_counts: bool = False
) -> Model:
  """Returns a classifier whose logits are a_c z_c, for a client's batches.

  Args:
    model: the classifier.
    batches: of texts or images with labels [S, B].
    alpha, by_counts: see `fed_rs`.

  Raises:
    Error: batches without one class an example.

  >>> from fedjax_llm.types import Images
  >>> ones = Model(None, lambda base, params, hidden: jnp.ones((1, 3)))
  >>> mine = Images(None, jnp.array([[1, -1]]), jnp.array([[True, True]]))
  >>> restricted(ones, mine, 0.5).logits(None, {}, None).tolist()
  [[0.5, 1.0, 0.5]]
  """
  label = getattr(batches, 'label', None)
  if label is None or jnp.ndim(label) != 2:
    raise Error(
      'fed_rs: these examples have no class each: set task.name to '
      'classification or image_classification.'
    )
  present = getattr(batches, 'present', None)
  here = batches.segments[..., 0] if present is None else present
  real = (jnp.asarray(label) >= 0) & (jnp.asarray(here) > 0)

  def logits(base: Any, params: Params, hidden: jax.Array) -> jax.Array:
    plain = model.logits(base, params, hidden)
    classes = plain.shape[-1]
    place = jnp.where(real, label, classes).reshape(-1)  # dropped beyond
    counts = jnp.zeros(classes).at[place].add(1.0, mode='drop')
    share = counts / jnp.maximum(jnp.max(counts), 1.0)
    share = share if by_counts else counts > 0
    return plain * (alpha + (1 - alpha) * share)

  return Model(model.hidden, logits)
