"""Selective tuning: biases, and layers that the host chooses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest
from prompted import IDS, K, N, S, apart, close

from fedjax_llm import recipes
from fedjax_llm.recipes.selective import selective_layers as chosen
from fedjax_llm.types import Error

RATE = 0.5
L, R = 3, 2
BUDGETS = np.array([1, 1, 2, 1, 2, 3], np.int32)

# -------------------------------------------------------------- the choice --


def best(norms, budgets, strength):
  """The largest objective over every choice within the budgets."""
  layers = norms.shape[1]
  rows = list(itertools.product((0, 1), repeat=layers))
  every = itertools.product(
    *([z for z in rows if sum(z) <= r] for r in budgets)
  )
  return max(chosen.objective(np.array(z), norms, strength) for z in every)


@pytest.mark.parametrize('seed', range(6))
def test_a_choice_alone_or_in_agreement_is_the_best_of_all(seed):
  rng = np.random.default_rng(seed)
  norms = rng.random((3, 3))
  for budgets, strength in (([1, 2, 1], 0.0), ([2, 2, 2], 10.0)):
    z = chosen.choose(norms, np.array(budgets), strength)
    assert (z.sum(1) <= budgets).all()
    value = chosen.objective(z, norms, strength)
    assert value == pytest.approx(best(norms, budgets, strength))


def test_a_choice_between_is_nearly_the_best_of_all():
  """Coordinate ascent from two starts: within a twentieth on these cases."""
  for seed in range(8):
    norms = np.random.default_rng(seed).random((3, 3))
    z = chosen.choose(norms, np.array([1, 2, 2]), 0.05)
    value, most = chosen.objective(z, norms, 0.05), best(norms, [1, 2, 2], 0.05)
    assert most - value <= 0.05 * most


def test_agreement_takes_the_layers_with_the_largest_sum():
  norms = np.random.default_rng(3).random((4, 5))
  z = chosen.choose(norms, np.full(4, 2), 100.0)
  want = np.zeros(5, bool)
  want[np.argsort(-norms.sum(0))[:2]] = True
  assert (z == want).all()
  alone = chosen.choose(norms, np.full(4, 2), 0.0)
  assert len({row.tobytes() for row in alone}) > 1


# --------------------------------------------------------------- the method --


@functools.cache
def history(rounds=3, strength=0.0, budgets=tuple(BUDGETS)):
  algorithm = recipes.selective_layers(
    toy.deep_loss,
    toy.sgd(RATE),
    num_clients=N,
    profiles={'layers': np.array(budgets)},
    strength=strength,
    upload=toy.watched(),
  )
  assert algorithm.plan is not None
  state = algorithm.init(toy.KEY, toy.stacked(L, R))
  fresh = algorithm.init_client(state.params)
  states = jax.tree.map(lambda x: jnp.stack([x] * K), fresh)
  step, seen = jax.jit(algorithm.round), []
  for number in range(rounds):
    cohort = toy.cohort(seed=30 + number)._replace(states=states)
    new, states, info = step(state, cohort, toy.base())
    seen.append((state, new, states, info))
    state = algorithm.plan(new)
  return seen


def reference(rounds=3, budgets=BUDGETS):
  q = toy.stacked(L, R)['layers']['q']
  a, b = toy.f64(q.a), toy.f64(q.b)
  plan = np.zeros((N, L), bool)
  for k, r in enumerate(budgets):
    plan[k, L - r :] = True
  path = []
  for number in range(rounds):
    batch = toy.cohort(seed=30 + number).batches
    total, moved = np.zeros(L), [np.zeros_like(a), np.zeros_like(b)]
    norms = np.zeros((K, L))
    for k, client in enumerate(IDS):
      data = [toy.rows_of(batch, k, s) for s in range(S)]
      count = sum(len(y) for _, y in data)
      whole = lambda a, b, data=data, count=count: (
        sum(toy.deep_nll(d, a, b) * len(d[1]) for d in data) / count
      )
      g = toy.slope(lambda x, f=whole, b=b: f(x, b), a)
      h = toy.slope(lambda x, f=whole, a=a: f(a, x), b)
      norms[k] = (g**2).sum((1, 2)) + (h**2).sum((1, 2))
      mask, end = plan[client] * 1.0, (a, b)
      for d in data:
        end = toy.deep_step(d, *end, RATE, mask)
      w = toy.WEIGHT[k]
      total += w * mask
      moved = [m + w * (e - x) for m, e, x in zip(moved, end, (a, b))]
    share = np.where(total > 0, total, 1.0).reshape(-1, 1, 1)
    a, b = a + moved[0] / share, b + moved[1] / share
    path.append((plan.copy(), a, b))
    for k, client in enumerate(IDS):
      row = np.zeros(L, bool)
      row[np.argsort(-norms[k])[: budgets[client]]] = True
      plan[client] = row
  return path


def test_selective_layers_equal_a_float64_loop():
  for (state, new, _, _), (plan, a, b) in zip(
    history(), reference(), strict=True
  ):
    got = np.asarray(state.aggregator.profiles['chosen'])
    np.testing.assert_array_equal(got, plan)
    close(new.params['layers']['q'].a, a)
    close(new.params['layers']['q'].b, b)
  first, last = history()[0][0], history()[-1][0]
  assert (  # reports changed the plan
    np.asarray(first.aggregator.profiles['chosen'])
    != np.asarray(last.aggregator.profiles['chosen'])
  ).any()


def test_bytes_are_those_of_the_chosen_layers():
  for state, _, states, info in history():
    plan = np.asarray(state.aggregator.profiles['chosen'])
    for k, client in enumerate(IDS):
      size = 4 * 2 * toy.D * R * plan[client].sum()
      assert len(toy.wire(states, k)) == size
      assert info.bytes_up[k].sum() == size + 4 * L  # and the norms
      assert info.bytes_down[k].sum() == 4 * 2 * toy.D * R * L + L


def test_with_all_layers_for_all_it_is_fed_avg():
  (_, new, _, _), *_ = history(1, budgets=(L,) * N)
  plain = recipes.fed_avg(toy.deep_loss, toy.sgd(RATE))
  cohorts = [toy.cohort(seed=30)]
  end = toy.run(plain, toy.stacked(L, R), 1, cohorts)[-1][0]
  close(new.params['layers']['q'].a, end.params['layers']['q'].a)
  (_, other, _, _), *_ = history(1)
  apart(other.params['layers']['q'].a, end.params['layers']['q'].a)


def test_a_strong_agreement_makes_all_reporters_train_the_same_layers():
  seen = history(2, strength=1e6, budgets=(2,) * N)
  plan = np.asarray(seen[1][0].aggregator.profiles['chosen'])
  assert (plan == plan[0]).all() and plan[0].sum() == 2


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(), 'selective_layers needs the number of layers that each client can '
     'train: profiles.name=layers.'),
    (dict(profiles={'layers': BUDGETS}, strength=-1.0), 'algorithm.strength is '
     '-1.0; it must be 0 or more.'),
  ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(settings, message):
  with pytest.raises(Error) as error:
    recipes.selective_layers(toy.LOSS, toy.sgd(), num_clients=N, **settings)
  assert str(error.value) == message


# ------------------------------------------------------------------- FedBF --


def test_fed_bf_trains_biases_alone():
  params = {**toy.factors(), 'out': {'bias': jnp.zeros(toy.D)}}
  algorithm = recipes.fed_bf(
    toy.LOSS, toy.sgd(RATE), also='', upload=toy.watched()
  )
  state, states, info = toy.run(algorithm, params, 2)[-1]
  q, batch, bias = params['q'], toy.cohort().batches, np.zeros(toy.D)
  change = 0.5 * np.asarray(q.a, float) @ np.asarray(q.b, float)
  for _ in range(2):
    ends = []
    for k in range(K):
      mine = bias
      for s in range(S):
        tokens, label = toy.rows_of(batch, k, s)
        h = toy.hidden(tokens, None, change)
        of = lambda x, h=h, label=label: toy.nll(toy.logits(h + x), label)
        mine = mine - RATE * toy.slope(of, mine)
      ends.append(mine)
    bias = toy.mean(ends)
  close(state.params['out']['bias'], bias)
  np.testing.assert_array_equal(state.params['q'].a, q.a)
  for k in range(K):
    size = 4 * toy.D
    assert len(toy.wire(states, k)) == info.bytes_up[k].sum() == size
  every = recipes.fed_avg(toy.LOSS, toy.sgd(RATE))
  apart(toy.run(every, params, 2)[-1][0].params['out']['bias'], bias)


def test_fed_bf_trains_a_head_too():
  params = {'classifier': {'kernel': jnp.ones(2)}, 'q': {'bias': jnp.ones(2)}}
  algorithm = recipes.fed_bf(toy.LOSS, toy.sgd())
  kept = algorithm.init_client(params)
  assert kept.private is None
  from fedjax_llm.recipes.selective.fed_bf import _biases

  labels = _biases('^classifier/').labels({**params, 'other': jnp.ones(3)})
  assert labels['classifier']['kernel'].value == 'shared'
  assert labels['q']['bias'].value == 'shared'
  assert labels['other'].value == 'frozen'
