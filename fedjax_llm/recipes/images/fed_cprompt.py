"""Fed-CPrompt: prompts that grow with the tasks, held near the global model.

Bagwe et al. 2023, arXiv 2307.04869.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import GrowingPool
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, in_round, node_of
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Loss,
  LossSum,
  Masks,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  'fed_cprompt': {
    **IMAGES,
    'adapter': dict(
      name='growing_pool', size=4, length=2, num_classes=4, num_tasks=2
    ),
    'algorithm': dict(rounds_per_task=2, num_tasks=2),
  },
}


class Past(NamedTuple):
  """The rule's state: the present task and the pool before it."""

  task: Any  # [] int32
  previous: GrowingPool


def fed_cprompt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  rounds_per_task: int = 20,
  num_tasks: int = 10,
  pull: float = 1000.0,
  push: float = 10.0,
  margin: float = 1.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-CPrompt: new prompts for each task, and a loss against forgetting.

      L = CE + max(0, pull |f - g|^2 - push |f - h|^2 + margin),
          in the first task CE + pull |f - g|^2,
      theta <- sum_k w_k theta_k

  with the features of a batch's images under the client's prompts, f, under
  those that it received, g, and under those of the end of the task before, h;
  squares add up over the batch (Bagwe et al. 2023, arXiv 2307.04869, the loss
  of the authors' program). Task t are the rounds t * rounds_per_task and those
  that follow, and trains the prompts t N / num_tasks and those that follow;
  those before them are frozen, those behind them count for nothing
  (`nodes.GrowingPool`). Rounds behind the last task belong to it. The section
  `stages` makes the tasks. A client also receives the pool of the task before.

  Unlike there, all clients are at the same task, classes of earlier tasks are
  not masked, and prompts stand in front of the first layer of the image tower
  of a dual encoder. There 100 prompts of 8 rows and 10 tasks.

  Args:
    rounds_per_task: of a stage.
    num_tasks: a divisor of the number of prompts.
    pull, push, margin: of the term of features.

  Raises:
    Error: an aggregator or a scope in `parts`, a number below one, a loss that
      is not of images and names of classes; from `init`, an adapter without a
      growing pool, tasks that do not divide its prompts.

  >>> from fedjax_llm import local
  >>> fed_cprompt(None, local.optimizer('sgd'), num_tasks=0)
  Traceback (most recent call last):
  fedjax_llm.types.Error: algorithm.num_tasks is 0; it must be at least 1.
  """
  for section in ('aggregator', 'scope'):
    refuse('fed_cprompt', section, parts)
  least = dict(rounds_per_task=rounds_per_task, num_tasks=num_tasks)
  for name, value in least.items():
    if value < 1:
      raise Error(f'algorithm.{name} is {value}; it must be at least 1.')
  seen = class_names.needed('fed_cprompt', loss)
  task_of = lambda round: jnp.minimum(round // rounds_per_task, num_tasks - 1)

  def build(start, batches, context) -> Loss:
    del batches
    task = task_of(context.round)
    node = start['scores']
    active = (task + 1) * (len(node.rows) // num_tasks)
    # In the first round of a task the server has just ended the one before.
    first = context.round == task * rounds_per_task
    before = jax.tree.map(
      lambda x, y: jnp.where(first, x, y), node, context.news
    )
    received = node._replace(active=active)

    def total(base, params, batch, key) -> LossSum:
      del key
      towers = seen(base, params, batch)
      mine = params['scores']._replace(active=active)
      features = mine.features(towers)
      sums = class_names.summed(mine.classified(features), batch)
      real = class_names.known_rows(batch)

      def far(other):
        there = jax.lax.stop_gradient(other.features(towers))
        return jnp.sum(jnp.where(real[:, None], features - there, 0.0) ** 2)

      near = pull * far(received)
      both = jax.nn.relu(near - push * far(before) + margin)
      term = jnp.where(task > 0, both, near)
      return sums._replace(total=sums.total + sums.count * term)

    return total

  algorithm = compose(
    in_round(build, optimizer),
    scope=_scope(task_of, num_tasks),
    aggregator=_rule(num_tasks),
    **{'measure': None, **parts},
  )

  def init(key, params):
    node = node_of('fed_cprompt', params, GrowingPool, 'growing_pool')
    if len(node.rows) % num_tasks:
      raise Error(
        f'algorithm.num_tasks is {num_tasks}, which does not divide the '
        f'{len(node.rows)} prompts of the adapter.'
      )
    active = jnp.int32(len(node.rows) // num_tasks)
    scores = node._replace(active=active)
    return algorithm.init(key, {**params, 'scores': scores})

  return algorithm._replace(init=init)


def _scope(task_of: Any, num_tasks: int) -> Scope:
  """Returns the scope: the prompts of the present task, and the head."""
  inner = scopes.everything()

  def mask(start, state, context):
    full = tree.full_masks(start, inner.labels(start))
    number = len(start['scores'].rows)
    place = jnp.arange(number) // (number // num_tasks)
    here = place == task_of(context.round)
    node = full.trained['scores']._replace(
      rows=here[:, None, None], keys=here[:, None], attention=here[:, None]
    )
    return Masks(full.held, {**full.trained, 'scores': node})

  return Scope(inner.labels, mask)


def _rule(num_tasks: int) -> Aggregator:
  """Returns the mean, which keeps and broadcasts the pool before a task."""
  mean = aggregators.as_stack(aggregators.mean())

  def init(params, key):
    del key
    node = node_of('fed_cprompt', params, GrowingPool, 'growing_pool')
    return Past(jnp.int32(0), node)

  def aggregate(uploads, past, params, key):
    result, _ = mean.aggregate(uploads, (), params, key)
    here = uploads.masks.trained['scores'].keys  # [K, N, 1]
    trained = jnp.any(here & uploads.valid[:, None, None], (0, 2))
    each = len(trained) // num_tasks
    task = jnp.argmax(trained) // each
    turned = task != past.task
    previous = jax.tree.map(
      lambda x, y: jnp.where(turned, x, y), params['scores'], past.previous
    )
    assign = jax.tree.map(lambda _: None, params)
    active = ((task + 1) * each).astype(jnp.int32)
    assign['scores'] = assign['scores']._replace(active=active)
    past = Past(task.astype(jnp.int32), previous)
    return Aggregate(result.delta, assign), past

  return Aggregator(
    init, aggregate, weights=by_weight, broadcast=lambda past: past.previous
  )
