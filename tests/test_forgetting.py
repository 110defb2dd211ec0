"""Removing a client from a trained model, against what each way promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import recipes, tree
from fedjax_llm.replay import forgetting
from fedjax_llm.types import Error

KEY = jax.random.key(4)
GONE, K = 2, 4


def run_of(algorithm, num_rounds=2):
  cohorts = [toy.cohort(num_clients=K, seed=i) for i in range(num_rounds)]
  start = algorithm.init(KEY, toy.params())
  return forgetting.Rounds(algorithm, start, cohorts, toy.base())


@pytest.fixture(scope='module')
def rounds():
  return run_of(recipes.fed_avg(toy.loss, toy.sgd(), measure=None))


def shares(cohort):
  return np.float64(cohort.weight) / cohort.weight.sum()


def test_retraining_is_the_run_of_the_other_clients(rounds):
  got = forgetting.retrained(rounds, GONE)
  state, step = rounds.start, forgetting._program(rounds.algorithm.round)
  for cohort in rounds.cohorts:
    less = cohort._replace(valid=np.arange(K) != GONE)
    state, _, _ = step(state, less, rounds.base)
  toy.close(got.params, state.params, 1e-5, 1e-6)
  toy.close(forgetting.retrained(rounds, 77).params,
            forgetting.trained(rounds).params, 0, 0)  # fmt: skip


def test_subtracting_takes_away_the_clients_terms_of_every_mean(rounds):
  got = forgetting.subtracted(rounds, GONE).params['q']
  state, train = rounds.start, forgetting._program(rounds.algorithm.train)
  want = jax.tree.map(np.float64, rounds.start.params['q'])
  a, b = want.a, want.b
  for cohort in rounds.cohorts:
    uploads, _, _ = train(state, cohort, rounds.base)
    for k in np.flatnonzero(np.arange(K) != GONE):
      a = a + shares(cohort)[k] * np.float64(uploads.update['q'].a[k])
      b = b + shares(cohort)[k] * np.float64(uploads.update['q'].b[k])
    state, _, _ = forgetting._program(rounds.algorithm.round)(
      state, cohort, rounds.base
    )
  np.testing.assert_allclose(got.a, a, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.b, b, rtol=1e-4, atol=1e-5)


def test_stacks_forget_a_client_exactly():
  """FLoRA: the base is a sum of products, one a client and round."""
  rounds = run_of(
    recipes.flora(toy.loss, toy.sgd(), fold=toy.fold, measure=None)
  )
  ranks = np.full(K, toy.R, np.int32)
  cohorts = [c._replace(profiles=ranks) for c in rounds.cohorts]
  rounds = rounds._replace(cohorts=cohorts)
  got = forgetting.subtracted(rounds, GONE).params['q']
  state, train = rounds.start, forgetting._program(rounds.algorithm.train)
  own = 0.0
  for cohort in rounds.cohorts:
    uploads, _, _ = train(state, cohort, rounds.base)
    product: Any = lambda q: np.matmul(q.scale[GONE] * q.a[GONE], q.b[GONE])
    change = product(tree.whole(uploads)['q']) - product(uploads.start['q'])
    own = own + shares(cohort)[GONE] * change
    state, _ = forgetting._program(rounds.algorithm.aggregate)(
      state, uploads, rounds.base
    )
  whole = state.params['q']
  served: Any = lambda q: np.float64(q.residual) + np.matmul(q.scale * q.a, q.b)
  np.testing.assert_allclose(
    served(whole) - served(got), own, rtol=1e-4, atol=1e-5
  )
  assert np.abs(own).max() > 0.01


def test_calibration_gives_new_updates_their_old_lengths(rounds):
  one = rounds._replace(cohorts=rounds.cohorts[:1])
  # In the first round, with all steps, the updates are those of the run.
  toy.close(
    forgetting.calibrated(one, GONE, share=1.0).params,
    forgetting.retrained(one, GONE).params,
    1e-5,
    1e-6,
  )
  got = forgetting.calibrated(one, GONE, share=0.4).params  # one of three steps
  train = forgetting._program(rounds.algorithm.train)
  cohort = one.cohorts[0]
  old = train(rounds.start, cohort, rounds.base)[0].update
  short = cohort._replace(
    batches=jax.tree.map(lambda x: x[:, :1], cohort.batches)
  )
  new = train(rounds.start, short, rounds.base)[0].update
  size = lambda u: np.asarray(jax.vmap(tree.norm)(u), np.float64)
  weight = np.where(np.arange(K) == GONE, 0.0, cohort.weight)
  share = weight / weight.sum() * size(old) / size(new)
  want = tree.add(
    rounds.start.params, tree.weighted_sum(new, jnp.float32(share))
  )
  toy.close(got, want, 1e-4, 1e-5)


def test_ascent_moves_against_the_client_and_with_the_others(rounds):
  state = forgetting.trained(rounds)
  one = forgetting.ascended(
    *(rounds, GONE, toy.loss, state, KEY),
    num_steps=1,
    retain=2.0,
    learning_rate=0.1,
  ).params
  # The first step of the client, and of the first other client.
  mine, rest = (
    jax.tree.map(lambda x, k=k: x[k, 0], rounds.cohorts[-1].batches)
    for k in (GONE, 0)
  )

  def objective(q):
    whole = {'q': state.params['q']._replace(a=q[0], b=q[1])}
    each = [toy.loss(rounds.base, whole, x, None) for x in (mine, rest)]
    away, kept = (sums.total / sums.count for sums in each)
    return 2.0 * kept - away

  start = state.params['q'].a, state.params['q'].b
  grads = jax.jit(jax.grad(objective))(start)
  for got, p, g in zip((one['q'].a, one['q'].b), start, grads, strict=True):
    np.testing.assert_allclose(got, p - 0.1 * g, rtol=1e-4, atol=1e-5)
  assert one['q'].scale == state.params['q'].scale  # nobody trains it


def test_every_way_has_its_figures(rounds):
  other = toy.cohort(num_clients=1, seed=9).batches
  retain = [jax.tree.map(lambda x: x[0], other)]
  compare = lambda client, **more: forgetting.compared(
    rounds, client, loss=toy.loss, key=KEY, retain=retain, **more
  )
  got = compare(GONE)
  assert set(got) == {'trained', *forgetting.WAYS}
  assert got['retrained'].distance == 0.0 < got['trained'].distance
  # Everybody's loss on the client's texts is least where it was trained on.
  for way in ('retrained', 'ascended'):
    assert got[way].forget > got['trained'].forget
  assert all(np.isfinite(x) for figures in got.values() for x in figures)
  with pytest.raises(Error, match='client 9 took part in no round'):
    compare(9)
  with pytest.raises(Error, match="no way 'burnt' to forget: retrained, "):
    compare(GONE, ways=['burnt'])
