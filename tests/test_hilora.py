"""HiLoRA: clusters by subspaces, three tiers in turn, and their products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_lora as lora
import references_spectral as ref
import toy
from test_fedlease import D, F, N, base, cohort, draw, loss

from fedjax_llm import adapters, recipes, tree
from fedjax_llm.nodes import LowRank, Tiers
from fedjax_llm.recipes.personal.hilora import penalised
from fedjax_llm.scopes import spectral
from fedjax_llm.types import Error, LossSum, Reports

KEY = jax.random.key(0)
R, C = 1, 3
WEIGHT = np.array([1.0, 2, 3, 4])


# ---------------------------------------------------------------- clusters --


def test_groups_are_those_of_the_subspaces_whatever_their_bases():
  rng = np.random.default_rng(1)
  spaces = rng.normal(size=(3, 2, 2, 12))  # groups, matrices, R, F
  own = spaces[np.arange(9) % 3] + 0.2 * rng.normal(size=(9, 2, 2, 12))
  turned = rng.normal(size=(9, 2, 2, 2)) @ own  # another basis of each
  apart = spectral.distances([turned])
  want = np.zeros((9, 9))
  for i in range(9):
    for j in range(9):
      for m in range(2):
        u, v = (np.linalg.qr(own[k, m].T)[0] for k in (i, j))
        want[i, j] += (1 - np.linalg.norm(u.T @ v) ** 2 / 2) / 2
  np.testing.assert_allclose(apart, want, atol=1e-9)
  assert spectral.groups_of(apart, most=6).tolist() == [0, 1, 2] * 3


def test_the_plan_takes_the_tiers_in_turn_and_clusters_once():
  policy = spectral.by_subspace(most=2, first_rounds=2, cluster_rounds=3)
  rows = np.eye(4)[[0, 1, 0, 1, 3]][:, None, None]
  reports = Reports([rows], np.array([2, 2, 2, 2, -1]))
  plan: Any = dict(tier=np.zeros(5), cluster=np.zeros(5), due=np.zeros(5))
  tiers, due = [], []
  for round in range(7):
    plan = policy(round, reports, plan)
    tiers.append(plan['tier'].tolist())
    due.append(bool(plan['due'].all()))
  assert [t[0] for t in tiers] == [0, 0, 1, 1, 1, 2, 2]
  assert all(len(set(t)) == 1 for t in tiers)
  assert due == [False, True, *[False] * 5]
  assert plan['cluster'].tolist() == [0, 1, 0, 1, 0]


# ------------------------------------------------------------------ rounds --


def test_the_penalty_is_the_overlap_of_the_tiers():
  low = lambda i: LowRank(
    draw(D, R, seed=i), draw(R, F, seed=i), jnp.float32(1)
  )
  pool = LowRank(draw(C, D, R), draw(C, R, F), None)
  node = Tiers(low(1), pool, low(2), jnp.eye(C)[1])
  plain = lambda *_: LossSum(jnp.float32(3), jnp.float32(5), jnp.float32(0))
  result = penalised(plain, 0.5, 0.25)(None, {'q': node}, None, None).total
  root, middle, leaf = lora.f64(node.root.b, pool.b[1], node.leaf.b)
  square = lambda x, y: np.linalg.norm(x @ y.T) ** 2
  first = square(root, middle) + square(root, leaf)
  want = 3 + 5 * (0.5 * first + 0.25 * square(middle, leaf))
  np.testing.assert_allclose(result, want, rtol=1e-5)
  product = sum(np.float64(x.a) @ x.b for x in (node.root, node.leaf))
  product += np.float64(pool.a[1]) @ pool.b[1]
  np.testing.assert_allclose(node.factors().change(), product, atol=1e-5)


@functools.cache
def run() -> Any:
  """The method, and each round's (before, after, states, uploads, info)."""
  algorithm = recipes.hilora(
    loss, toy.sgd(0.1), num_clients=N, first_rounds=1, cluster_rounds=1, most=C
  )
  params = adapters.lora(rank=R, alpha=1.0, targets='q').init(KEY, base())
  state = algorithm.init(KEY, params)
  states = tree.broadcast(algorithm.init_client(state.params), N)

  @jax.jit
  def step(state, cohort, base):
    uploads, states, info = algorithm.train(state, cohort, base)
    new, _, _ = algorithm.round(state, cohort, base)
    return new, states, uploads, info

  history = []
  for _ in range(3):
    new, after, uploads, info = step(state, cohort(states), base())
    history.append((state, new, after, uploads, info))
    state, states = algorithm.plan(new), after
  return algorithm, history


def node(tree):
  return tree['layers']['q']


def product(x):
  return np.float64(x.scale)[0] * np.float64(x.a)[0] @ np.float64(x.b)[0]


def check(before, after, update, members):
  """The tier's product is the best of rank R of its clients', not FedIT's."""
  ends = [
    np.asarray(getattr(before, name)) + np.asarray(getattr(update, name))
    for name in 'ab'
  ]
  a, b = (x[members, 0] for x in ends)
  scale = np.full(len(members), float(after.scale[0]))
  exact = lora.mean_product(a, b, scale, WEIGHT[members])
  np.testing.assert_allclose(product(after), ref.best(exact, R), atol=1e-5)
  means = np.matmul(*lora.mean_factors(a, b, WEIGHT[members]))
  assert np.abs(product(after) - scale[0] * means).max() > 1e-5
  assert np.abs(product(after) - product(before)).max() > 1e-3


def test_each_tier_is_the_best_product_of_its_clients_and_then_stays():
  algorithm, history = run()
  (start, root, _, sent, _), (mid, clusters, _, sent_2, _), last = history
  start, root, mid, clusters = (
    node(x.params) for x in (start, root, mid, clusters)
  )
  check(start.root, root.root, node(sent.update).root, np.arange(N))
  toy.close(root._replace(root=None), start._replace(root=None), rtol=0, atol=0)
  assert history[1][0].aggregator.profiles['cluster'].tolist() == [0, 1, 0, 1]
  toy.close(clusters.root, root.root, rtol=0, atol=0)
  for c in range(2):
    at = lambda x, c=c: jax.tree.map(lambda y: y[:, c], x)
    update = node(sent_2.update).middle
    mine = LowRank(update.a[:, :, c], update.b[:, :, c], None)
    check(at(mid.middle), at(clusters.middle), mine, np.arange(c, N, 2))
  np.testing.assert_array_equal(clusters.middle.a[:, 2], root.middle.a[:, 2])
  toy.close(last[1].params, last[0].params, rtol=0, atol=0)
  leaf = node(last[2].private).leaf
  assert np.ptp(np.asarray(leaf.b), axis=0).max() > 1e-3
  served = node(algorithm.personal(last[1].params, tree.take(last[2], 1)))
  assert served.cluster[0].tolist() == [0, 1, 0]
  np.testing.assert_array_equal(served.leaf.b, leaf.b[1])
  new = node(algorithm.personal(last[1].params, None))
  np.testing.assert_allclose(
    new.factors().change()[0], product(clusters.root), atol=1e-6
  )


def test_a_tier_costs_its_own_factors_up_and_those_before_it_down():
  _, history = run()
  both, report, plan = 4 * R * (D + F), 4 * R * F, 4 + 4 + 1
  up = [info.bytes_up.sum(1).tolist() for *_, info in history]
  down = [info.bytes_down.sum(1).tolist() for *_, info in history]
  assert up == [[both + report] * N, [both] * N, [0] * N]
  assert down == [[n * both + plan] * N for n in (1, 2, 2)]


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(most=1), 'most=1 must be at least 2'),
    (dict(first_rounds=0), 'first_rounds=0 must be at least 1'),
    (dict(strength=-1), 'strength=-1 must not be negative'),
    (dict(smoothing=1.0), 'smoothing=1.0 must be from 0 to below 1'),
  ],
)
def test_settings_out_of_range_are_refused(settings, words):
  with pytest.raises(Error, match=words):
    recipes.hilora(loss, toy.sgd(), num_clients=N, **settings)
