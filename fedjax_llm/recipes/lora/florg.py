"""FLoRG: the mean of Gram matrices, with its factor turned onto the last one.

arXiv 2602.17095 (2026).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, local, tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.weights import by_weight, counted, equal
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Gram
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Loss,
  Traits,
)

# What the config of each method changes.
NEEDS = {
  'florg': dict(adapter=dict(name='florg', rank=4)),
}


def florg(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  align: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLoRG: the mean of Gram matrices, with its factor turned onto the last one.

      client:  trains g of  W + s p g' g q,
      server:  g~' g~ = the best of rank R of mean_k g_k' g_k,
               g <- Z g~,   Z = argmin over rotations ||Z g~ - g||_F

  arXiv 2602.17095 (2026), on the adapter `florg`. Settings as in `gram_mean`;
  clients count the same unless `weighted`. The server sends R rows, as it
  receives: what the mean has beyond rank R is lost (a rectangular Z could not
  keep the Gram matrix).

  >>> from fedjax_llm import local
  >>> method = florg(None, local.optimizer('adamw'))
  >>> method.init(jax.random.key(0), {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: florg trains Gram factors: adapter.name=florg.
  """
  refuse('florg', 'aggregator', parts)
  rule = gram_mean(weighted=weighted, align=align)
  return compose(local.sgd(loss, optimizer), aggregator=rule, **parts)


def gram_mean(*, weighted: bool = False, align: bool = True) -> Aggregator:
  """Returns the rule on `Gram` nodes; other leaves get the weighted mean.

      [sqrt(w_1) g_1; ...; sqrt(w_K) g_K] = U S V',   g~ = S_R V_R',
      U_z S_z V_z' = g g~',   Z = U_z V_z',   g <- Z g~

  The Gram matrix is not formed: the stack [K R, k] has its spectrum. A square Z
  leaves it as it is.

  Args:
    weighted: by the clients' weights; False, every client the same.
    align: without it Z is the identity.

  Raises:
    Error: from `init`, parameters without `Gram` nodes.

  >>> from fedjax_llm.types import Masks, Uploads
  >>> node = lambda *g: Gram(jnp.float32(g), None, None, None)
  >>> sent = Uploads(node([[3.0, 0.0]], [[1.0, 0.0]]), node(
  ...   [[1.0, 0.0]], [[1.0, 0.0]]), None, jnp.ones(2), jnp.ones(2, bool))
  >>> rule, server = gram_mean(), node([1.0, 0.0])
  >>> new = rule.aggregate(sent, (), server, None)[0].assign
  >>> (new.g ** 2).round().tolist()  # (4^2 + 2^2) / 2
  [[10.0, 0.0]]
  """
  weights = by_weight if weighted else equal
  is_node = lambda x: isinstance(x, Gram)
  is_leaf = lambda x: x is None or is_node(x)
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def init(params, key):
    del key
    if not any(map(is_node, jax.tree.leaves(params, is_leaf=is_node))):
      raise Error('florg trains Gram factors: adapter.name=florg.')
    return ()

  def aggregate(uploads, state, params, key):
    del key
    weight = tree.normalise(weights(uploads))
    some = jnp.any(counted(uploads))
    mean = tree.weighted_mean(uploads.update, weight)

    def delta(x, change):
      return Gram(None, None, None, None) if is_node(x) else change

    def assign(x, start, change):
      if not is_node(x):
        return None
      each = start.g.astype(jnp.float32) + change.g
      root = jnp.sqrt(weight).reshape(-1, *[1] * (each.ndim - 1))
      rows = jnp.moveaxis(each * root, 0, -3)
      rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])  # [..., K R, k]
      rank = x.g.shape[-2]
      _, s, v = linalg.svd(rows)
      new = s[..., :rank, None] * v[..., :rank, :]
      if align:
        u, _, w = linalg.svd(low_rank.dot(x.g, t(new)))
        new = low_rank.dot(low_rank.dot(u, w), new)
      new = jnp.where(some, new, x.g).astype(x.g.dtype)
      return Gram(new, None, None, None)

    return Aggregate(
      jax.tree.map(delta, params, mean, is_leaf=is_leaf),
      jax.tree.map(
        assign, params, uploads.start, uploads.update, is_leaf=is_leaf
      ),
    ), state

  return Aggregator(
    init, aggregate, Traits(changes_basis=True), weights=weights
  )
