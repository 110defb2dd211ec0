"""Evaluations of clients that use some of the client's own training texts.

A builder returns a `View`, named in the section `evals.personal` of a config; a
run then reports 'evals/{name}/own/...' and 'evals/{name}/common/...' beside the
metrics of the served parameters ('evals/personal/...').
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.evals import memory, mixing
from fedjax_llm.evals.likelihood import Group, Report, personal
from fedjax_llm.nodes import Dual
from fedjax_llm.types import Base, Batch, Error, Key, Loss, Model, Params

__all__ = ['fused', 'instance_mixed', 'recalled']


class View(NamedTuple):
  """One evaluation of a client: how to prepare its parameters, and the loss.

  `prepare(base, params, texts, key)` returns the parameters that `loss` takes,
  from the client's parameters and some of its training texts [S, T]; rows
  without a text are padding. With `dual` the client's parameters are a `Dual`,
  otherwise the served parameters.
  """

  name: str
  loss: Loss  # sums for each row, [B]
  prepare: Callable[[Base, Any, Batch, Key], Any]
  num_texts: int
  dual: bool


def instance_mixed(
  loss: Loss,
  model: Model,
  *,
  strength: float = 0.5,
  at: str = 'prompt',
  num_texts: int = 5,
) -> View:
  """Returns FedDPA's view: local and global adapter, mixed for each text.

  The weight of the local adapter is the similarity of the text to `num_texts`
  of the client's texts: see `mixing.instance_mixed` (Yang et al. 2024, arXiv
  2403.19211).

  >>> view = instance_mixed(lambda *args: None, Model(None, None))
  >>> view.num_texts, view.dual
  (5, True)
  """
  states = mixing.text_states(model, at=at)

  def prepare(base: Base, params: Dual, texts: Batch, key: Key):
    del key
    seen = states(base, mixing.local_model(params), texts)
    return mixing.Instances(params, seen, jnp.any(texts.segments > 0, -1))

  mixed = mixing.instance_mixed(loss, model, strength=strength, at=at)
  return View('instance_mixed', mixed, prepare, num_texts, dual=True)


def fused(
  loss: Loss,
  model: Model,
  *,
  penalty: float = 0.05,
  num_candidates: int = 8,
  num_generations: int = 20,
  num_texts: int = 8,
) -> View:
  """Returns FDLoRA's view: two adapters, fused with searched weights.

  `mixing.fuse` searches the weights on `num_texts` of the client's texts (Qi et
  al. 2024, arXiv 2406.07925).

  >>> fused(lambda *args: None, Model(None, None), num_texts=3).num_texts
  3
  """
  del model
  search = mixing.fuse(
    loss,
    penalty=penalty,
    num_candidates=num_candidates,
    num_generations=num_generations,
  )

  def prepare(base: Base, params: Dual, texts: Batch, key: Key) -> Params:
    weights, _ = search(base, params, texts, key)
    return multi.blend((params.personal, params.shared), tuple(weights))

  return View('fused', loss, prepare, num_texts, dual=True)


def recalled(
  loss: Loss,
  model: Model,
  *,
  neighbours: int = 8,
  weight: float = 0.25,
  temperature: float = 10.0,
  num_texts: int = 8,
) -> View:
  """Returns FedMem's view: the served model with a memory of the texts.

  `memory.recalling` over `num_texts` of the client's texts (Du et al. 2024,
  arXiv 2401.10070), after any method.

  >>> recalled(lambda *args: None, Model(None, None)).dual
  False
  """
  del loss
  remember = memory.remember(model)
  both = memory.recalling(
    model, neighbours=neighbours, weight=weight, temperature=temperature
  )

  def prepare(base: Base, params: Params, texts: Batch, key: Key):
    del key
    if texts.label is not None:
      raise Error(
        'evals.personal.name=recalled remembers tokens: task.name=causal_lm.'
      )
    return remember(base, params, texts)

  return View('recalled', both, prepare, num_texts, dual=False)


def has_two(params: Any) -> bool:
  """Returns True for a `Dual` of two adapters with the same structure.

  >>> has_two(Dual({'w': jnp.ones(2)}, {'w': jnp.ones(2)})), has_two({})
  (True, False)
  """
  if not isinstance(params, Dual):
    return False
  shapes = lambda x: jax.tree.map(jnp.shape, multi.without_residuals(x))
  return shapes(params.shared) == shapes(params.personal)


def viewing(
  view: View,
  parameters: Callable[[Params, Any, np.ndarray], Any],
  texts: Callable[[np.ndarray], Batch],
  *,
  own: Sequence[Group],
  common: Sequence[Group] = (),
) -> Callable[..., Report | None]:
  """Returns a function that evaluates clients through a view.

  Args:
    view: prepares the parameters and provides the loss.
    parameters: `(params, store, ids) -> params [C, ...]` of these clients.
    texts: `(ids) -> Batch [C, S, T]`, training texts of these clients.
    own: groups whose rows are tested with the parameters of their owner.
    common: groups that are tested with the parameters of every client.

  Returns:
    `examine(base, params, store, ids, key) -> Report | None`: None without a
    client or without a text to test on.
  """
  apart = personal(view.loss)
  owners = np.concatenate([np.zeros(0), *(o.ravel() for _, o in own)])

  @jax.jit
  def prepare(base, stack, batch, ids, key):
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    each = jax.vmap(view.prepare, in_axes=(None, 0, 0, 0))
    return each(base, stack, batch, keys)

  def examine(base, params, store, ids, key) -> Report | None:
    ids = np.asarray(ids, np.int32)
    mine = own if np.isin(ids, owners).any() else ()
    if not len(ids) or not (mine or common):
      return None

    def stack(places: np.ndarray):
      some = ids[places]
      return prepare(
        base, parameters(params, store, some), texts(some), some, key
      )

    return apart(base, stack, ids, mine, common, key, view.name)

  return examine
