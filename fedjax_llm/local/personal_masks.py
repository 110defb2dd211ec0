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
    found = search(base, start, state, batches, wide, context)
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
  """True on the `density` of all entries whose score is largest."""
  leaves, treedef = jax.tree.flatten(score)

  def best(flat):
    num = max(1, round(density * flat.size))
    _, index = jax.lax.top_k(flat, num)
    return jnp.zeros(flat.size, bool).at[index].set(True)

  if per == 'leaf':
    kept = [best(x.ravel()).reshape(x.shape) for x in leaves]
  else:
    flat, kept, at = best(jnp.concatenate([x.ravel() for x in leaves])), [], 0
    for x in leaves:
      kept.append(flat[at : at + x.size].reshape(x.shape))
      at += x.size
  return jax.tree.unflatten(treedef, kept)
