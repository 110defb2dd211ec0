"""FedCLIP: clients train an attention to the features of images.

Lu et al. 2023, arXiv 2302.13485.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import Reweighted, scores
from fedjax_llm.recipes.composing import compose
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import FederatedAlgorithm, Loss, LossSum

# What the config of each method changes.
NEEDS = {'fed_clip': {**IMAGES, 'adapter': dict(name='feature_attention')}}


def fed_clip(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedCLIP: an attention to image features, trained by CLIP's own loss.

      f'(x) = softmax(tanh(f(x) W1 + b1) W2 + b2) * f(x),
      L = 1/2 sum_i [CE_j(s cos(f'_i, t_j), i) + CE_j(s cos(f'_j, t_i), i)]
      over the images i of a batch, t_i the features of the name of its class;
      W, b <- sum_k w_k (W_k, b_k)

  Lu et al. 2023, arXiv 2302.13485: a client sends 2 E (E + 1) numbers. The loss
  is contrastive within a batch, so two images of one class are each other's
  negatives, as in the authors' code. Accuracies are those of the classifier by
  names, scale cos(f', t).

  Raises:
    Error: a loss that is not of images and names of classes; from `init`, an
      adapter without an attention to features.

  >>> fed_clip(lambda *batch: None, local.optimizer('sgd'))
  Traceback (most recent call last):
  fedjax_llm.types.Error: fed_clip compares images with names of classes in a \
loss of its own: it needs task.name=zero_shot, without micro batches.
  """
  seen = class_names.needed('fed_clip', loss)

  def total(base, params, batch, key) -> LossSum:
    del key
    node, towers = params['scores'], seen(base, params, batch)
    names = towers.texts(None)
    pooled = node.weighted(towers.images(None).pooled)
    hits = class_names.summed(scores.compared(towers, pooled, names), batch)
    real = class_names.known_rows(batch)
    nats = matched(towers, pooled, names[jnp.maximum(batch.label, 0)], real)
    return LossSum(jnp.sum(nats), hits.count, hits.correct)

  algorithm = compose(local.sgd(total, optimizer), **parts)

  def init(key, params):
    node_of('fed_clip', params, Reweighted, 'feature_attention')
    return algorithm.init(key, params)

  return algorithm._replace(init=init)


def matched(towers: Any, pooled: Any, texts: Any, real: Any) -> jax.Array:
  """Returns the symmetric contrastive loss of each pair, [B].

  `pooled` [B, E] are features of images, `texts` [B, E] unit features of their
  captions; rows that are not `real` belong to no pair.

  >>> towers = scores.Towers(None, None, 1.0)
  >>> pair = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  >>> matched(towers, pair, pair, jnp.array([True, False])).tolist()
  [0.0, 0.0]
  """
  logits = scores.compared(towers, jnp.where(real[:, None], pooled, 0.0), texts)
  logits = jnp.where(real[:, None] & real, logits, -1e9)
  own = jnp.diagonal(logits)
  both = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)
  return jnp.where(real, both / 2 - own, 0.0)
