"""FedPGP on a dual encoder: a common context with an own low-rank change.

Cui et al. 2024, arXiv 2405.09771.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.local import LocalOptimizer, class_names, distillation
from fedjax_llm.nodes import Context
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.recipes.prompts.fed_pgp import (
  Own,
  changed,
  checked,
  with_own,
)
from fedjax_llm.types import (
  FederatedAlgorithm,
  Key,
  Loss,
  LossSum,
  Params,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_pgp_clip': {
    **IMAGES,
    'adapter': dict(name='context', length=4),
    'algorithm': dict(rank=2),
  },
}


def fed_pgp_clip(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  rank: int = 8,
  mu: float = 1.0,
  temperature: float = 0.5,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedPGP: a common context of class names with a client's low-rank change.

      P_k = sigma + U_k V_k,
      L = CE(P_k) + mu mean_c InfoNCE(near = cos(t(name_c), t([sigma, name_c])),
                                      far = cos(t([sigma, name_c]),
                                                t([P_k, name_c]))),
      sigma <- sum_k w_k sigma_k,   U_k and V_k stay with client k

  Cui et al. 2024, arXiv 2405.09771, on the features of class names as in the
  paper: t(name_c) are those of the zero-shot classifier. `fed_pgp` is the same
  objective for texts. U_k, V_k and sigma start with the same spread, as in the
  authors' code. In the paper 16 rows, rank 8, SGD with 1e-3.

  Args:
    rank: columns of U_k.
    mu: weight of the contrastive term.
    temperature: of InfoNCE.

  Raises:
    Error: a scope in `parts`, a rank below 1, a temperature that is not above
      0, a loss that is not of images and names of classes; from `init`, an
      adapter without a context.

  >>> from fedjax_llm import local
  >>> method = fed_pgp_clip(None, local.optimizer('sgd'), rank=2)
  >>> params = {'scores': Context(jnp.ones((3, 8)))}
  >>> kept = method.init_client(method.init(jax.random.key(0), params).params)
  >>> kept.private['own'].left.shape, kept.private['own'].right.shape
  ((3, 2), (2, 8))
  """
  checked('fed_pgp_clip', rank, temperature, parts)
  seen = class_names.needed('fed_pgp_clip', loss)

  def wrap(key: Key, params: Params) -> Params:
    rows = node_of('fed_pgp_clip', params, Context, 'context').rows
    names = jax.random.split(jax.random.fold_in(key, 1))
    draw = lambda key, *shape: jnp.std(rows) * jax.random.normal(key, shape)
    own = Own(
      draw(names[0], rows.shape[0], rank), draw(names[1], rank, rows.shape[1])
    )
    return {'common': params, 'own': own}

  def total(base, params, batch, key) -> LossSum:
    mine = personal(params)
    sums = loss(base, mine, batch, key)
    if known(mu) and mu == 0:
      return sums
    towers = seen(base, mine, batch)
    both = jnp.stack([params['common']['scores'].rows, mine['scores'].rows])
    common, own = jax.vmap(towers.texts)(both)  # [C, E]
    near = distillation.cosine(towers.texts(None), common)
    far = distillation.cosine(common, own)
    terms = distillation.contrast(near, far[:, None], temperature)
    return sums._replace(total=sums.total + mu * sums.count * jnp.mean(terms))

  return with_own(total, optimizer, wrap, personal, parts)


def personal(wrapped: Params) -> Params:
  """Returns the adapter with the context sigma + U V.

  >>> wrapped = {'common': {'scores': Context(jnp.ones((1, 2)))},
  ...            'own': Own(jnp.ones((1, 1)), jnp.array([[1.0, 2.0]]))}
  >>> personal(wrapped)['scores'].rows.tolist()
  [[2.0, 3.0]]
  """
  rows = changed(wrapped['common']['scores'].rows, wrapped['own'])
  return {**wrapped['common'], 'scores': Context(rows)}
