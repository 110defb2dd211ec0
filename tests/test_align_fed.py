"""AlignFed: versions, centring, fairness, and the pull towards the start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_asynchronous as references

from fedjax_llm import aggregators, local, recipes
from fedjax_llm.aggregators.averaging import as_stack
from fedjax_llm.recipes.asynchronous.align_fed import anchored, by_version
from fedjax_llm.types import (
  Batch,
  Cohort,
  Error,
  Images,
  LossSum,
  Model,
  Uploads,
)

NOTHING: Any = None  # no key, no masks
RNG = np.random.default_rng(4)
K, P, N = 6, 5, 9
IDS = np.array([3, 8, 0, 5, 2, -1])  # the last row is padding
LATE = np.array([0, 2, 0, 1, 2, 0])
PARAMS = {'a': jnp.zeros(2), 'b': jnp.zeros(3), 'frozen': None}


def uploads(flat, ids=IDS, late=LATE):
  valid = ids >= 0
  flat = np.where(valid[:, None], flat, 0).astype(np.float32)
  update = {'a': flat[:, :2], 'b': flat[:, 2:], 'frozen': None}
  weight = np.where(valid, np.arange(1.0, len(ids) + 1), 0.0)
  return Uploads(
    update, None, NOTHING, jnp.float32(weight), jnp.asarray(valid),
    ids=jnp.asarray(ids), staleness=jnp.asarray(late),
  )  # fmt: skip


def flat(tree):
  return np.concatenate([tree['a'], tree['b']])


@pytest.mark.parametrize('singletons', ['keep', 'zero'])
def test_the_rule_is_its_equations_over_rounds(singletons):
  rule = by_version(N, gamma=0.3, epsilon=1e-3, singletons=singletons)
  state, count = rule.init(PARAMS, NOTHING), np.zeros(N)
  for number in range(3):
    update = RNG.normal(size=(K, P)) * 10.0 ** RNG.integers(-1, 2, (K, 1))
    who = np.roll(IDS[:-1], number)
    who = np.append(who[:4], -1) if number == 2 else who
    ids = np.append(who, np.full(K - len(who), -1))
    here = ids >= 0
    got, state = rule.aggregate(uploads(update, ids), state, PARAMS, NOTHING)
    want = references.align_fed(
      update[here], LATE[here], count[ids[here]], 0.3, 1e-3,
      singletons == 'keep',
    )  # fmt: skip
    np.testing.assert_allclose(flat(got.delta), want, rtol=2e-5, atol=1e-5)
    assert got.delta['frozen'] is None
    count[ids[here]] += 1
    np.testing.assert_array_equal(state, count)
  # FedBuff, which neither centres nor weighs by norms, is elsewhere.
  buffered = as_stack(aggregators.buffered_mean())
  other = buffered.aggregate(uploads(update, ids), (), PARAMS, NOTHING)[0]
  assert np.abs(flat(other.delta) - want).max() > 0.1


def test_a_version_of_one_client_moves_the_server_unless_it_is_centred():
  update, ids, late = np.eye(3, P), np.arange(3), np.array([0, 1, 1])
  sent = uploads(update, ids, late)
  move = {}
  for word in ('keep', 'zero'):
    rule = by_version(3, gamma=0.0, singletons=word)
    out = rule.aggregate(sent, rule.init(None, NOTHING), PARAMS, NOTHING)[0]
    move[word] = flat(out.delta)
  # Norms 1, sqrt 1/2 and sqrt 1/2; the pair is equal and opposite.
  share = 1 / (1 + 2 * np.sqrt(2))
  np.testing.assert_allclose(move['keep'], [share, 0, 0, 0, 0], atol=1e-6)
  # Centred, it is zero, and its norm takes the weight of the others as well.
  assert np.abs(move['zero']).max() < 1e-6


def test_a_round_of_nobody_changes_nothing():
  rule = by_version(N)
  sent = uploads(np.ones((2, P)), np.array([-1, -1]), np.zeros(2, int))
  out, state = rule.aggregate(sent, rule.init(None, NOTHING), PARAMS, NOTHING)
  assert not flat(out.delta).any() and not state.any()


MODEL = Model(
  hidden=lambda base, params, batch: (
    (batch.tokens if isinstance(batch, Batch) else batch.pixels) @ params['w']
  ),
  logits=lambda base, params, hidden: hidden,
)


def plain(base, params, batch, key):
  one = jnp.float32(1)
  return LossSum(jnp.sum(params['w'] * jnp.arange(3.0)), one, one)


def test_the_pull_is_towards_the_states_of_the_start():
  start, w = RNG.normal(size=(2, 4, 3)).astype(np.float32)
  x = RNG.normal(size=(2, 5, 4)).astype(np.float32)
  here = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
  x[here == 0] = np.nan  # padding leaks nowhere
  grads = anchored(MODEL, 0.7)
  slope = np.broadcast_to(np.arange(3.0), (4, 3))
  want = references.anchored(x[here > 0], w, start, 0.7) + slope
  batch = Batch(np.nan_to_num(x), here > 0, here, here)
  got, sums = grads(plain, None, {'w': w}, {'w': start}, batch, NOTHING)
  np.testing.assert_allclose(got['w'], want, rtol=2e-5)
  assert float(sums.total) == pytest.approx((w * slope).sum(), rel=1e-5)
  # FedProx pulls the weights, not the states.
  assert np.abs(slope + 0.7 * (w - start) - want).max() > 0.1
  # Pictures have a state each.
  rows = Images(x[0], np.zeros(5, int), here[0])
  rows = rows._replace(pixels=np.nan_to_num(x[0]))
  got, _ = grads(plain, None, {'w': w}, {'w': start}, rows, NOTHING)
  want = references.anchored(x[0][here[0] > 0], w, start, 0.7) + slope
  np.testing.assert_allclose(got['w'], want, rtol=2e-5)


def test_a_late_client_starts_and_is_pulled_by_its_own_version():
  """Two clients of one coordinate each, the second from the version before."""
  model = Model(lambda base, params, batch: params['w'] * batch, MODEL.logits)

  def loss(base, params, batch, key):
    one = jnp.float32(1)
    return LossSum(jnp.sum((params['w'] - batch) ** 2) / 2, one, one)

  method = recipes.align_fed(
    loss, local.optimizer('sgd', 0.1), model=model, num_clients=2, pull=0.5,
    gamma=0.2, max_staleness=1,
  )  # fmt: skip
  state = method.init(jax.random.key(0), {'w': jnp.zeros(())})
  goals, step = np.array([2.0, -1.0]), jax.jit(method.round)
  server, count = [0.0], np.zeros(2)
  for started in ([0, 0], [1, 0]):
    cohort = Cohort(
      np.arange(2),
      jnp.float32(np.tile(goals[:, None, None, None], (1, 2, 1, 1))),
      jnp.array([5.0, 1.0]),
      jnp.ones(2, bool),
      started=np.array(started, np.int32),
    )
    state, *_ = step(state, cohort)
    moves, late = [], len(server) - 1 - np.array(started)
    for k in range(2):
      w = start = server[started[k]]
      for _ in range(2):
        w -= 0.1 * (w - goals[k] + 2 * 0.5 * (w - start) * goals[k] ** 2)
      moves.append([w - start])
    delta = references.align_fed(moves, late, count, 0.2, 1e-8, True)
    server.append(server[-1] + delta[0])
    count += 1
    assert float(state.params['w']) == pytest.approx(
      server[-1], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(singletons='drop'), "singletons is 'drop': it is keep or zero"),
    (dict(gamma=-1.0), 'gamma is -1.0: it must be 0 or more'),
    (dict(pull=-0.5), 'pull is -0.5: it must be 0 or more'),
    (dict(aggregator=aggregators.mean()), 'brings its own aggregator'),
    (dict(max_staleness=-1), 'max_staleness is -1'),
  ],
)
def test_fields_out_of_range_are_one_sentence(fields, words):
  sgd = local.optimizer('sgd')
  with pytest.raises(Error, match=words):
    recipes.align_fed(plain, sgd, model=MODEL, num_clients=2, **fields)
