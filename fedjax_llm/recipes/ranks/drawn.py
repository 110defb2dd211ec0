"""Fed-PLoRA and FSLoRA: clients draw the ranks that they train.

arXiv 2602.16936 (2026) and arXiv 2501.19389 (2025).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import RANKS, compose, refuse, with_rule
from fedjax_llm.scopes.ranks import rank_of
from fedjax_llm.types import FederatedAlgorithm, LocalUpdate, Loss

# What the config of each method changes.
NEEDS = {
  'fed_plora': RANKS,
  'fslora': RANKS,
}


def fed_plora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-PLoRA: a client trains some of R rank-one modules, and holds them all.

      client:  W0 + s sum_j a[:, j] b[j], trains r_k modules j drawn at random
      server:  module j <- mean over the clients that trained it, or as it was

  arXiv 2602.16936 (2026). Inside a module the factors are averaged each by
  itself. The draw is one for all weights of a client and a round
  (`scopes.drawn`), which the paper leaves open; clients count the same unless
  `weighted`. With r_k = R it is FedIT.

  >>> from fedjax_llm import local
  >>> fed_plora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_plora brings its own aggregator: leave the ...
  """
  rule = aggregators.masked_mean('mask', weighted=weighted)
  parts = {'scope': scopes.drawn(), **parts}
  return with_rule('fed_plora', rule, loss, optimizer, parts)


def fslora(
  loss: Loss,
  optimizer: LocalOptimizer,
  **parts: Any,
) -> FederatedAlgorithm:
  """FSLoRA: a client trains a random sketch of the factors, scaled up.

      client:  W0 + s (R / r_k) sum_{j in I_k} a[:, j] b[j],  |I_k| = r_k drawn,
      server:  a <- a + 1/K sum_k (change of a's columns I_k), b likewise

  arXiv 2501.19389 (2025). The sketch is unbiased: the mean over draws of
  R / r_k times the projector on I_k is the identity. The sum is over the whole
  cohort, not over the holders of a column. The authors' code never applies the
  sketch, and draws different sets for a and b; here one set is drawn for all
  weights of a client and a round (`scopes.drawn`). With r_k = R it is FedIT
  where clients count the same.

  >>> from fedjax_llm import local
  >>> fslora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fslora brings its own aggregator: leave the ...
  """
  refuse('fslora', 'aggregator', parts)
  return compose(
    scaled_up(local.sgd(loss, optimizer)),
    aggregator=aggregators.uniform_mean(),
    **{'scope': scopes.drawn(hold=False), **parts},
  )


def scaled_up(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner` on factors whose scale is multiplied by R / r_k.

  r_k is the rank of the client's profile.

  >>> from fedjax_llm.types import ClientOutput, Context
  >>> seen = lambda base, start, *rest: ClientOutput(start.scale, None)
  >>> update = scaled_up(LocalUpdate(lambda p: (), seen))
  >>> node = LowRank(jnp.ones((5, 4)), jnp.ones((4, 3)), jnp.float32(0.5))
  >>> out = update.run(None, node, (), None, None, Context(
  ...   profile=jnp.int32(1)))
  >>> float(out.update)  # 0.5 * 4
  2.0
  """
  is_node = lambda x: isinstance(x, LowRank)

  def run(base, start, state, batches, masks, context):
    rank = rank_of(context.profile)

    def node(x):
      if not is_node(x):
        return x
      factor = x.a.shape[-1] / jnp.clip(rank, 1, x.a.shape[-1])
      return x._replace(scale=x.scale * factor.astype(x.scale.dtype))

    start = jax.tree.map(node, start, is_leaf=is_node)
    return inner.run(base, start, state, batches, masks, context)

  return LocalUpdate(inner.init, run)
