"""Selections of examples, against NumPy float64 and against a neighbour."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import clients, local, recipes
from fedjax_llm.clients import valued
from fedjax_llm.data import selection
from fedjax_llm.data.selection import coresets, orders
from fedjax_llm.run import selecting
from fedjax_llm.server import choosing
from fedjax_llm.types import Draw, Error, Example, LossSum, Population


def text(*tokens):
  return Example(np.array(tokens, np.int32), np.ones(len(tokens), bool))


OWN = [text(*range(1, n + 1)) for n in (5, 2, 4, 3)]  # by length: 1, 3, 2, 0


def order_of(chosen):
  assert chosen.order is not None
  return chosen.order([OWN])


def cohort_of(chosen, round, seed=0, num_steps=2):
  build = clients.cohorts.cohorts(
    [OWN], num_steps=num_steps, batch_size=2, max_length=6, seed=seed,
    orders=order_of(chosen),
  )  # fmt: skip
  cohort = build(Draw(np.zeros(1, np.int32), np.ones(1, bool)), round)
  return (cohort.batches.segments > 0).sum(-1).ravel()  # lengths of the rows


# ------------------------------------------------------------------ orders --


def test_a_curriculum_draws_the_easy_examples_first():
  chosen = selection.curriculum(rounds=4, start=0.25)
  count = order_of(chosen).kept
  for t in range(6):
    share = min(1.0, np.sqrt(t * (1 - 0.25**2) / 4 + 0.25**2))
    assert count(0, t) == int(np.ceil(share * 4))
    drawn = set(cohort_of(chosen, t, num_steps=4).tolist())
    assert drawn == set(sorted(len(x.tokens) for x in OWN)[: count(0, t)])
  # A linear competence is another schedule (equation 7 of the paper).
  linear = [int(np.ceil(min(1, t * 0.75 / 4 + 0.25) * 4)) for t in range(5)]
  assert [count(0, t) for t in range(5)] != linear
  same = [cohort_of(chosen, 3, seed=7) for _ in range(2)]
  np.testing.assert_array_equal(*same)  # pure in the seed and the round


def test_rarity_is_the_surprise_of_the_words():
  own = [text(1, 1, 1), text(1, 2), text(3, 2)]
  p = {1: 4 / 7, 2: 2 / 7, 3: 1 / 7}
  expected = [-sum(np.log(p[int(t)]) for t in x.tokens) for x in own]
  np.testing.assert_allclose(orders.rarity(own), expected, rtol=1e-12)


def test_examples_of_quality_are_drawn_more_often():
  chosen = selection.quality('length', temperature=0.5)
  size = np.array([5.0, 2, 4, 3])
  z = (size - size.mean()) / size.std()
  q = np.exp(z / 0.5) / np.exp(z / 0.5).sum()
  drawn = np.concatenate([cohort_of(chosen, t, num_steps=8) for t in range(99)])
  share = np.array([(drawn == n).mean() for n in size])
  margin = 4 * np.sqrt(q * (1 - q) / len(drawn))
  assert (np.abs(share - q) < margin).all()
  assert abs(q[0] - 0.25) > margin[0]  # not the uniform order


def test_the_metrics_of_a_round_count_the_examples():
  chosen = selection.curriculum(rounds=4, start=0.25)
  people = Population(('a', 'b'), (tuple(OWN), tuple(OWN)), ((), ()))
  assert chosen.order is not None
  counts = selecting.counts(people, chosen.order(people.train), False)
  draw = Draw(np.array([0, 1, -1]), np.array([True, True, False]))
  assert counts(draw, 0) == {
    'data/examples_offered': 8.0, 'data/examples_kept': 2.0,
  }  # fmt: skip
  assert selecting.counts(people, None, False)(draw, 0) == {}


# ------------------------------------------------------------- preparation --


def test_a_coreset_has_an_example_for_each_group_of_clusters():
  """Against the two levels written out; one level alone keeps more."""
  rng = np.random.default_rng(0)
  near = lambda *c: np.asarray(c) + rng.normal(size=(4, 2)) * 0.1
  ann = np.concatenate([near(0, 0), near(9, 9)])
  bob = np.concatenate([near(0, 0.2), near(5, -5)])
  eve = near(9, 9.3)

  def cluster(x):  # by the nearest of the three places
    places = np.array([[0, 0], [9, 9], [5, -5]])
    return ((x[:, None] - places) ** 2).sum(-1).argmin(1)

  owners, centers, nearest = [], [], []
  for k, own in enumerate((ann, bob, eve)):
    for label in np.unique(cluster(own)):
      center = own[cluster(own) == label].mean(0)
      owners.append(k)
      centers.append(center)
      nearest.append(int(((own - center) ** 2).sum(1).argmin()))
  centers = np.stack(centers)
  expected = [set(), set(), set()]
  for label in range(3):
    group = np.flatnonzero(cluster(centers) == label)
    middle = centers[group].mean(0)
    best = group[((centers[group] - middle) ** 2).sum(1).argmin()]
    expected[owners[best]].add(nearest[best])
  for k in range(3):  # every client trains
    expected[k] = expected[k] or {nearest[owners.index(k)]}
  kept = coresets.two_levels([ann, bob, eve], cluster)
  assert [set(x.tolist()) for x in kept] == expected
  assert sum(map(len, kept)) < len(owners)  # the server's level leaves some out


def test_a_selection_of_few_points_keeps_the_middle():
  one = np.array([[0.0, 0], [1, 0]])
  never = lambda x: pytest.fail('two points are no clusters')
  kept = coresets.two_levels([one * 1.0, one[:1]], never)
  assert [x.tolist() for x in kept] == [[0], [0]]


def test_near_duplicates_are_left_out():
  pytest.importorskip('datasketch')
  rng = np.random.default_rng(0)
  draw = [rng.integers(0, 50, 60) for _ in range(2)]
  near = np.where(np.arange(60) == 3, 51, draw[0])
  half = np.concatenate([draw[0][:30], draw[1][:30]])
  own = [text(*x) for x in (draw[0], near, draw[1], draw[0], half)]
  sets = [{tuple(x.tokens[i : i + 5]) for i in range(56)} for x in own]
  jaccard = lambda a, b: len(a & b) / len(a | b)
  kept: list[int] = []
  for i, one in enumerate(sets):
    if all(jaccard(one, sets[k]) < 0.7 for k in kept):
      kept.append(i)
  chosen = selection.near_duplicates(0.7)
  assert chosen.prepare is not None
  places = chosen.prepare([own], lambda x: np.zeros(0), 0)
  assert places[0].tolist() == kept == [0, 2, 4]  # exact copies: 1 would stay


def test_hdbscan_of_the_package_finds_the_groups():
  pytest.importorskip('sklearn')
  rng = np.random.default_rng(0)
  own = np.concatenate([rng.normal(size=(8, 4)) * 0.1 + at for at in (0, 5)])
  chosen = selection.fed_hds(min_cluster=3)
  assert chosen.prepare is not None
  places = chosen.prepare([own.tolist()], np.array, 0)[0]
  assert [(place < 8) for place in places] == [True, False]
  # Fewer examples than a group has are no group: one is kept.
  large = selection.fed_hds(min_cluster=6)
  assert large.prepare is not None
  (few,) = large.prepare([own[:4].tolist()], np.array, 0)
  assert len(few) == 1


# ------------------------------------------------------------------ scored --


def row_loss(base, params, batch, key):
  """(w - x)^2 of each row x of a batch [B, 2]; rows of NaN are padding."""
  real = ~jnp.isnan(batch[:, 0])
  x = jnp.where(real[:, None], batch, 0)
  total = jnp.where(real, x[:, 1] * (params['w'] - x[:, 0]) ** 2, 0)
  return LossSum(total, real.astype(jnp.float32), total)


def loss(base, params, batch, key):
  return LossSum(*(jnp.sum(x) for x in row_loss(base, params, batch, key)))


@pytest.mark.parametrize('by', ['loss', 'gradient'])
def test_rows_of_the_largest_scores_are_trained(by):
  """One round of SGD in NumPy float64; the other score trains other rows."""
  rng = np.random.default_rng(2)
  x = rng.normal(size=(2, 4, 2, 2))  # [K, pool S, B, (x, curvature)]
  x[..., 1] = 10.0 ** rng.uniform(-2, 0.7, x.shape[:-1])
  x[1, 3] = np.nan  # two rows of padding
  w, rate = 0.5, 0.1
  scores = {
    'loss': x[..., 1] * (w - x[..., 0]) ** 2,
    'gradient': np.abs(2 * x[..., 1] * (w - x[..., 0])),
  }
  ends = {}
  for name, score in scores.items():
    moved = []
    for k in range(2):
      flat = np.where(np.isnan(score[k]), -np.inf, score[k]).ravel()
      best = np.sort(np.argsort(-flat, kind='stable')[:4])
      rows, p = x[k].reshape(-1, 2)[best].reshape(2, 2, 2), w
      for step in rows:
        p -= rate * np.mean(2 * step[:, 1] * (p - step[:, 0]))
      moved.append(p)
    ends[name] = np.mean(moved)
  other = 'gradient' if by == 'loss' else 'loss'
  assert abs(ends[by] - ends[other]) > 1e-3

  inner = recipes.fed_avg(loss, local.optimizer('sgd', rate))
  score = getattr(choosing, f'by_{by}')(row_loss)
  method = choosing.choosing(inner, score, 2)
  state = method.init(tiny.KEY, {'w': jnp.float32(w)})
  cohort = tiny.cohort(batches=x.astype(np.float32), ids=[4, 1])
  cohort = cohort._replace(weight=np.ones(2, np.float32))
  new, _, info = jax.jit(method.round)(state, cohort)
  np.testing.assert_allclose(new.params['w'], ends[by], rtol=1e-5)
  assert int(info.metrics['data/examples_offered']) == 14
  assert int(info.metrics['data/examples_kept']) == 8
  assert method.train is not None and method.aggregate is not None
  uploads, _, more = jax.jit(method.train)(state, cohort)
  halves, _ = method.aggregate(state, uploads)
  np.testing.assert_allclose(halves.params['w'], new.params['w'], rtol=1e-6)
  assert int(more.metrics['data/examples_kept']) == 8


# ------------------------------------------------------------------ clients --


def test_clients_of_value_are_drawn_more_often(tmp_path):
  file = tmp_path / 'values.json'
  file.write_text(json.dumps({'values': {'ann': 1.0, 'bob': 3.0}}))
  sample = valued.by_value(
    3, 1, path=str(file), temperature=2.0, names=['ann', 'bob', 'eve']
  )
  z = np.array([-1.0, 1.0, 0.0])  # eve has no value: the mean
  q = np.exp(z / 2) / np.exp(z / 2).sum()
  ids = np.array([int(sample(t).ids[0]) for t in range(2000)])
  share = np.array([(ids == k).mean() for k in range(3)])
  margin = 4 * np.sqrt(q * (1 - q) / len(ids))
  assert (np.abs(share - q) < margin).all()
  assert abs(q[1] - 1 / 3) > margin[1]  # not uniform
  with pytest.raises(Error) as error:
    valued.by_value(1, 1, path='nowhere', names=['ann'])
  assert str(error.value) == (
    'clients.path is nowhere: it is no file of `replay --values ... --json`.'
  )


def test_the_best_values_are_drawn_at_any_temperature(tmp_path):
  """exp(z / tau) would be infinite, or zero for all but one client."""
  file = tmp_path / 'values.json'
  values = {f'c{i}': float(i) for i in range(5)}
  file.write_text(json.dumps({'values': values}))
  draw = lambda tau, size, **more: valued.by_value(
    5, size, path=str(file), temperature=tau, names=list(values), **more
  )
  for tau in (1e-3, 1e-320):
    for number in range(20):
      assert draw(tau, 3)(number).ids.tolist() == [2, 3, 4]
  # The cohort has its three clients where some have no examples; those never.
  sizes = [9, 9, 0, 9, 9]
  assert draw(1e-3, 3, sizes=sizes)(0).ids.tolist() == [1, 3, 4]
  for number in range(20):
    assert draw(1.0, 4, sizes=sizes)(number).ids.tolist() == [0, 1, 3, 4]


def test_wrong_selections_are_refused():
  cases = {
    'selection.pool is 1; it must be at least 2.': lambda: selection.by_loss(1),
    'selection.rounds is 0; it must be at least 1.': (
      lambda: selection.curriculum(0)
    ),
    "selection.score is 'x'; it is one of length, rarity.": (
      lambda: selection.quality('x')
    ),
    'selection.threshold is 1; it is a similarity between 0 and 1.': (
      lambda: selection.near_duplicates(1)
    ),
  }
  for sentence, build in cases.items():
    with pytest.raises(Error) as error:
      build()
    assert str(error.value) == sentence
  conf = {'selection': {'name': 'by_loss'}, 'cohort': {'packing': True}}
  with pytest.raises(Error, match='leave packing out'):
    selecting.of(conf)
