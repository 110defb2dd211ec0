"""The evaluator of clients that join after training: `newcomers`.

It is named in `evals.evaluators` of a config and tests the clients that
`population.new_clients` keeps out of training.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import clients, evals, local, scopes, tree
from fedjax_llm.run import builders
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  ClientState,
  Context,
  Draw,
  Error,
  Evaluator,
  FederatedAlgorithm,
  Loss,
  Params,
)

__all__ = ['newcomers']


def newcomers(
  built: Any,
  algorithm: FederatedAlgorithm,
  loss: Loss,
  *,
  steps: Sequence[int] = (1, 5),
  share: float = 0.5,
  learning_rate: float | None = None,
  alone: bool = True,
) -> Evaluator:
  """Returns the evaluator of new clients after a few local steps.

  Each client that never trains takes a `share` of its examples to adapt, and is
  tested on the others. It starts from the model that the method serves to a
  client that it has never seen, `personal(params, init_client(params))`, and
  trains all its trainable parameters by the config's local optimizer, in
  batches of `cohort.batch_size`: federated averaging followed by fine-tuning
  (Yu et al. 2020, arXiv 2002.04758; Jiang et al. 2019, arXiv 1909.12488), with
  the start of the method where clients keep parameters.

  'evals/newcomers/steps_K/loss' and 'accuracy' are those after K steps, over
  all texts; steps_0 is the model as it is served. 'evals/newcomers/alone_K/...'
  are those of the same steps from the parameters before the first round.
  '.../clients' is the loss by client. New clients with a single example are
  left out.

  Args:
    built: the run.
    algorithm: its method.
    loss: sums for each row, [B].
    steps: the numbers of local steps after which clients are tested.
    share: of the client's examples to adapt, at least one and never all.
    learning_rate: of the local optimizer; None: as in `local`.
    alone: whether the clients also train on their own.

  Raises:
    Error: a number out of range; no new client with two examples.
  """
  if not steps or any(k < 1 for k in steps):
    raise Error(
      f'evals.evaluators: newcomers.steps is {tuple(steps)}: numbers of local '
      'steps, each of at least 1.'
    )
  if not 0 < share < 1:
    raise Error(
      f'evals.evaluators: newcomers.share is {share}: it is above 0 and below '
      '1.'
    )
  people, conf = built.population, built.conf
  some = [k for k, own in enumerate(people.new) if len(own) > 1]
  if not some:
    raise Error(
      'evals.evaluators: newcomers needs clients that never train, with two '
      'examples or more: set population.new_clients.'
    )
  names = [people.new_names[k] for k in some]
  parts = [split(people.new[k], share) for k in some]
  section = dict(conf['local'])
  if learning_rate is not None:
    section['learning_rate'] = learning_rate
  update = local.sgd(
    built.task.loss(built.loaded),
    builders.build(section, SPEC.sections['local']),
  )
  cohort_of = clients.cohorts.cohorts(
    [adapt for adapt, _ in parts],
    num_steps=max(steps),
    batch_size=conf['cohort']['batch_size'],
    max_length=built.width,
    pad_id=built.tokenizer.pad_id,
    seed=built.settings.seed,
    collate=built.task.collate,
    length=built.task.length,
  )
  groups = built.rows([test for _, test in parts])
  apart = evals.personal(loss)
  ids = np.arange(len(some), dtype=np.int32)
  scope = scopes.everything()

  @jax.jit
  def adapted(base: Any, start: Params, batches: Any, ids: Any, key: Any):
    """Returns the parameters [C, ...] of clients after their steps."""

    def one(client, batch):
      context = Context(client=client, key=jax.random.fold_in(key, client))
      masks = scope.mask(start, ClientState(), context)
      out = update.run(base, start, (), batch, masks, context)
      return tree.add(start, out.update)

    return jax.vmap(one)(ids, batches)

  # The rounds donate the arrays of which they are made.
  begun = jax.tree.map(
    jnp.copy, algorithm.init(built.round_key, built.initial).params
  )

  lonely: dict[str, Any] = {}

  def tested(base: Any, start: Params, num_steps: int, key: Any, name: str):
    def stack(places: np.ndarray) -> Params:
      mine = ids[places]
      count = np.full(len(mine), num_steps, np.int32)
      draw = Draw(mine, np.ones(len(mine), bool), steps=count)
      batches = cohort_of(draw, 0).batches
      return adapted(base, start, batches, mine, key)

    title = f'newcomers/{name}'
    report = apart(base, stack, ids, groups, (), key, title)
    sums = report.clients[f'{title}/own']
    each = sums.total / sums.count
    return {
      f'evals/{title}/loss': report.metrics[f'evals/{title}/own/loss'],
      f'evals/{title}/accuracy': report.metrics[f'evals/{title}/own/accuracy'],
      f'evals/{title}/clients': {
        names[i]: float(x) for i, x in zip(sums.ids, each, strict=True)
      },
    }

  def served(params: Params) -> Params:
    new = algorithm.init_client(params)
    return jax.tree.map(jnp.asarray, algorithm.personal(params, new))

  def evaluate(base, params, store, key) -> dict[str, Any]:
    del store  # they have no state
    start = served(params)
    metrics: dict[str, Any] = {}
    for k in (0, *steps):
      metrics |= tested(base, start, k, key, f'steps_{k}')
    if alone and not lonely:  # the same in every round
      before = served(begun)
      for k in steps:
        lonely.update(tested(base, before, k, key, f'alone_{k}'))
    return metrics | lonely

  return evaluate


def split(own: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
  """Returns the examples to adapt, and those to test, of two or more.

  The examples of new clients lie in a random order.

  >>> split('abcde', 0.5)
  (['a', 'b', 'c'], ['d', 'e'])
  """
  count = min(max(1, math.ceil(share * len(own))), len(own) - 1)
  return list(own[:count]), list(own[count:])
