"""The section `selection` of a config: the examples that clients train on.

`of` returns the selection, `prepared` the population with the examples that it
keeps, `counts` the number of examples of a round, and `scored` an algorithm
that chooses rows inside of the round.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import batching, data
from fedjax_llm.data.selection import Selection
from fedjax_llm.run import builders
from fedjax_llm.server import choosing
from fedjax_llm.types import Draw, Error, FederatedAlgorithm, Loss, Population

_ROWS = 16  # examples a batch of features


def of(conf: Mapping[str, Any]) -> Selection:
  """Returns the selection of a config; one without any part where it has none.

  Raises:
    Error: rows with several texts, whose scores would be those of all.
  """
  section = conf.get('selection')
  if not section:
    return Selection()
  result = builders.build(section, data.selection)
  if result.scored is not None and conf['cohort'].get('packing'):
    raise Error(
      f'selection.name={section["name"]} scores rows, and with cohort.packing '
      'a row holds several texts: leave packing out.'
    )
  return result


def prepared(
  selection: Selection,
  population: Population,
  loaded: Any,
  task: Any,
  seed: int,
  width: int,
  pad_id: int,
) -> Population:
  """Returns the population with the training examples that are kept.

  Its report gets 'examples_offered' and 'examples_kept', of each client.

  Raises:
    Error: the selection needs the states of a network of texts.
  """
  if selection.prepare is None:
    return population

  @jax.jit
  def last(base, batch):
    hidden = loaded.model.hidden(base, {}, batch)  # [B, T, D]
    end = (batch.segments > 0).sum(-1) - 1
    return jax.vmap(lambda row, at: row[at])(hidden, end)

  def features(own: Sequence[Any]) -> np.ndarray:
    """Returns the last state of the last token of each example, [n, D]."""
    own, num = list(own), len(own)
    own += own[:1] * (-num % _ROWS)
    make = task.collate(own, width, pad_id)
    parts = []
    for at in range(0, len(own), _ROWS):
      texts = batching.texts(make([[x] for x in own[at : at + _ROWS]]))
      if not texts:
        raise Error('selection.name: its features are those of texts.')
      parts.append(np.asarray(last(loaded.base, texts[0]._replace(bound=None))))
    return np.concatenate(parts)[:num]

  kept = selection.prepare(population.train, features, seed)
  train = tuple(
    tuple(own[i] for i in places)
    for own, places in zip(population.train, kept, strict=True)
  )
  report = {
    **population.report,
    'examples_offered': [len(own) for own in population.train],
    'examples_kept': [len(own) for own in train],
  }
  return population._replace(train=train, report=report)


def counts(
  population: Population, orders: Any, pooled: bool
) -> Callable[[Draw, int], dict[str, float]]:
  """Returns `(draw, round) -> metrics`, examples of the round's clients.

  'data/examples_offered' before and 'data/examples_kept' after the selection,
  {} without a selection on the host.
  """
  report = population.report
  before = report.get('examples_offered')
  if before is None and orders is None:
    return lambda draw, round: {}
  sizes = [len(own) for own in population.train]
  if pooled:
    sizes = [sum(sizes)]
    before = None if before is None else [sum(before)]
  offered = np.asarray(sizes if before is None else before)

  def of_round(draw: Draw, round: int) -> dict[str, float]:
    ids = [int(i) for i in np.asarray(draw.ids)[np.asarray(draw.reports)]]
    kept = [sizes[i] if orders is None else orders.kept(i, round) for i in ids]
    return {
      'data/examples_offered': float(offered[ids].sum()),
      'data/examples_kept': float(sum(kept)),
    }

  return of_round


def scored(
  conf: Mapping[str, Any], algorithm: FederatedAlgorithm, by_row: Loss | None
) -> FederatedAlgorithm:
  """Returns the algorithm on the rows that the selection of a config keeps.

  Args:
    conf: a checked config.
    algorithm: of its method.
    by_row: the loss of the task, one number a row.
  """
  if not conf.get('selection') or by_row is None:
    return algorithm
  choice = of(conf).scored
  if choice is None:
    return algorithm
  score = getattr(choosing, f'by_{choice.by}')(by_row)
  return choosing.choosing(algorithm, score, choice.pool)


def pool(conf: Mapping[str, Any]) -> int:
  """Returns the number of candidates for each row of a config's rounds.

  >>> by_loss = {'name': 'by_loss', 'pool': 3}
  >>> pool({}), pool({'selection': by_loss, 'cohort': {}})
  (1, 3)
  """
  choice = of(conf).scored
  return 1 if choice is None else choice.pool
