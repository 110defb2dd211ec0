"""What compiled rounds do never contradicts what the accountant was given.

For each mechanism the noise of real rounds is sampled, and one client's texts
are replaced by extreme ones, through the compiled round. The deviation over the
largest change is at least the multiplier that the plan counts with, and not
much more, so that both are seen.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import toy

from fedjax_llm import privacy, recipes, uploads
from fedjax_llm.privacy import mechanisms, sent
from fedjax_llm.uploads import secure

CLIP, NOISE, K, ROW = 0.25, 0.8, 5, 2
GIVEN: Any = dict(clip=CLIP, delta=1e-3, noise_multiplier=NOISE)
# Replaced texts: of which sign and size the labels of the client are.
EXTREMES = (0.0, 1.0, -1.0, 60.0, -60.0)


def planned(name):
  """The plan, and what it changes in a method."""
  if name == 'central':
    plan: Any = privacy.client_level(**GIVEN, rate=0.8, num_clients=K)
    return plan, {'aggregator': plan.rule()}
  if name == 'tree':
    plan = mechanisms.correlated_level(
      **GIVEN, matrix='tree', separation=1, cohort_size=K, turns=(0, 1)
    )
    return plan, {'aggregator': plan.rule()}
  if name == 'local':
    plan = mechanisms.local_level(**GIVEN)
    return plan, {
      'upload': sent.noised(uploads.identity(), CLIP, plan.noise_multiplier)
    }
  plan = mechanisms.distributed(**GIVEN, cohort_size=K)
  codec = sent.skellam(
    plan.clip, plan.noise_multiplier, plan.least, plan.grid,
    secure.masked, secure.unmasked,
  )  # fmt: skip
  return plan, {'upload': codec}


@functools.cache
def program(name):
  """A compiled function (key, labels, present) -> what an observer sees."""
  plan, parts = planned(name)
  method: Any = recipes.fed_avg(toy.loss, toy.sgd(0.02), measure=None, **parts)
  state = method.init(tiny.KEY, toy.params())
  cohort = toy.cohort()._replace(weight=np.ones(K, np.float32))

  @jax.jit
  def seen(key, scale, present):
    y = cohort.batches.y
    rows = np.arange(K).reshape(-1, *[1] * (y.ndim - 1)) == ROW
    y = jax.numpy.where(rows, scale * np.sign(y), y)
    valid = np.asarray(cohort.valid) & (present | (np.arange(K) != ROW))
    moved = cohort._replace(batches=cohort.batches._replace(y=y), valid=valid)
    at = state._replace(key=key)
    if name == 'local':  # the message of one client is all that it shows
      update = method.train(at, moved, toy.base())[0].update
      return jax.tree.map(lambda x: x[ROW], update)
    new = method.round(at, moved, toy.base())[0].params
    count = getattr(plan, 'denominator', K) if name == 'central' else K
    change = jax.tree.map(lambda n, o: (n - o) * count, new, state.params)
    return change['q']._replace(scale=None)

  return plan, seen


def flat(x):
  leaves = jax.tree.leaves(x)
  return np.concatenate([np.ravel(np.float64(leaf)) for leaf in leaves])


@pytest.mark.parametrize('name', ['central', 'tree', 'local', 'distributed'])
def test_noise_and_the_worst_client_are_what_is_counted(name):
  pytest.importorskip('dp_accounting')
  plan, seen = program(name)
  keys = jax.random.split(jax.random.key(8), 40)
  draws = np.stack([flat(seen(key, 1.0, True)) for key in keys])
  draws -= draws.mean(0)
  deviation = draws.std() * math.sqrt(40 / 39)
  ends = [flat(seen(keys[0], x, True)) for x in EXTREMES]
  if name in ('central', 'tree'):  # neighbours: an update is there or zero
    ends = [x - flat(seen(keys[0], 1.0, False)) for x in ends]
    worst = max(np.linalg.norm(x) for x in ends)
  elif name == 'local':
    worst = max(np.linalg.norm(x - y) for x in ends for y in ends)
  else:  # between any two, half of the largest change, and rounding to a grid
    worst = max(np.linalg.norm(x - y) for x in ends for y in ends) / 2
  counted = getattr(plan, 'factor', 1.0) * NOISE
  error = 4.5 / math.sqrt(2 * draws.size)
  assert deviation / worst >= counted * (1 - error)
  limit = 1.7 if name == 'tree' else 1.3  # one of its nodes is in this round
  assert deviation / worst <= limit * counted
