"""Rules that mix clients otherwise than by one mean: float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import aggregators, local, recipes, tree
from fedjax_llm.aggregators import mixing
from fedjax_llm.nodes import Prompt
from fedjax_llm.recipes import rows
from fedjax_llm.types import Error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 2, 3))
STACK = {'a': jnp.float32(X[:, :1]), 'b': jnp.float32(X[:, 1:])}
W = np.array([1.0, 2.0, 0.0, 4.0, 0.5])


def close(x, y, atol=1e-5):
  np.testing.assert_allclose(np.asarray(x), y, atol=atol)


def test_mix_is_a_matrix_product():
  matrix = RNG.random((5, 5))
  want = np.einsum('kj,jpd->kpd', matrix, X)
  mixed = mixing.mix(STACK, jnp.float32(matrix))
  close(mixed['a'], want[:, :1])
  close(mixed['b'], want[:, 1:])


def test_clusters():
  cluster = [0, 1, 0, 1, 2]
  want = np.zeros((5, 5))
  for k in range(5):
    total = sum(W[j] for j in range(5) if cluster[j] == cluster[k])
    for j in range(5):
      if cluster[j] == cluster[k]:
        want[k, j] = W[j] / total
  close(mixing.clustered(jnp.array(cluster), W), want)
  every = mixing.clustered(jnp.zeros(5, int), W)
  close(every, np.tile(W / W.sum(), (5, 1)))


def test_a_cluster_without_weight_mixes_nothing():
  matrix = mixing.clustered(jnp.array([0, 0, 1, 0, 0]), W)
  assert not np.asarray(matrix)[2].any()


def test_a_graph():
  edges = RNG.random((5, 5)) * (RNG.random((5, 5)) < 0.5)
  want = (edges + 0.3 * np.eye(5)) * W
  want /= np.maximum(want.sum(1, keepdims=True), 1e-30)
  close(mixing.graph(edges, W, own=0.3), want)
  close(mixing.graph(np.zeros((5, 5)), np.ones(5)), np.eye(5))


@pytest.mark.parametrize('temperature', [0.2, 3.0])
def test_attention(temperature):
  want = np.zeros((5, 5))
  for k in range(5):
    for j in range(5):
      x, y = X[k].ravel(), X[j].ravel()
      cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
      want[k, j] = W[j] * np.exp(cosine / temperature)
  want /= want.sum(1, keepdims=True)
  close(mixing.attention(STACK, W, temperature), want)


@pytest.mark.parametrize('num', [1, 2, 3, 9])
def test_the_nearest(num):
  want = np.zeros((5, 5))
  here = np.flatnonzero(W)
  for k in range(5):
    far = [(np.linalg.norm(X[k] - X[j]), j) for j in here]
    chosen = [j for _, j in sorted(far)[:num]]
    want[k, chosen] = 1 / len(chosen)
  close(mixing.nearest(STACK, W, num), want)


def test_sinkhorn_is_the_hungarian_matching_at_a_low_temperature():
  for seed in range(4):
    rng = np.random.default_rng(seed)
    cost = jnp.float32(rng.random((4, 4)))
    plan = np.asarray(mixing.sinkhorn(cost, 0.001, 2000))
    assert plan.argmax(1).tolist() == mixing.hungarian(cost).tolist()
    close(plan, np.eye(4)[mixing.hungarian(cost)], atol=0.05)


def test_sinkhorn_minimises_cost_and_entropy():
  """Its plan is diag(u) exp(-cost / e) diag(v), with sums of one."""
  cost = np.random.default_rng(9).random((3, 3))
  e = 0.4 * cost.mean()
  kernel, v = np.exp(-cost / e), np.ones(3)
  for _ in range(500):
    u = 1 / (kernel @ v)
    v = 1 / (kernel.T @ u)
  want = u[:, None] * kernel * v
  close(mixing.sinkhorn(jnp.float32(cost), 0.4), want)
  assert np.abs(want - np.eye(3)[mixing.hungarian(cost)]).max() > 0.1


def test_a_matched_mean_does_not_see_the_order_of_prompts():
  rows = 4 * np.eye(4, 6) + 0.1 * RNG.normal(size=(3, 4, 6))
  start = {'inputs': Prompt(jnp.float32(4 * np.eye(4, 6)))}
  weight = np.array([3.0, 1.0, 2.0])
  want = np.tensordot(weight / weight.sum(), rows, 1)
  orders = [RNG.permutation(4) for _ in rows]

  def served(rule, orders):
    ends = [{'inputs': Prompt(jnp.float32(x[o]))} for x, o in zip(rows, orders)]
    rule = aggregators.as_stack(rule)
    sent = aggregators.received(start, ends, weight=list(weight))
    result, _ = jax.jit(rule.aggregate)(
      sent, rule.init(start, jax.random.key(0)), start, jax.random.key(0)
    )
    return start['inputs'].rows + result.delta['inputs'].rows

  still = [np.arange(4)] * 3
  close(served(aggregators.matched_mean(), orders), want, atol=1e-3)
  close(served(aggregators.matched_mean(), still), want, atol=1e-3)
  close(served(aggregators.mean(), still), want)
  assert np.abs(served(aggregators.mean(), orders) - want).max() > 0.5


def rounds(matrix):
  """A round of a row a client; only clients 3, 0 and 1 of 5 take part."""
  ids, num = np.array([3, 0, 1], np.int32), 5
  method = rows.compose(
    local.sgd(toy.loss, toy.sgd()),
    num,
    lambda params, context: context.client,
    {},
    rule=mixing.mixed(matrix),
  )
  state = method.init(jax.random.key(0), toy.params())
  states = tree.broadcast(method.init_client(state.params), 3)
  cohort = toy.cohort(3, states=states)._replace(ids=ids)
  new, states, info = jax.jit(method.round)(state, cohort, toy.base())
  return method, new, states, info


def test_personal_mixtures_are_those_of_the_clients_ends():
  near = lambda stack, weight, ids: mixing.nearest(stack, weight, 2)
  _, alone, _, _ = rounds(lambda stack, weight, ids: jnp.eye(3))
  method, new, states, info = rounds(near)
  a, b = (np.asarray(x, np.float64) for x in alone.params['q'][:2])
  flat = [np.r_[a[i].ravel(), b[i].ravel()] for i in (3, 0, 1)]
  for k, i in enumerate((3, 0, 1)):
    far = [np.linalg.norm(flat[k] - x) for x in flat]
    pair = [(3, 0, 1)[j] for j in np.argsort(far)[:2]]
    close(new.params['q'].a[i], a[pair].mean(0))
    served = method.personal(new.params, tree.take(states, k))['q']
    close(served.a, a[pair].mean(0))
  np.testing.assert_array_equal(new.params['q'].a[2], toy.params()['q'].a)
  assert np.abs(new.params['q'].a[3] - a[3]).max() > 1e-3
  assert info.bytes_up.sum(1).tolist() == [4 * toy.R * (toy.D + toy.F)] * 3


def test_a_matrix_of_equal_rows_serves_everybody_the_mean():
  whole = lambda stack, weight, ids: mixing.clustered(0 * ids, weight)
  _, new, _, _ = rounds(whole)
  plain = recipes.fed_avg(toy.loss, toy.sgd())
  state = plain.init(jax.random.key(0), toy.params())
  cohort = toy.cohort(3)._replace(ids=np.array([3, 0, 1], np.int32))
  want, _, _ = jax.jit(plain.round)(state, cohort, toy.base())
  for i in (3, 0, 1):
    close(new.params['q'].a[i], want.params['q'].a)
    close(new.params['q'].b[i], want.params['q'].b)


@pytest.mark.parametrize(
  'build, message',
  [
    (lambda: mixing.nearest(STACK, W, 0), 'nearest: num=0 must be at least 1.'),
    (lambda: mixing.attention(STACK, W, 0.0), 'attention: temperature=0.0 must '
     'be above 0.'),
    (lambda: mixing.matched_mean(0.0), 'matched_mean: temperature=0.0 must be '
     'above 0.'),
    (lambda: mixing.matched_mean(steps=0), 'matched_mean: steps=0 must be at '
     'least 1.'),
  ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(build, message):
  with pytest.raises(Error) as error:
    build()
  assert str(error.value) == message
