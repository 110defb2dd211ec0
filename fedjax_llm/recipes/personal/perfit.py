"""PerFIT: an expanded adapter; every client trains its own entries of it.

Zhang et al. 2024, arXiv 2402.16919.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.importance import saliency
from fedjax_llm.local.phases import Counted
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import dual
from fedjax_llm.recipes.composing import (
  refuse,
)
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Scope,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  # The rank is the expanded one, twice that of a client.
  'perfit': dict(adapter=dict(rank=8)),
}


def perfit(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  expansion: float = 2.0,
  per: str = 'tree',
  **parts: Any,
) -> FederatedAlgorithm:
  """PerFIT: an expanded adapter; every client trains its own entries of it.

      m_k = the 1 / c of the entries with the largest |p dL/dp|,
      P_k = local steps on m_k * P,
      P  <- sum_k w_k m_k P_k / sum_k w_k m_k  (else unchanged)

  Zhang et al. 2024, arXiv 2402.16919. The adapter's rank is the expanded one, c
  times that of a client. A client searches its pattern in its first round
  (`pruned`), is served m_k * P, and sends its pattern, a bit an entry, with its
  update. The paper does not fix the length of the search: here it takes one
  pass over a round's batches and prunes once.

  Args:
    expansion: c, at least 1; 1 is FedIT.
    per: see `pruned`.

  >>> method = perfit(None, local.optimizer('adamw'), expansion=2.0)
  >>> start = method.init(jax.random.key(0), {'w': jnp.ones(4)}).params
  >>> method.init_client(start).private.personal['w'].dtype  # a pattern
  dtype('int8')
  """
  refuse('perfit', 'scope', parts)
  inner = scopes.everything()
  common = local.viewed(loss, dual.shared)
  update = pruned(
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
  """Returns a scope: clients hold their pattern's entries, keep the pattern."""

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


def pruned(
  inner: LocalUpdate,
  loss: Loss,
  *,
  density: float,
  per: str = 'tree',
) -> LocalUpdate:
  """Returns `inner` on a pattern of entries, chosen in a client's first round.

      I = |p * dL/dp|   after S steps on all entries,
      m_k = 1 on the `density` of largest I, 0 elsewhere

  with the gradient of the token mean over all S batches (PerFIT, Zhang et al.
  2024, arXiv 2402.16919). The client trains m_k * p, in this and all later
  rounds; the other entries are zero for it. Parameters are `Dual`: the shared
  part that all clients train, and as the personal part the pattern m_k (int8,
  ones at first). One program serves clients with and without a pattern, so
  every round costs twice the local steps.

  Args:
    inner: trains the shared part.
    loss: on `Dual` parameters, for the gradient.
    density: the share of entries that stay.
    per: 'tree' compares all entries of a client, 'leaf' those of each leaf.

  Raises:
    Error: a density not above 0 or above 1, another `per`.

  >>> from fedjax_llm.types import Context, LossSum
  >>> loss = lambda base, p, x, key: LossSum(
  ...   x * jnp.sum(p.shared['w']), *jnp.float32([1, 0]))
  >>> w, true = jnp.array([1.0, -9.0]), jnp.bool_(True)
  >>> start = Dual({'w': w}, {'w': jnp.ones(2, jnp.int8)})
  >>> masks = Masks(*[Dual({'w': true}, {'w': true})] * 2)
  >>> def still(base, start, state, batches, masks, context):
  ...   return ClientOutput(Dual({'w': 0 * w}, {'w': None}), masks)
  >>> update = pruned(LocalUpdate(lambda p: (), still), loss, density=0.5)
  >>> out = update.run(None, start, update.init(start), jnp.ones(1), masks,
  ...                  Context(key=jax.random.key(0)))
  >>> out.private.personal['w'].tolist()
  [0, 1]
  """
  if not 0 < density <= 1:
    raise Error(f'pruned: density={density} must be above 0 and at most 1.')
  if per not in ('tree', 'leaf'):
    raise Error(f"pruned: per={per!r} must be 'tree' or 'leaf'.")

  def init(trainable: Dual) -> Counted:
    return Counted(jnp.int32(0), inner.init(trainable))

  def search(base, start, state, batches, masks, context):
    out = inner.run(base, start, state.inner, batches, masks, context)
    trained = tree.add(tree.like(start, masks.trained), out.update)
    score = saliency(loss, base, start, trained, batches, context.key)
    return _largest(score.shared, density, per)

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    wide = Masks(*(m._replace(personal=_nothing(m.personal)) for m in masks))
    chosen = search(base, start, state, batches, wide, context)
    kept = tree.map_present(
      lambda old, new: jnp.where(state.rounds > 0, old > 0, new),
      start.personal,
      chosen,
    )
    narrow = Masks(
      *(
        m._replace(shared=tree.map_present(jnp.logical_and, m.shared, kept))
        for m in wide
      )
    )
    begin = tree.apply_mask(start, narrow.held)
    out = inner.run(base, begin, state.inner, batches, narrow, context)
    pattern = tree.map_present(
      lambda new, old: new.astype(old.dtype), kept, start.personal
    )
    nothing = _nothing(start)
    whole = Masks(
      *(n._replace(personal=m.personal) for n, m in zip(out.masks, masks))
    )
    return out._replace(
      masks=whole,
      state=Counted(state.rounds + 1, out.state),
      private=Dual(nothing.shared, pattern),
    )

  return LocalUpdate(init, run)


def _nothing(x: Any) -> Any:
  return jax.tree.map(lambda _: None, x)


def _largest(score: Any, density: float, per: str) -> Any:
  """Returns True at the share `density` of entries with the largest scores."""
  share = lambda size: max(1, round(density * size))
  if per == 'leaf':
    return jax.tree.map(lambda x: tree.largest(x, share(x.size)), score)
  return tree.largest(score, share(sum(x.size for x in jax.tree.leaves(score))))
