"""Methods on adapters behind modules: float64 references and neighbours."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest
import references_personalised
import references_prompts as ref
import toy as linear
from prompted import IDS, K, N, S, apart, close
from test_prompt_recipes import check_step

from fedjax_llm import adapters, recipes, tree
from fedjax_llm.adapters import mixing
from fedjax_llm.nodes import Activation, Bottleneck
from fedjax_llm.types import Error

RATE = 0.5

# ------------------------------------------------------------------ FedDAT --


@functools.cache
def fed_dat(**settings):
  algorithm = recipes.fed_dat(
    toy.LOSS, toy.sgd(RATE), model=toy.MODEL, upload=toy.watched(), **settings
  )
  return algorithm, toy.run(algorithm, toy.factors(), 2)


def dat_reference(gate=0.5, temperature=3.0):
  start = fed_dat()[1][0][0].params
  pair = lambda node: (np.asarray(node.a), np.asarray(node.b))
  return ref.fed_dat(
    *(toy.cohort().batches, pair(start.shared['q']), pair(start.personal['q'])),
    *(0.5, RATE, 2, K, S, gate, temperature),
  )


def test_fed_dat_equals_a_float64_loop():
  _, seen = fed_dat()
  state, states, info = seen[-1]
  shared, own = dat_reference()
  close(state.params.shared['q'].a, shared[0])
  close(state.params.shared['q'].b, shared[1])
  for k in range(K):
    close(states.private.personal['q'].a[k], own[k][0])
    close(states.private.personal['q'].b[k], own[k][1])
  apart(dat_reference(temperature=1.0)[0][0], shared[0], by=1e-4)
  apart(dat_reference(gate=1.0)[0][0], shared[0], by=1e-4)
  for k in range(K):
    size = 4 * 2 * toy.D * toy.R
    assert len(toy.wire(states, k)) == info.bytes_up[k].sum() == size
  assert info.bytes_down.sum(1).tolist() == [size] * K


def test_the_loss_of_fed_dat_falls():
  losses = [
    float(info.metrics['local/loss']) for _, _, info in fed_dat()[1][1:]
  ]
  assert losses[1] < losses[0]


def test_fed_dat_serves_the_teacher():
  algorithm, seen = fed_dat()
  state, states, _ = seen[-1]
  product = lambda q: q.scale * q.a @ q.b
  served = algorithm.personal(state.params, tree.take(states, 1))['q']
  shared = product(state.params.shared['q'])
  own = tree.take(states.private.personal['q'], 1)
  want = 0.5 * 0.5 * own.a @ own.b + 0.5 * shared
  close(product(served), want)
  close(product(algorithm.personal(state.params, None)['q']), shared)


def test_bottlenecks_side_by_side_add_their_changes():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.float32(rng.normal(size=s))

  def node(scale):
    return Bottleneck(
      *(draw(2, 4, 3), draw(2, 3, 4), draw(2, 3), draw(2, 4)),
      scale=scale,
      activation=Activation.TANH,
    )

  pair = node(None), node(draw(2))
  both = mixing.mix([{'output': x} for x in pair], (0.3, 0.7))['output']
  y = draw(5, 4)
  for layer in range(2):
    of = lambda x, layer=layer: x.__class__(*(
      f if f is None or isinstance(f, Activation) else f[layer] for f in x
    )).act(None, y) - y  # fmt: skip
    close(of(both), 0.3 * of(pair[0]) + 0.7 * of(pair[1]))


# ------------------------------------------------------------------- FedAP --


def test_a_step_of_fed_ap_is_the_mean_of_the_clients_gradients():
  check_step('fed_ap', adapters.bottleneck(2, form='houlsby'))


# ---------------------------------------------------------------- Fed-MNMT --

CLUSTERS = [1, 0, 1, 0, 0]


def mnmt(**settings):
  return recipes.fed_mnmt(
    linear.loss, linear.sgd(), num_clients=5, upload=toy.watched(), **settings
  )


def linear_rounds(algorithm, rounds=2):
  state = algorithm.init(toy.KEY, linear.params())
  states = tree.broadcast(algorithm.init_client(state.params), 5)
  step = jax.jit(algorithm.round)
  for _ in range(rounds):
    of = linear.cohort(states=states)
    state, states, info = step(state, of, linear.base())
  return state, states, info  # pyright: ignore


def mnmt_reference(clusters, weighted=False):
  q = linear.params()['q']
  data = references_personalised.clients(linear.cohort().batches)
  weight = linear.cohort().weight if weighted else np.ones(5)
  base = toy.f64(linear.base())
  held = [(toy.f64(q.a), toy.f64(q.b))] * (max(clusters) + 1)
  for _ in range(2):
    ends = [
      references_personalised.factors(
        base, 0.5, data[k], 0.1, range(3), *held[clusters[k]]
      )
      for k in range(5)
    ]
    for c in range(len(held)):
      mine = [k for k in range(5) if clusters[k] == c]
      held[c] = tuple(
        references_personalised.mean(
          [ends[k][i] for k in mine], [weight[k] for k in mine]
        )
        for i in range(2)
      )
  return held


def test_fed_mnmt_equals_a_float64_loop():
  algorithm = mnmt(num_clusters=2, clusters=CLUSTERS)
  state, states, info = linear_rounds(algorithm)
  want = mnmt_reference(CLUSTERS)
  for c in range(2):
    close(state.params['q'].a[c], want[c][0])
    close(state.params['q'].b[c], want[c][1])
  apart(mnmt_reference([0] * 5)[0][0], want[0][0])  # FedAvg
  apart(mnmt_reference(CLUSTERS, weighted=True)[0][0], want[0][0], by=1e-4)
  for k in range(5):
    served = algorithm.personal(state.params, tree.take(states, k))['q']
    close(served.a, want[CLUSTERS[k]][0])
    size = 4 * linear.R * (linear.D + linear.F)
    assert len(toy.wire(states, k)) == info.bytes_up[k].sum() == size
    assert info.bytes_down[k].sum() == size


def test_one_cluster_is_fed_avg():
  one = linear_rounds(mnmt(num_clusters=1, weighted=True))[0]
  two = linear_rounds(recipes.fed_avg(linear.loss, linear.sgd()))[0]
  linear.close(tree.take(one.params, 0), two.params)


def test_a_cluster_without_a_client_keeps_its_adapter():
  algorithm = mnmt(num_clusters=2, clusters=CLUSTERS)
  state = algorithm.init(toy.KEY, linear.params())
  states = tree.broadcast(algorithm.init_client(state.params), 5)
  of = linear.cohort(states=states)._replace(valid=np.array(CLUSTERS) == 1)
  new, _, _ = jax.jit(algorithm.round)(state, of, linear.base())
  np.testing.assert_array_equal(new.params['q'].a[0], state.params['q'].a[0])
  apart(new.params['q'].a[1], state.params['q'].a[1])


def test_drawn_clusters_are_even():
  from fedjax_llm.recipes.adapters.fed_mnmt import _table

  table = _table(None, 3, 8, 0)
  assert sorted(np.bincount(table).tolist()) == [2, 3, 3]
  assert (table != _table(None, 3, 8, 1)).any()


# -------------------------------------------------------------- FedAdapter --

L, WIDE = 2, 4


ADAPTER = dict(
  width=1, width_step=2, window=1, expand=2, cost=lambda d, w: 1.0 * d + 0 * w
)


@functools.cache
def fed_adapter(rounds=4):
  algorithm = recipes.fed_adapter(
    toy.deep_loss, toy.sgd(RATE), upload=toy.watched(), **ADAPTER
  )
  cohorts = [toy.cohort(seed=20 + r) for r in range(rounds)]
  return algorithm, toy.run(algorithm, toy.stacked(L, WIDE), rounds, cohorts)


def adapter_reference(rounds=4):
  """Three groups, windows of 2 d + 1 rounds, an accuracy before each step."""
  q = toy.stacked(L, WIDE)['layers']['q']
  arms = [(toy.f64(q.a), toy.f64(q.b))] * 3
  d, w, turn, score = 1, 1, 0, [-1.0] * 3
  path = []
  for r in range(rounds):
    shapes = [(d, w), (d, min(w + 2, WIDE)), (min(d + 1, L), w)]
    total = 2 * d + 1
    own = [max(int(total * d / x), 1) for x, _ in shapes]
    active = [i for i in range(3) if turn < own[i]]
    place = np.argsort(np.argsort(IDS))
    batch = toy.cohort(seed=20 + r).batches
    ends = {}
    for k in range(K):
      arm = active[(place[k] + r) % len(active)]
      depth, width = shapes[arm]
      mask = np.zeros((L, WIDE))
      mask[L - depth :, :width] = 1
      a, b = arms[arm][0] * mask[:, None], arms[arm][1] * mask[..., None]
      start, hits, count = (a, b), 0, 0
      for s in range(S):
        tokens, label = toy.rows_of(batch, k, s)
        see = lambda a, b, tokens=tokens: toy.logits(
          toy.hidden(tokens, None, (a @ b).sum(0))
        )
        hits += (see(a, b).argmax(-1) == label).sum()
        count += len(label)
        of = lambda a, b, see=see, label=label: toy.nll(see(a, b), label)
        g = toy.slope(lambda x, b=b, of=of: of(x, b), a)
        h = toy.slope(lambda x, a=a, of=of: of(a, x), b)
        a, b = a - RATE * g * mask[:, None], b - RATE * h * mask[..., None]
      ends.setdefault(arm, []).append(
        (toy.WEIGHT[k], a - start[0], b - start[1], hits, count)
      )
    for arm, sent in ends.items():
      total_weight = sum(x[0] for x in sent)
      arms[arm] = tuple(
        arms[arm][i] + sum(x[0] * x[1 + i] for x in sent) / total_weight
        for i in range(2)
      )
      score[arm] = sum(x[3] for x in sent) / sum(x[4] for x in sent)
    turn += 1
    if turn >= total:
      best = int(np.argmax(score))
      d, w = shapes[best]
      arms, turn, score = [arms[best]] * 3, 0, [-1.0] * 3
    path.append((d, w, turn, [a for a, _ in arms]))
  return path


def test_fed_adapter_equals_a_float64_loop():
  _, seen = fed_adapter()
  for (state, _, _), (d, w, turn, arms) in zip(
    seen[1:], adapter_reference(), strict=True
  ):
    trials = state.aggregator
    assert (int(trials.depth[0]), int(trials.width[0])) == (d, w)
    assert int(trials.turn) == turn
    for arm in range(3):
      close(state.params['layers']['q'].a[arm], arms[arm])
  assert (d, w) != (1, 1) and turn == 1  # pyright: ignore


def test_fed_adapter_counts_the_units_of_the_arm():
  _, seen = fed_adapter()
  for (before, _, _), (_, states, info) in itertools.pairwise(seen):
    trials = before.aggregator
    sizes = np.asarray(trials.depth * trials.width) * 2 * toy.D * 4
    for k in range(K):
      size = len(toy.wire(states, k))
      assert size in sizes.tolist()
      assert info.bytes_up[k].sum() == size + 8
      assert info.bytes_down[k].sum() == size + 12


def test_fed_adapter_gives_all_arms_the_winners_adapters():
  _, seen = fed_adapter()
  params = seen[3][0].params['layers']['q']  # the first window has 3 rounds
  assert int(seen[3][0].aggregator.turn) == 0
  np.testing.assert_array_equal(params.a[0], params.a[1])
  np.testing.assert_array_equal(params.a[0], params.a[2])
  apart(seen[2][0].params['layers']['q'].a[0], params.a[0], by=1e-4)


def test_adapters_that_cannot_grow_are_refused():
  algorithm = recipes.fed_adapter(toy.LOSS, toy.sgd())
  with pytest.raises(Error) as error:
    algorithm.init(toy.KEY, toy.factors())
  assert str(error.value) == (
    'fed_adapter grows bottlenecks in the layers: adapter.name=bottleneck.'
  )


@pytest.mark.parametrize(
  'name, settings, message',
  [
    ('fed_dat', dict(model=None, gate=1.5), 'algorithm.gate is 1.5; it must be '
     'between 0 and 1.'),
    ('fed_mnmt', dict(num_clients=N, num_clusters=7), 'algorithm.num_clusters '
     'is 7; it must be from 1 to the 6 clients.'),
    ('fed_mnmt', dict(num_clients=2, num_clusters=2, clusters=[0, 2]),
     'algorithm.clusters must hold a number from 0 to 1 for each of the 2 '
     'clients.'),
    ('fed_adapter', dict(width=0), 'algorithm.width is 0; it must be at least '
     '1.'),
  ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(name, settings, message):
  with pytest.raises(Error) as error:
    getattr(recipes, name)(toy.LOSS, toy.sgd(), **settings)
  assert str(error.value) == message
