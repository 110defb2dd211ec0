"""LoRA-A2: alternating factors, and only their most important units.

Koo et al. 2025, arXiv 2410.22815.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
)

# What the config of each method changes.
NEEDS = {
  'lora_a2': {},
}


def lora_a2(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  budget: int = 2,
  **parts: Any,
) -> FederatedAlgorithm:
  """LoRA-A2: alternating factors, and only their most important units.

      even t: b <- b + sum_k w_k m_k db_k;   odd t: a <- a + sum_k w_k m_k da_k

  with m_k the client's choice of rank-one units, `budget` a target and layer
  on average (Koo et al. 2025, arXiv 2410.22815). The score and the trial pass
  are those of `selected`; a unit that a client leaves out counts as no change.
  The paper's own learning rate for each factor is left to the optimizer, and
  every client has the same budget. The choice is sent as well, a bit a unit.

  >>> lora_a2(None, local.optimizer('adamw'), budget=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: selected: budget=0 must be at least 1.
  """
  update = selected(local.sgd(loss, optimizer), budget=budget)
  mine = {
    'scope': scopes.alternating('/b$', '/a$'),
    'upload': uploads.identity(bitmap=True),
  }
  return compose(update, **{**mine, **parts})


def selected(inner: LocalUpdate, *, budget: int) -> LocalUpdate:
  """Returns a local update that trains once to score units, then the best ones.

  The score of unit i of a target in a layer is the size of its change,

      ||da[:, i]|| ||b[i]|| + ||a[:, i]|| ||db[i]||

  where one term is zero if rounds take turns between the factors. The units of
  the largest scores stay trainable, `budget` times the number of (target,
  layer) pairs in all, chosen over all of them together: LoRA-A2's adaptive rank
  selection (Koo et al. 2025, arXiv 2410.22815). It costs twice the local steps;
  a client keeps the state of the second pass.

  Raises:
    Error: a budget below one; from the round, no `LowRank` node or a budget
      above the rank.

  >>> from fedjax_llm.types import Context
  >>> def inner(base, start, state, batches, masks, context):
  ...   change = LowRank(jnp.array([[0.1, 0.9]]), jnp.zeros((2, 1)), None)
  ...   return ClientOutput({'q': change}, masks)
  >>> start = {'q': LowRank(jnp.ones((1, 2)), jnp.ones((2, 1)), None)}
  >>> true = {'q': LowRank(jnp.bool_(True), jnp.bool_(True), None)}
  >>> update = selected(LocalUpdate(lambda p: (), inner), budget=1)
  >>> out = update.run(None, start, (), None, Masks(true, true), Context())
  >>> out.masks.trained['q'].a.tolist()  # the unit that moved most
  [[False, True]]
  """
  if budget < 1:
    raise Error(f'selected: budget={budget} must be at least 1.')

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    trial = inner.run(base, start, state, batches, masks, context)
    scores = [
      _scores(node, change)
      for node, change in zip(
        _nodes(start), _nodes(trial.update, start), strict=True
      )
    ]
    if not scores:
      raise Error('selected needs low-rank factors: adapter.name=lora.')
    rank = min(s.shape[-1] for s in scores)
    if budget > rank:
      raise Error(f'selected: budget={budget} is above the rank, {rank}.')
    pairs = sum(s.size // s.shape[-1] for s in scores)
    kept = tree.largest(scores, budget * pairs)
    trained = _only(masks.trained, start, kept)
    masks = Masks(masks.held, trained)
    return inner.run(base, start, state, batches, masks, context)

  return LocalUpdate(inner.init, run)


def _is_node(x: Any) -> bool:
  return x is None or isinstance(x, LowRank)


def _nodes(params: Params, like: Params | None = None) -> list[LowRank]:
  leaves, treedef = jax.tree.flatten(
    params if like is None else like, is_leaf=_is_node
  )
  nodes = leaves if like is None else treedef.flatten_up_to(params)
  return [x for x, y in zip(nodes, leaves) if isinstance(y, LowRank)]


def _scores(node: LowRank, change: LowRank) -> jax.Array:
  """Returns the scores of a node's units, [..., R]."""
  size = lambda x, axis: jnp.sqrt(jnp.sum(jnp.square(x), axis=axis))
  score = jnp.zeros((*node.a.shape[:-2], node.a.shape[-1]))
  if change.a is not None:
    score += size(change.a, -2) * size(node.b, -1)
  if change.b is not None:
    score += size(node.a, -2) * size(change.b, -1)
  return score


def _only(mask: Any, start: Params, kept: list[jax.Array]) -> Any:
  rest = iter(kept)

  def node(x, m):
    if not isinstance(x, LowRank):
      return m
    units = next(rest)
    of_a, of_b = units[..., None, :], units[..., :, None]
    return m._replace(
      a=None if m.a is None else m.a & of_a,
      b=None if m.b is None else m.b & of_b,
    )

  return jax.tree.map(node, start, mask, is_leaf=_is_node)
