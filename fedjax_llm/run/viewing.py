"""Evaluators of clients through a view: see `evals.views`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import evals, tree
from fedjax_llm.run import builders
from fedjax_llm.types import Error, FederatedAlgorithm


def viewer(
  section: Mapping[str, Any],
  built: Any,
  algorithm: FederatedAlgorithm,
  tests: Any,
  *,
  private: bool,
) -> Callable[..., dict[str, Any]]:
  """Returns `examine(base, params, store, key) -> {'evals/...': ...}` of a run.

  Where clients keep private parameters, it evaluates the clients that have
  trained, else all clients with held-out texts.

  Args:
    section: the name and the keywords of a view.
    built: an `experiment.Experiment`.
    algorithm: its method.
    tests: its held-out texts, `experiment.Tests`.
    private: True if clients keep private parameters.

  Raises:
    Error: the view needs two adapters and the method has one.
  """
  view: evals.views.View = builders.build(
    section,
    evals.views,
    loss=built.task.loss(built.loaded, per_row=True),
    model=built.loaded.model,
  )
  begin = lambda start: algorithm.init(jax.random.key(0), start).params
  if view.dual and not evals.views.has_two(
    jax.eval_shape(begin, built.initial)
  ):
    raise Error(
      f'evals.personal.name={view.name} tests methods with a shared adapter '
      'and one of the same kind that clients keep: fed_dpa_t, fed_dpa_f, '
      f'fd_lora or ditto, not {built.conf["algorithm"]["name"]}.'
    )
  people = built.population
  everybody = np.flatnonzero([len(own) > 0 for own in people.heldout])

  def parameters(params: Any, store: Any, ids: np.ndarray) -> Any:
    if not private:
      return tree.broadcast(algorithm.personal(params, None), len(ids))

    def serve(one):
      if view.dual:
        return tree.merge(one.private, params)
      return algorithm.personal(params, one)

    return jax.vmap(serve)(jax.tree.map(jnp.asarray, store.gather(ids)))

  everything = [example for own in people.train for example in own]
  collate = built.task.collate(everything, built.width, built.tokenizer.pad_id)

  def texts(ids: np.ndarray) -> Any:
    """Returns clients' training examples, the shortest first, [C, n, ...]."""
    num, rows = view.num_texts, []
    for k in ids:
      some = sorted(people.train[k][:num], key=built.task.length)
      rows += [[example] for example in some] + [[]] * (num - len(some))
    return jax.tree.map(
      lambda x: x.reshape(len(ids), num, *x.shape[1:]), collate(rows)
    )

  look = evals.views.viewing(
    view, parameters, texts, own=tests.heldout, common=tests.common
  )

  def examine(base, params, store, key) -> dict[str, Any]:
    ids = store.seen() if private else everybody
    report = look(base, params, store, ids, key)
    if report is None:
      return {}
    return evals.told_of(report, people.names, built.task.metrics.accuracies)

  return examine
