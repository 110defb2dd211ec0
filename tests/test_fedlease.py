"""FedLEASE: clusters, the mixture of their experts, and its rounds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_spectral as ref
import toy

from fedjax_llm import adapters, recipes, tree
from fedjax_llm.models.network import layers
from fedjax_llm.nodes import Leased, LowRank
from fedjax_llm.scopes import clusters
from fedjax_llm.types import Cohort, Error, LossSum, Reports

KEY = jax.random.key(0)
N, S, B, D, F, R, E = 4, 2, 4, 5, 3, 2, 3


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


# -------------------------------------------------------------------- node --


@pytest.mark.parametrize('used, cluster', [(3, 1), (2, 0), (1, 0)])
def test_a_token_uses_the_largest_outputs_of_its_clusters_router(used, cluster):
  first = jnp.arange(E) < used
  node = Leased(
    own=LowRank(draw(D, R), draw(R, F), jnp.float32(0.5)),
    pool=LowRank(draw(E, D, R), draw(E, R, F), jnp.full(E, 0.5)),
    router=draw(E, D, 2 * E - 1),
    cluster=jnp.zeros(E).at[cluster].set(1.0),
    live=first.astype(jnp.float32),
  )
  x, zero = draw(6, D), jnp.zeros((6, F))
  result = node.act(x, zero)
  want = [
    ref.leased(
      *(t, node.pool.a, node.pool.b, 0.5, node.router[cluster], cluster, used)
    )
    for t in x
  ]
  np.testing.assert_allclose(result, want, atol=1e-5)
  gates = np.asarray(node.gates(x))
  np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)
  assert not gates[:, used:].any()
  warm = node._replace(live=jnp.zeros(E)).act(x, zero)
  np.testing.assert_allclose(warm, node.own.act(x, zero), atol=1e-6)
  if used > 1:  # the other experts count: it is not the own expert alone
    alone = 0.5 * x @ node.pool.a[cluster] @ node.pool.b[cluster]
    assert np.abs(result - alone).max() > 0.1


# ---------------------------------------------------------------- clusters --


def test_four_tasks_are_found_as_scipy_and_a_loop_find_them():
  from scipy.cluster import hierarchy
  from scipy.spatial import distance

  rng = np.random.default_rng(2)
  tasks = rng.normal(size=(4, 2, 3, 6))
  own = tasks[np.arange(12) % 4] + 0.4 * rng.normal(size=(12, 2, 3, 6))
  own *= rng.uniform(0.1, 9, (12, 1, 1, 1))  # lengths do not count
  apart = clusters.distances([own])
  flat = own.reshape(12, 2, -1)
  want = np.mean(
    [distance.cdist(x, x, 'cosine') for x in flat.swapaxes(0, 1)], 0
  )
  np.testing.assert_allclose(apart, want, atol=1e-12)
  tree_of = hierarchy.linkage(
    distance.squareform(want, checks=False), 'average'
  )
  scores = {}
  for num in range(2, 7):
    labels = hierarchy.fcluster(tree_of, num, 'maxclust')
    scores[num] = ref.silhouette(want, labels.tolist())
  assert max(scores, key=scores.__getitem__) == 4
  assert clusters.best(apart, most=6).tolist() == [0, 1, 2, 3] * 3
  two = hierarchy.fcluster(tree_of, 2, 'maxclust')
  result = clusters.best(apart, most=2)
  same = lambda x: np.equal.outer(x, x)
  np.testing.assert_array_equal(same(result), same(two))


def test_a_plan_is_made_once_and_covers_clients_without_a_report():
  policy = clusters.by_factors(most=2, after=2)
  values = draw(5, 1, 4, seed=3)
  values = np.asarray(values).copy()
  values[[1, 2]] = values[0] * [[[2.0]], [[3.0]]]
  reports = Reports([values], np.array([2, 2, 2, 2, -1]))
  old = dict(cluster=np.zeros(5), experts=np.zeros(5), due=np.zeros(5))
  assert policy(1, reports, old)['due'].all()
  assert not policy(1, reports, old)['experts'].any()
  new = policy(2, reports, old)
  assert new['cluster'].tolist() == [0, 0, 0, 1, 0]
  assert new['experts'].tolist() == [2] * 5 and not new['due'].any()
  few = Reports([values], np.array([2, 2, -1, -1, -1]))
  assert policy(2, few, old)['experts'].tolist() == [1] * 5


# ------------------------------------------------------------------ rounds --


def base():
  return {'layers': {'q': {'kernel': draw(1, D, F, seed=7) * 0.4}}}


def loss(base, params, batch, key):
  del key
  at = lambda t: tree.take(t['layers']['q'], 0)
  y = layers.linear(batch.x, at(base), at(params))
  each = 0.5 * jnp.sum((y - batch.y) ** 2, -1)
  return LossSum(jnp.sum(each), jnp.float32(B), jnp.float32(0))


def cohort(states):
  """Clients 0 and 2 have one task, 1 and 3 another."""
  # Inputs that are nearly alike: one round tells the tasks apart.
  x = np.asarray(draw(S, B, D, seed=5) + 0.2 * draw(N, S, B, D, seed=5))
  tasks = np.asarray(draw(2, D, F, seed=6))
  w = np.asarray(base()['layers']['q']['kernel'])[0] + tasks[np.arange(N) % 2]
  rows = toy.Rows(x, np.einsum('ksbd,kdf->ksbf', x, w), np.ones((N, S, B)))
  weight = np.array([1, 2, 3, 4], np.float32)
  ids, ones = np.arange(N, dtype=np.int32), np.ones(N, bool)
  return Cohort(ids, rows, weight, ones, (), states)


@functools.cache
def run() -> Any:
  """The method, and each round's (before, after, states, uploads, info)."""
  algorithm = recipes.fedlease(
    loss, toy.sgd(0.1), num_clients=N, first_rounds=1, most=E
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
  for _ in range(2):
    new, after, uploads, info = step(state, cohort(states), base())
    history.append((state, new, after, uploads, info))
    state, states = algorithm.plan(new), after
  return algorithm, history, state


def node(state):
  return state.params['layers']['q']


def test_the_warm_up_is_local_and_ends_in_the_means_of_its_clusters():
  algorithm, history, _ = run()
  before, after, states, _, _ = history[0]
  toy.close(after.params, before.params, rtol=0, atol=0)
  own = states.private['layers']['q'].own
  local = recipes.local_only(loss, toy.sgd(0.1))
  params = adapters.lora(rank=R, alpha=1.0, targets='q').init(KEY, base())
  first = local.init(KEY, params)
  start = tree.broadcast(local.init_client(params), N)
  _, want, _ = jax.jit(local.round)(first, cohort(start), base())
  mine = want.private['layers']['q']
  np.testing.assert_allclose(own.a, mine.a, atol=1e-6)
  np.testing.assert_allclose(own.b, mine.b, atol=1e-6)
  began = history[1][0]
  assert began.aggregator.profiles['cluster'].tolist() == [0, 1, 0, 1]
  pool = node(began).pool
  for e in range(2):
    for name in 'ab':
      mean = np.mean(np.asarray(getattr(own, name))[e::2], 0)  # unweighted
      np.testing.assert_allclose(getattr(pool, name)[:, e], mean, atol=1e-6)
  assert not pool.a[:, 2].any()
  served = algorithm.personal(after.params, None)['layers']['q']
  assert isinstance(served, LowRank) and not served.b.any()


def test_a_cluster_averages_its_expert_and_router_and_leaves_the_others():
  _, history, _ = run()
  before, after, states, uploads, info = history[1]
  weight = np.array([1.0, 2, 3, 4])
  old, new = node(before), node(after)
  update = uploads.update['layers']['q']
  for e in range(2):
    share = weight[e::2] / weight[e::2].sum()
    mean = lambda x, e=e, share=share: np.tensordot(
      share, np.asarray(x)[e::2, :, e], 1
    )
    for get in (lambda x: x.pool.a, lambda x: x.pool.b, lambda x: x.router):
      moved = np.asarray(get(new))[:, e] - np.asarray(get(old))[:, e]
      np.testing.assert_allclose(moved, mean(get(update)), atol=1e-6)
      assert np.abs(moved).max() > 1e-4
      assert not np.asarray(get(update))[e::2, :, 1 - e].any()
  np.testing.assert_array_equal(new.router[:, 2], old.router[:, 2])
  kept = states.private['layers']['q']
  assert kept.cluster[:, 0].argmax(-1).tolist() == [0, 1, 0, 1]
  assert kept.live[:, 0].tolist() == [[1, 1, 0]] * N
  np.testing.assert_array_equal(
    kept.own.a, history[0][2].private['layers']['q'].own.a
  )
  expert, router = 4 * R * (D + F), 4 * D * (2 * E - 1)
  assert info.bytes_up.sum(1).tolist() == [expert + router] * N
  plan = 4 + 4 + 1
  assert info.bytes_down.sum(1).tolist() == [2 * expert + router + plan] * N
  warm_up, warm_down = (
    getattr(history[0][4], f'bytes_{w}') for w in ('up', 'down')
  )
  assert warm_up.sum(1).tolist() == [expert] * N  # the report alone
  assert warm_down.sum(1).tolist() == [plan] * N


def test_settings_and_parameters_that_make_no_sense_are_refused():
  build = functools.partial(recipes.fedlease, loss, toy.sgd(), num_clients=N)
  with pytest.raises(Error, match='most=1 must be at least 2'):
    build(most=1)
  with pytest.raises(Error, match='after=0 must be at least 1'):
    build(first_rounds=0)
  with pytest.raises(Error, match=r'fedlease needs low-rank factors'):
    build().init(KEY, {'w': jnp.ones(2)})
