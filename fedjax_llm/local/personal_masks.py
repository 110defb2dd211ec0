"""Local training of the entries that a client found to matter to it."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.importance import saliency
from fedjax_llm.local.phases import Counted
from fedjax_llm.types import (
  ClientOutput,
  Dual,
  Error,
  LocalUpdate,
  Loss,
  Masks,
)


def pruned(
  inner: LocalUpdate,
  loss: Loss,
  *,
  density: float,
  per: str = 'tree',
) -> LocalUpdate:
  """A client's first round finds the entries it goes on with, by importance.

      I = |p * dL/dp|   after S steps on all entries,
      m_k = 1 on the `density` of largest I, 0 elsewhere

  with the gradient of the token mean over all S batches (PerFIT, Zhang et al.
  2024, arXiv 2402.16919). Then the client trains m_k * p, in this round and in
  all that follow; the others are zero for it. Parameters are `Dual`: those that
  everybody trains, and as the personal part the pattern m_k (int8, ones at
  first). One program serves searching and settled clients, so every round costs
  twice the local steps.

  Args:
    inner: trains the shared part.
    loss: on `Dual` parameters, gives the gradient.
    density: the share of entries that stay.
    per: 'tree' compares all entries of a client, 'leaf' those of each leaf.

  Raises:
    Error: a density not above 0 or above 1, another `per`.

  >>> from fedjax_llm.types import LossSum
  >>> loss = lambda base, p, x, key: LossSum(
  ...   x * jnp.sum(p.shared['w']), *jnp.float32([1, 0]))
  >>> w, true = jnp.array([1.0, -9.0]), jnp.bool_(True)
  >>> start = Dual({'w': w}, {'w': jnp.ones(2, jnp.int8)})
  >>> masks = Masks(*[Dual({'w': true}, {'w': true})] * 2)
  >>> def still(base, start, state, batches, masks, round, key):
  ...   return ClientOutput(Dual({'w': 0 * w}, {'w': None}), masks, (), {})
  >>> update = pruned(LocalUpdate(lambda p: (), still), loss, density=0.5)
  >>> out = update.run(None, start, update.init(start), jnp.ones(1), masks, 0,
  ...                  jax.random.key(0))
  >>> (start.personal['w'] + out.update.personal['w']).tolist()
  [0, 1]
  """
  if not 0 < density <= 1:
    raise Error(f'pruned: density={density} must be above 0 and at most 1.')
  if per not in ('tree', 'leaf'):
    raise Error(f"pruned: per={per!r} must be 'tree' or 'leaf'.")

  def init(trainable: Dual) -> Counted:
    return Counted(jnp.int32(0), inner.init(trainable))

  def search(base, start, state, batches, masks, round, key):
    out = inner.run(base, start, state.inner, batches, masks, round, key)
    trained = tree.add(tree.like(start, masks.trained), out.update)
    score = saliency(loss, base, start, trained, batches, key)
    return _largest(score.shared, density, per)

  def run(base, start, state, batches, masks, round, key) -> ClientOutput:
    wide = Masks(*(m._replace(personal=_nothing(m.personal)) for m in masks))
    found = search(base, start, state, batches, wide, round, key)
    kept = tree.map_present(
      lambda old, new: jnp.where(state.rounds > 0, old > 0, new),
      start.personal,
      found,
    )
    narrow = Masks(
      *(
        m._replace(shared=tree.map_present(jnp.logical_and, m.shared, kept))
        for m in wide
      )
    )
    begin = tree.apply_mask(start, narrow.held)
    out = inner.run(base, begin, state.inner, batches, narrow, round, key)
    pattern = tree.map_present(
      lambda new, old: new.astype(old.dtype) - old, kept, start.personal
    )
    whole = Masks(
      *(n._replace(personal=m.personal) for n, m in zip(out.masks, masks))
    )
    return ClientOutput(
      update=out.update._replace(personal=pattern),
      masks=whole,
      state=Counted(state.rounds + 1, out.state),
      metrics=out.metrics,
    )

  return LocalUpdate(init, run)


def _nothing(x: Any) -> Any:
  return jax.tree.map(lambda _: None, x)


def _largest(score: Any, density: float, per: str) -> Any:
  """True on the `density` of all entries whose score is largest."""
  share = lambda size: max(1, round(density * size))
  if per == 'leaf':
    return jax.tree.map(lambda x: tree.largest(x, share(x.size)), score)
  return tree.largest(score, share(sum(x.size for x in jax.tree.leaves(score))))
