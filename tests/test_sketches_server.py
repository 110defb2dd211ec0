"""Sketches of later families on the server's side, on the real transformer.

As in `test_sketches`: a part or two, a real round, a closed form; a comment
names the contract without which the test fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import RATE, averaged, close

from fedjax_llm import aggregators, recipes, tree
from fedjax_llm.local.gradients import backprop
from fedjax_llm.types import (
  Draw,
  Error,
  StreamingAggregator,
  Traits,
)

world = pytest.fixture(scope='module')(tiny.one_step)


# -------------------------------------------------------------- asynchronous --


def by_staleness() -> StreamingAggregator:
  """FedBuff's weights (Nguyen et al. 2022): 1 / sqrt(1 + staleness)."""
  rule = aggregators.mean()

  def accumulate(sums, uploads, state, params):
    weight = uploads.weight / jnp.sqrt(1.0 + uploads.staleness)
    return rule.accumulate(sums, uploads._replace(weight=weight), state, params)

  return rule._replace(accumulate=accumulate, traits=Traits())


def buffered(*, loss, optimizer, fold=None, block_size=None, versions: int = 2):
  """A recipe that a config names by its import path."""
  return recipes.fed_avg(
    loss, optimizer, fold=fold, block_size=block_size,
    aggregator=by_staleness(), history=versions,
  )  # fmt: skip


def arrivals(*, num_clients: int, cohort_size: int):
  """A sampler by import path: slot k started k rounds ago."""

  def draw(round):
    slots = np.arange(cohort_size)
    ids = ((round + slots) % num_clients).astype(np.int32)
    started = np.maximum(round - slots, 0).astype(np.int32)
    return Draw(ids, np.ones(cohort_size, bool), started)

  return draw


@functools.cache
def asynchronous():
  return buffered(loss=tiny.loss, optimizer=tiny.sgd(RATE))


def test_late_clients_train_from_old_parameters_and_count_less(world):
  """Contract: `history`, `Cohort.started`, `Uploads.staleness`."""
  params, cohort, _ = world
  algorithm, state, seen = asynchronous(), None, [params]
  for started in ([0, 0, 0], [1, 0, 1], [2, 1, 0]):
    started = np.array(started, np.int32)
    late = cohort._replace(started=started)
    state, _, info = tiny.run(algorithm, params, late, state=state)
    staleness = len(seen) - 1 - started
    assert info.reported.tolist() == (staleness < 2).tolist()
    rows = [
      tree.take(tiny.updates(seen[at], cohort, RATE), k)
      for k, at in enumerate(started)
    ]
    weight = cohort.weight / np.sqrt(1 + staleness) * (staleness < 2)
    want = tiny.mean(tree.stack(rows), weight)
    close(tiny.moved(state.params, seen[-1]), want, rtol=1e-3)
    seen.append(state.params)
  with pytest.raises(Error, match='the server keeps no versions: set history'):
    tiny.run(averaged(), params, late)


# --------------------------------------------------- adversaries, and after --


def flipped(*ids: int):
  """Attackers by id send the opposite of their update."""

  def adversary(uploads, key):
    lies = jnp.isin(uploads.ids, jnp.array(ids))
    minus = tree.scale(uploads.update, -1.0)
    return uploads._replace(update=tree.where(lies, minus, uploads.update))

  return adversary


def test_attackers_by_id_flip_their_updates(world):
  """Contract: `adversary`, `Uploads.ids`."""
  params, cohort, each = world
  state, _, _ = tiny.run(averaged(adversary=flipped(2, 9)), params, cohort)
  signed = np.array([1, -1, 1])  # the ids are 7, 2, 4
  want = tiny.mean(each, cohort.weight * signed)
  want = tree.scale(want, (cohort.weight * signed).sum() / cohort.weight.sum())
  close(tiny.moved(state.params, params), want)
  with pytest.raises(Error, match='leave block_size out'):
    averaged(adversary=flipped(2), block_size=2)


def test_the_server_trains_on_its_own_data_after_the_rule(world):
  """Contract: `after`, and the data that `round` and `aggregate` are given."""
  params, cohort, each = world

  def after(state, base, data, key):
    grads, _ = backprop(
      tiny.loss, base, tiny.floats(state.params), state.params, data, key
    )
    step = tree.scale(grads, -0.3)
    return state._replace(params=tree.add(state.params, step))

  data = tiny.texts(tiny.B, seed=9)
  state, _, _ = tiny.run(averaged(after=after), params, cohort, data=data)
  mean = tiny.mean(each, cohort.weight)
  middle = tree.add(params, tree.map_present(jnp.float32, mean))
  again = jax.tree.map(lambda x: np.stack([x] * 3), data)
  g = tiny.gradients(middle, tiny.floats(middle), again)
  want = jax.tree.map(lambda m, g: m - 0.3 * np.float64(g[0]), mean, g)
  close(tiny.moved(state.params, params), want)
