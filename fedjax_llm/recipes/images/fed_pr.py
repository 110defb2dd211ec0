"""FedPR: visual prompts that move in the null space of the common prompt.

Feng et al. 2023, arXiv 2303.16181.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Context, Visual
from fedjax_llm.recipes.composing import compose
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import Error, FederatedAlgorithm, LocalUpdate, Loss

# What the config of each method changes.
NEEDS = {'fed_pr': {**IMAGES, 'adapter': dict(name='visual_prompt', length=4)}}


def fed_pr(
  loss: Loss, optimizer: LocalOptimizer, *, ratio: float = 0.8, **parts: Any
) -> FederatedAlgorithm:
  """FedPR: steps of a prompt, projected on a null space of the common one.

      V S V' = G' G,   the eigenvalues falling,   V2 = the last columns of V,
      P <- P + Delta V2 V2' / ||V2 V2'||,   G <- sum_k w_k P_k

  Feng et al. 2023, arXiv 2303.16181: Delta is the step of the local optimizer
  (Adam in the paper), G [P, D] the prompt that the round started from; the
  local steps then hardly change what the common prompt spans. The first round
  projects nothing, as in the authors' code. V2 leaves out D (1 - ratio)
  directions, at most the P that G spans; beyond those the code's choice among
  the null directions is arbitrary, and here all of them stay. The paper
  reconstructs MRI scans with a Swin transformer; here the prompt stands among
  the patches of an image tower, or in front of class names
  (`adapter.name=context`).

  Args:
    ratio: the part of the directions that a step may use.

  Raises:
    Error: a ratio that is not above 0 and at most 1; from `init`, an adapter
      without a prompt.

  >>> method = fed_pr(None, local.optimizer('adam'), ratio=0.5)
  >>> method.init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_pr needs adapter.name=visual_prompt or context.
  """
  if not 0 < ratio <= 1:
    raise Error(
      f'algorithm.ratio is {ratio}; it must be above 0 and at most 1.'
    )

  def run(base, start, state, batches, masks, context):
    away, size = spanned(start['scores'].rows, ratio)

    def update(grads, moments, now, step):
      steps, moments = optimizer.update(grads, moments, now, step)
      rows = steps['scores'].rows
      kept = (rows - rows @ away @ away.T) / size
      rows = jnp.where(context.round > 0, kept, rows).astype(rows.dtype)
      node = steps['scores']._replace(rows=rows)
      return {**steps, 'scores': node}, moments

    one = local.sgd(loss, optimizer._replace(update=update))
    return one.run(base, start, state, batches, masks, context)

  algorithm = compose(LocalUpdate(lambda trainable: (), run), **parts)

  def init(key, params):
    kinds = (Visual, Context)
    node_of('fed_pr', params, kinds, 'visual_prompt or context')
    return algorithm.init(key, params)

  return algorithm._replace(init=init)


def spanned(rows: jax.Array, ratio: float) -> tuple[jax.Array, float]:
  """Returns V1 [D, d], the directions that are left out, and ||I - V1 V1'||.

  They are the first d right singular vectors of rows [P, D], with d the floor
  of D (1 - ratio), at most P.

  >>> away, size = spanned(jnp.array([[0.0, 2.0, 0.0]]), 0.6)
  >>> jnp.abs(away).round(2).tolist(), round(size, 3)  # sqrt(3 - 1)
  ([[0.0], [1.0], [0.0]], 1.414)
  """
  places, width = rows.shape
  number = min(math.floor(width * (1 - ratio) + 1e-9), places)
  directions = linalg.svd(rows.astype(jnp.float32))[2]
  return directions[:number].T, math.sqrt(width - number)
