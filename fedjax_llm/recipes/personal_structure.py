"""Personalised federated LoRA: every client its own part of a common space."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, tree, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import dual
from fedjax_llm.recipes.homogeneous import refuse
from fedjax_llm.types import (
  Dual,
  FederatedAlgorithm,
  Loss,
  Masks,
  Scope,
  Shared,
)


def perfit(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  expansion: float = 2.0,
  per: str = 'tree',
  **parts: Any,
) -> FederatedAlgorithm:
  """PerFIT: an expanded adapter, of which every client keeps its own entries.

      m_k = the 1 / c of the entries with the largest |p dL/dp|,
      P_k = local steps on m_k * P,
      P  <- sum_k w_k m_k P_k / sum_k w_k m_k  (as it was where nobody trains)

  Zhang et al. 2024, arXiv 2402.16919. The adapter's rank is the expanded one, c
  times that of a client. A client searches in its first round, as in
  `local.pruned`, is served m_k * P, and sends its pattern, a bit an entry, with
  what it trained. What the paper leaves open here: the search takes one pass
  over a round's batches and prunes once.

  Args:
    expansion: c, at least 1; 1 is FedIT.
    per: see `local.pruned`.

  >>> method = perfit(None, local.optimizer('adamw'), expansion=2.0)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(4)}).params
  >>> method.init_client(start).private.personal['w'].dtype  # a pattern
  dtype('int8')
  """
  refuse('perfit', 'scope', parts)
  inner = scopes.everything()
  common = local.viewed(loss, dual.shared)
  update = local.pruned(
    local.sgd(common, optimizer),
    common,
    density=1 / max(expansion, 1e-9),
    per=per,
  )

  def split(key, params):
    entries = tree.select(params, inner.labels(params), Shared)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.int8), entries)
    return Dual(params, ones)

  def serve(params, seen):
    return tree.apply_mask(params.shared, _pattern(params))

  mine = {
    'aggregator': aggregators.masked_mean('mask'),
    'upload': uploads.identity(bitmap=True),
  }
  return dual.compose(
    update, serve, {**mine, **parts, 'scope': _patterned(inner)}, split
  )


def _pattern(params: Dual) -> Any:
  return jax.tree.map(lambda x: x > 0, params.personal)


def _patterned(inner: Scope) -> Scope:
  """A client holds the entries of its pattern, and keeps the pattern."""

  def labels(params):
    own = jax.tree.map(lambda _: Shared, params.personal)
    return Dual(inner.labels(params.shared), own)

  def mask(start, state, context):
    common = inner.mask(start.shared, state, context)
    pattern = _pattern(start)
    true = jax.tree.map(lambda _: jnp.bool_(True), pattern)
    narrow = lambda m: Dual(tree.map_present(jnp.logical_and, m, pattern), true)
    return Masks(narrow(common.held), narrow(common.trained))

  return Scope(labels, mask)
