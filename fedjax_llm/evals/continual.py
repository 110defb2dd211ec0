"""Evaluation of runs in stages: a matrix of metrics, and what it says.

`by_stage` returns the evaluation of the held-out texts of every stage;
`summary` the average, forgetting and transfer of a matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.evals.likelihood import (
  ClientSums,
  Group,
  Report,
  likelihood,
  personal,
)
from fedjax_llm.types import FederatedAlgorithm, Loss, Params


def summary(matrix: np.ndarray) -> dict[str, float]:
  """Returns average, forgetting, backward and forward transfer of a matrix.

  With R[i, j] the score (higher is better) on stage j after training on stage
  i, both from 1, R[0, j] that before training, and t stages done:

      average  = 1/t     sum_{j <= t} R[t, j]
      forgetting = 1/(t-1) sum_{j < t} (max_{1 <= l < t} R[l, j] - R[t, j])
      backward = 1/(t-1) sum_{j < t} (R[t, j] - R[j, j])
      forward  = 1/(t-1) sum_{1 < j <= t} (R[j-1, j] - R[0, j])

  Average and transfer are those of Lopez-Paz and Ranzato 2017, arXiv
  1706.08840, section 3, with the untrained model in place of a random one;
  forgetting is that of Chaudhry et al. 2018, arXiv 1801.10112, section 4.
  After one stage there is only the average.

  Args:
    matrix: R, [t + 1, T], whose first row is that before training.

  >>> R = np.array([[0.0, 0.25], [1.0, 0.5], [0.5, 1.0]])
  >>> summary(R)
  {'average': 0.75, 'forgetting': 0.5, 'backward': -0.5, 'forward': 0.25}
  """
  R = np.asarray(matrix, np.float64)
  done = len(R) - 1
  if done < 1:
    return {}
  last = R[done, :done]
  result = {'average': float(last.mean())}
  if done < 2:
    return result
  earlier = np.arange(done - 1)
  best = R[1:done, : done - 1].max(0)
  at_once = R[earlier + 1, earlier]
  before = R[np.arange(1, done), np.arange(1, done)]
  return {
    **result,
    'forgetting': float(np.mean(best - last[:-1])),
    'backward': float(np.mean(last[:-1] - at_once)),
    'forward': float(np.mean(before - R[0, 1:done])),
  }


def by_stage(
  loss: Loss,
  algorithm: FederatedAlgorithm,
  *,
  groups: Sequence[Group],
  names: Sequence[str],
  owned: Sequence[Group] = (),
  together: Callable[..., Report] | None = None,
) -> Callable[..., dict[str, Any]]:
  """Returns the evaluation of the held-out texts of each stage.

  'evals/stages/losses' and 'evals/stages/accuracies' have the loss and the
  accuracy of the served model on each stage by its name;
  'evals/stages/personal/losses' and 'accuracies' those of every client's own
  model on its own texts of the stage, over all texts of the stage.

  Args:
    loss: sums for each row, [B].
    algorithm: its `personal` returns the served parameters.
    groups: batches whose owners are stages.
    names: of the T stages.
    owned: the same texts with owners client * T + stage; empty for methods
      without private parts.
    together: `likelihood(loss)`, to share its compiled program between runs.

  >>> from fedjax_llm.types import Batch, LossSum
  >>> def loss(base, params, batch, key):
  ...   n = jnp.sum(batch.loss_mask, -1, dtype=jnp.float32)
  ...   return LossSum(n * params, n, n)
  >>> full = np.ones((1, 2, 4), np.int32)
  >>> group = Batch(full, full > 0, full, full), np.array([[0, 1]])
  >>> method = FederatedAlgorithm(None, None, None, lambda p, state: p)
  >>> evaluate = by_stage(loss, method, groups=[group], names=['one', 'two'])
  >>> evaluate(None, jnp.float32(2), None, jax.random.key(0))[
  ...   'evals/stages/losses']
  {'one': 2.0, 'two': 2.0}
  """
  together = together or likelihood(loss)
  apart, total = personal(loss), len(names)
  owners = [np.ravel(owner) for _, owner in owned]
  pairs = np.unique(np.concatenate([np.zeros(0, int), *owners]))
  pairs = pairs[pairs >= 0].astype(int)

  def evaluate(base, params, store, key) -> dict[str, Any]:
    served = algorithm.personal(params, None)
    report = together(base, served, groups, key, 'stages')
    sums = report.clients['stages']
    metrics = _named(sums, sums.ids, names, 'evals/stages')
    if not len(pairs):
      return metrics

    def stack(places: np.ndarray) -> Params:
      states = store.gather(pairs[places] // total)
      return jax.vmap(lambda one: algorithm.personal(params, one))(
        jax.tree.map(jnp.asarray, states)
      )

    own = apart(base, stack, pairs, owned, (), key, 'stages')
    sums = own.clients['stages/own']
    stages = np.asarray(sums.ids) % total
    return metrics | _named(sums, stages, names, 'evals/stages/personal')

  return evaluate


def _named(
  sums: ClientSums, stages: np.ndarray, names: Sequence[str], title: str
) -> dict[str, Mapping[str, float]]:
  """Returns loss and accuracy by the name of the stage of each of the sums."""
  add = lambda x: np.bincount(stages, x, minlength=len(names))
  count = add(sums.count)
  some = np.flatnonzero(count)
  by_name = lambda x: {names[int(i)]: float(x[i] / count[i]) for i in some}
  return {
    f'{title}/losses': by_name(add(sums.total)),
    f'{title}/accuracies': by_name(add(sums.correct)),
  }
