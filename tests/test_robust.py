"""Attacks, and robust rules against them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_robust as ref
import toy

from fedjax_llm import adversary, aggregators, recipes
from fedjax_llm.adversary import malicious
from fedjax_llm.aggregators import riders
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import config, experiment, sections
from fedjax_llm.types import Adapter, Error, Masks, Uploads

KEY = jax.random.key(5)
K, BAD = 9, (2, 6)
SOME = np.isin(np.arange(K), BAD)


def sent(seed=0, num=K, centre=1.0):
  """Uploads of clients with the ids 10, 11, ... around one centre."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.float32(centre + rng.normal(size=shape))
  update = {'v': draw(num, 2, 2), 'w': draw(num, 3)}
  return Uploads(
    update,
    update,
    Masks(None, None),
    np.arange(1.0, num + 1, dtype=np.float32),
    np.ones(num, bool),
    ids=np.arange(10, 10 + num),
  )


def flat(update, num=K):
  leaves = jax.tree.leaves(update)
  return np.concatenate([np.float64(x).reshape(num, -1) for x in leaves], 1)


PARAMS = {'v': jnp.zeros((2, 2)), 'w': jnp.zeros(3)}
RULES = {
  'bucketing': aggregators.bucketing(size=2),
  'bucketing_of_one': aggregators.bucketing(size=1),
  'bucketing_of_all': aggregators.bucketing(size=K),
  'centred_clipping': aggregators.centred_clipping(radius=2.0, iterations=3),
  'centred_wide': aggregators.centred_clipping(radius=1e6),
  'foolsgold': aggregators.foolsgold(confidence=1.5),
  'geometric_median': aggregators.geometric_median(iterations=20),
  'krum': aggregators.krum(2),
  'mean': aggregators.mean(),
  'median': aggregators.median(),
  'nearest_mixing': aggregators.nearest_mixing(byzantine_fraction=0.25),
  'nearest_of_all': aggregators.nearest_mixing(byzantine_fraction=0.0),
  'norm_bounding': aggregators.norm_bounding(bound=2.0),
  'norm_wide': aggregators.norm_bounding(bound=1e6),
  'trimmed_mean': aggregators.trimmed_mean(0.25),
  'uniform_mean': aggregators.uniform_mean(),
}


@jax.jit  # one program for all of them
def all_rules(uploads):
  results = {}
  for name, rule in RULES.items():
    one = aggregators.as_stack(rule)
    state = one.init(PARAMS, KEY)
    result, _ = one.aggregate(uploads, state, PARAMS, KEY)
    results[name] = jnp.concatenate(
      [jnp.ravel(x) for x in jax.tree.leaves(result.delta)]
    )
  return results


@functools.cache
def outcome(seed=0):
  return all_rules(sent(seed))


def near(x, y, atol=2e-5):
  np.testing.assert_allclose(x, y, rtol=2e-5, atol=atol)


# -------------------------------------------------------------- references --


@pytest.mark.parametrize('seed', [0, 1])
def test_rules_match_their_references(seed):
  got, uploads = outcome(seed), sent(seed)
  u, weight = flat(uploads.update), np.float64(uploads.weight)
  near(got['geometric_median'], ref.geometric_median(u, 20, 1e-6))
  near(got['norm_bounding'], ref.norm_bounding(u, weight, 2.0))
  near(got['centred_clipping'], ref.centred_clipping(u, np.zeros(7), 2.0, 3))
  near(got['nearest_mixing'], np.median(ref.nearest_mixing(u, 2), 0))
  a = ref.foolsgold(u, 1.5)
  if seed == 0:
    assert np.any((a > 0) & (a < 1))  # neither all nor nothing
  near(got['foolsgold'], a @ u / a.sum(), 1e-4)


def test_centred_clipping_goes_on_from_the_last_result():
  rule = aggregators.centred_clipping(radius=0.5, iterations=2)
  step = jax.jit(lambda u, s: rule.aggregate(u, s, PARAMS, KEY))
  state, centre = rule.init(PARAMS, KEY), np.zeros(7)
  for seed in (0, 1):
    result, state = step(sent(seed), state)
    centre = ref.centred_clipping(flat(sent(seed).update), centre, 0.5, 2)
    got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(result.delta)])
    near(got, centre)


def test_foolsgold_remembers_the_updates_of_every_client():
  rule = aggregators.foolsgold(num_clients=8)
  step = jax.jit(lambda u, s: rule.aggregate(u, s, PARAMS, KEY))
  state, history = rule.init(PARAMS, KEY), np.zeros((8, 7))
  for seed, ids in ((0, [5, 1, 3, 7]), (1, [1, 0, 7, 6])):
    uploads = sent(seed, num=4, centre=0.0)._replace(ids=np.array(ids))
    u = flat(uploads.update, 4)
    history[ids] += u
    a = ref.foolsgold(history[ids], 1.0)
    result, state = step(uploads, state)
    got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(result.delta)])
    near(got, a @ u / a.sum(), 1e-4)
    near(flat(state, 8), history)
  with pytest.raises(Error, match='a memory needs the ids of clients'):
    rule.aggregate(uploads._replace(ids=None), state, PARAMS, KEY)


# -------------------------------------------------------------- identities --


def test_rules_without_anything_to_cut_are_means():
  got = outcome()
  near(got['norm_wide'], got['mean'])
  near(got['centred_wide'], got['uniform_mean'])
  near(got['nearest_of_all'], got['uniform_mean'])
  near(got['bucketing_of_all'], got['uniform_mean'])
  near(got['bucketing_of_one'], got['median'], 0)
  assert np.abs(got['mean'] - got['uniform_mean']).max() > 1e-3


def test_buckets_depend_on_the_ids_of_clients_not_on_their_rows():
  uploads = sent()
  order = np.random.default_rng(3).permutation(K)
  moved = jax.tree.map(lambda x: x[order], uploads)
  near(all_rules(moved)['bucketing'], outcome()['bucketing'], 1e-6)
  other = uploads._replace(ids=uploads.ids[order])  # the same rows, other ids
  assert np.abs(
    all_rules(other)['bucketing'] - outcome()['bucketing']
  ).max() > (1e-3)


@pytest.mark.parametrize('wrap', ['bucketing', 'nearest_mixing'])
def test_rules_on_products_of_clients_are_not_given_means(wrap):
  with pytest.raises(Error, match=f'{wrap} hands means of factors'):
    getattr(aggregators, wrap)(aggregators.flexlora())
  with pytest.raises(Error, match=f'{wrap}: inner is the builder median'):
    getattr(aggregators, wrap)(aggregators.median)


# --------------------------------------------------------- breakdown points --


def pushed(rows, size):
  uploads = sent()
  push = lambda u: np.float32(
    u + size * rows.reshape((-1,) + (1,) * (u.ndim - 1))
  )
  return uploads._replace(update=jax.tree.map(push, uploads.update))


BREAK = ('geometric_median', 'nearest_mixing', 'bucketing', 'median')


def test_below_the_breakdown_point_the_error_does_not_grow_with_the_attack():
  honest = flat(sent().update)[~SOME]
  largest = np.linalg.norm(honest, axis=1).max()
  for size in (1e3, 1e5):
    got = all_rules(pushed(SOME, size))
    # arXiv 1912.13445, lemma 2 (for the exact median), with m = 2 of n = 9.
    bound = 2 * (K - 2) / (K - 4) * largest
    for name in (*BREAK, 'krum', 'trimmed_mean'):
      assert np.linalg.norm(got[name]) <= bound, (name, size)
    assert np.linalg.norm(got['norm_bounding']) <= 2.0 + 1e-5
    assert np.linalg.norm(got['centred_clipping']) <= 3 * 2.0 + 1e-5
    assert np.linalg.norm(got['mean']) > size / 10


def test_above_the_breakdown_point_the_attack_wins():
  got = all_rules(pushed(np.arange(K) < 5, 1e4))
  for name in BREAK:
    assert np.abs(got[name]).min() > 1e3, name


# ----------------------------------------------------------------- products --


def factored(seed=0, num=6):
  """Ends of K clients, of which the last has another product."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  a, b = draw(4, 2), draw(2, 3)
  ends = []
  for k in range(num):
    turn = draw(2, 2)  # the same product, up to noise, in other factors
    node = LowRank(
      a=jnp.float32(a @ turn),
      b=jnp.float32(np.linalg.solve(turn, b) + 0.02 * draw(2, 3)),
      scale=jnp.float32(0.5),
    )
    if k == num - 1:  # each factor is as far away as any other
      node = node._replace(b=-node.b)
    ends.append({'q': node, 'bias': jnp.float32(0.1 * draw(2))})
  server = {
    'q': ends[0]['q']._replace(b=jnp.zeros((2, 3))),
    'bias': jnp.ones(2),
  }
  return aggregators.received(server, ends), server, ends


def dense(node) -> Any:
  a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
  return float(node.scale) * a @ b


def everything(params):
  """The product and the other leaves as one vector."""
  return np.concatenate(
    [dense(params['q']).ravel(), np.float64(params['bias'])]
  )


def test_product_krum_takes_the_client_in_the_middle_of_products():
  uploads, server, ends = factored()
  rule = aggregators.product_krum(byzantine_fraction=0.2)
  result, _ = jax.jit(lambda u: rule.aggregate(u, (), server, KEY))(uploads)
  rows = np.stack([everything(end) for end in ends])
  apart = np.sum((rows[:, None] - rows) ** 2, -1)
  score = [np.sort(np.delete(apart[k], k))[:3].sum() for k in range(6)]
  best = int(np.argmin(score))
  new = jax.tree.map(
    lambda p, d: p if d is None else p + d,
    server,
    result.delta,
    is_leaf=lambda x: x is None,
  )
  near(everything(new), rows[best])
  update = flat(uploads.update, 6)
  factors = np.sum((update[:, None] - update) ** 2, -1)
  plain = [np.sort(np.delete(factors[k], k))[:3].sum() for k in range(6)]
  assert int(np.argmin(plain)) != best  # Krum on factors takes another


def test_the_product_geometric_median_is_that_of_dense_matrices():
  uploads, server, ends = factored(1)
  zero = jnp.zeros_like(uploads.update['bias'])
  uploads = uploads._replace(update={**uploads.update, 'bias': zero})
  rule = aggregators.product_geometric_median(iterations=12)
  state = rule.init(server, KEY)
  result, _ = jax.jit(lambda u: rule.aggregate(u, state, server, KEY))(uploads)
  products = np.stack([dense(end['q']) for end in ends])
  apart = np.linalg.norm(
    (products[:, None] - products).reshape(6, 6, -1), axis=2
  )
  near_ones = np.argsort(apart, axis=1)[:, :4]
  radius = np.take_along_axis(apart, near_ones, 1).max(1)
  want = ref.product_geometric_median(
    products, near_ones[np.argmin(radius)], 12, 1e-6
  )
  u, s, v = np.linalg.svd(want)
  want = (u[:, :2] * s[:2]) @ v[:2]
  got = dense(
    server['q']._replace(a=result.assign['q'].a, b=result.assign['q'].b)
  )
  near(got, want, 2e-3)
  assert np.abs(want - products.mean(0)).max() > 0.05


# ------------------------------------------------------------------ attacks --

BY_ID: Any = dict(clients=[10 + k for k in BAD])
ATTACKS = {
  'alie': adversary.alie(**BY_ID),
  'alie_blind': adversary.alie(z=1.0, omniscient=False, **BY_ID),
  'free_riders': adversary.free_riders(**BY_ID),
  'gaussian': adversary.gaussian(std=50.0, **BY_ID),
  'ipm': adversary.ipm(scale=4.0, **BY_ID),
  'model_replacement': adversary.model_replacement(**BY_ID),
  'sign_flip': adversary.sign_flip(scale=30.0, **BY_ID),
}


@pytest.fixture(scope='module')
def attacked():
  run = jax.jit(lambda u: {n: fn(u, KEY).update for n, fn in ATTACKS.items()})
  return run(sent())


def test_attacks_match_their_equations(attacked):
  u, weight = flat(sent().update), np.arange(1.0, K + 1)
  rows = {name: flat(update) for name, update in attacked.items()}
  for name, got in rows.items():
    np.testing.assert_array_equal(got[~SOME], u[~SOME], err_msg=name)
  bad = {name: got[SOME] for name, got in rows.items()}
  near(bad['sign_flip'], -30 * u[SOME])
  near(bad['free_riders'], np.zeros((2, 7)), 0)
  near(bad['model_replacement'], weight.sum() / weight[SOME].sum() * u[SOME])
  near(bad['ipm'], np.stack([ref.ipm(u, SOME, 4.0)] * 2))
  near(bad['alie'], np.stack([ref.alie(u, SOME)] * 2))
  near(bad['alie_blind'], np.stack([ref.alie(u, ~SOME, 1.0)] * 2))
  assert 10 < np.std(bad['gaussian']) < 120
  assert np.abs(bad['gaussian'][0] - bad['gaussian'][1]).min() > 0


def test_the_deviations_of_alie_are_those_of_the_paper():
  """n = 50 and m = 24: s = 2, and Phi(z) = 24 / 26 gives z = 1.43."""
  update = np.zeros((50, 1), np.float32)
  update[24:] = np.where(np.arange(26) % 2, 1, -1)[:, None]  # mean 0, std 1
  ones = np.ones(50, np.float32)
  masks = Masks(None, None)
  uploads = Uploads(update, None, masks, ones, ones > 0, ids=np.arange(50))
  got = adversary.alie(clients=range(24))(uploads, KEY).update
  assert round(-float(got[0, 0]), 2) == 1.43


def test_attacks_depend_on_ids_and_on_who_reports():
  uploads = sent()
  order = np.random.default_rng(1).permutation(K)
  moved = jax.tree.map(lambda x: x[order], uploads)
  for name in ('gaussian', 'alie'):
    got = flat(ATTACKS[name](moved, KEY).update)
    near(got, flat(ATTACKS[name](uploads, KEY).update)[order])
  gone = uploads._replace(valid=uploads.ids != 12)
  got = flat(ATTACKS['model_replacement'](gone, KEY).update)
  u = flat(uploads.update)
  near(got[2], u[2], 0)  # did not report
  near(got[6], (45 - 3) / 7 * u[6])


def test_an_attacker_does_not_write_what_it_does_not_train():
  uploads, _ = toy.uploads(4)
  held = jnp.arange(toy.R) < jnp.array([2, 1, 2, 2])[:, None]
  mask = {'q': LowRank(held, held[..., None], None)}
  uploads = uploads._replace(masks=Masks(mask, mask))
  got = adversary.gaussian(clients=[1])(uploads, KEY).update['q']
  assert not np.any(got.a[1, :, 1]) and not np.any(got.b[1, 1])
  assert np.all(got.a[1, :, 0] != uploads.update['q'].a[1, :, 0])


def test_a_fraction_is_drawn_once_by_the_seed():
  draw = lambda **more: malicious.ids(
    'x', (), **{'fraction': 0.29, 'seed': 0, 'num_clients': 100, **more}
  )
  assert len(draw()) == 29 and np.array_equal(draw(), draw())
  assert not np.array_equal(draw(), draw(seed=1))
  assert len(draw(fraction=0.0)) == 0 and len(draw(fraction=1.0)) == 100


@pytest.mark.parametrize(
  'build, sentence',
  [
    (lambda: adversary.sign_flip(fraction=1.5, num_clients=4), 'from 0 to 1'),
    (lambda: adversary.alie(fraction=0.5), 'needs num_clients'),
    (
      lambda: adversary.ipm(clients=[4], num_clients=4),
      'has 4, .* from 0 to 3',
    ),
    (lambda: adversary.ipm(scale=-1.0, clients=[0]), 'scale=-1.0 must be 0'),
    (lambda: adversary.gaussian(std=-1.0, clients=[0]), 'std=-1.0 must be 0'),
    (lambda: aggregators.norm_bounding(bound=0.0), 'bound=0.0 must be above'),
    (lambda: aggregators.centred_clipping(radius=-1.0), 'radius=-1.0 must be'),
    (lambda: aggregators.geometric_median(iterations=0), 'must be at least 1'),
    (lambda: aggregators.bucketing(size=0), 'size=0 must be at least 1'),
    (lambda: aggregators.product_krum(byzantine_fraction=0.5), 'below 0.5'),
    (lambda: aggregators.nearest_mixing(byzantine_fraction=-1.0), 'below 0.5'),
    (lambda: aggregators.foolsgold(num_clients=0), 'must be at least 1'),
  ],
)
def test_numbers_out_of_range_are_refused(build, sentence):
  with pytest.raises(Error, match=sentence):
    build()


def test_an_attack_needs_the_ids_of_clients():
  with pytest.raises(Error, match='sign_flip: the uploads have no ids'):
    ATTACKS['sign_flip'](sent()._replace(ids=None), KEY)


# ------------------------------------------------------ attacks and defences --

IN_RANGE = (
  'median',
  'trimmed_mean',
  'bucketing',
  'krum',
)  # of the honest, an entry each
COLLUDE = ('alie', 'ipm')  # both attackers send the same vector


@pytest.mark.parametrize('name', ATTACKS)
def test_what_every_defence_guarantees_against_every_attack(name, attacked):
  """Two attackers of nine: only what is proven, whatever the attack."""
  got = all_rules(sent()._replace(update=attacked[name]))
  honest = flat(sent().update)[~SOME]
  low, high = honest.min(0) - 1e-5, honest.max(0) + 1e-5
  inside = lambda x: np.all((x >= low) & (x <= high))
  for rule in IN_RANGE:
    # Krum selects a client, which may be an attacker among the honest ones.
    if rule != 'krum' or name in ('gaussian', 'sign_flip'):
      assert inside(got[rule]), rule
  largest = np.linalg.norm(honest, axis=1).max()
  bound = 2 * (K - 2) / (K - 4) * largest
  assert np.linalg.norm(got['geometric_median']) <= bound
  # The neighbours of an honest client are no further away than honest ones.
  assert np.abs(got['nearest_mixing']).max() <= 3 * largest
  assert np.linalg.norm(got['norm_bounding']) <= 2.0 + 1e-5
  assert np.linalg.norm(got['centred_clipping']) <= 6.0 + 1e-5
  if name in COLLUDE:
    assert inside(got['foolsgold'])
  if name in ('gaussian', 'sign_flip'):  # a mean has no guarantee
    assert not inside(got['mean'])


# ------------------------------------------------------------ rounds, config --


def test_a_round_sees_the_attack():
  """Free riders: the mean of five clients is that of three, times 3 / 5."""
  plain = recipes.fed_avg(
    toy.loss, toy.sgd(), aggregator=aggregators.uniform_mean()
  )
  away = recipes.fed_avg(
    toy.loss,
    toy.sgd(),
    aggregator=aggregators.uniform_mean(),
    adversary=adversary.free_riders(fraction=0.4, num_clients=5),
  )
  lazy = malicious.ids('free_riders', (), 0.4, 0, 5)
  cohort = toy.cohort(num_clients=5)
  state = plain.init(KEY, toy.params())
  honest = cohort._replace(valid=~np.isin(cohort.ids, lazy))
  one, _, _ = jax.jit(plain.round)(state, honest, toy.base())
  two, _, info = jax.jit(away.round)(state, cohort, toy.base())
  assert np.all(info.reported)
  trees = [s.params for s in (one, two, state)]
  for x, y, old in zip(*map(jax.tree.leaves, trees), strict=True):
    near(np.asarray(y - old), 0.6 * np.asarray(x - old))


def test_the_section_adversary_reaches_the_round():
  conf = {
    'num_rounds': 1,
    'algorithm': {'name': 'fed_avg'},
    'local': {'name': 'sgd', 'learning_rate': 0.1},
    'cohort': {'num_steps': 3},
    'aggregator': {'name': 'bucketing', 'of': {'name': 'uniform_mean'}},
    'adversary': {'name': 'sign_flip', 'fraction': 0.4, 'scale': 7.0},
  }
  adapter = Adapter(lambda k, b: {}, lambda b, p: b, lambda b, p: (b, p))
  build = lambda conf: experiment.algorithm(
    conf, loss=toy.loss, model=None, adapter=adapter, num_clients=5
  )
  method = build(conf)
  state = method.init(KEY, toy.params())
  cohort = toy.cohort(num_clients=5)
  run = lambda m: m.train(state, cohort, toy.base())[0].update['q'].a
  got, plain = jax.jit(
    lambda: (run(method), run(build({**conf, 'adversary': None})))
  )()
  bad = np.isin(np.arange(5), malicious.ids('', (), 0.4, 0, 5))
  near(got, np.where(bad[:, None, None], -7 * np.asarray(plain), plain))


def test_a_run_without_attacks_records_no_section():
  spec = sections.SPEC
  assert 'adversary' not in config.resolved({'num_rounds': 1}, _only(spec))
  section = {'name': 'alie', 'fraction': 0.3}
  full = config.resolved({'num_rounds': 1, 'adversary': section}, _only(spec))
  assert full['adversary'] == {
    **section, 'z': None, 'omniscient': True, 'clients': [], 'seed': 0
  }  # fmt: skip


def _only(spec):
  return spec._replace(sections={'adversary': spec.sections['adversary']})


def test_free_riders_are_left_out_by_the_spread_of_their_updates():
  """Zeros and noise; `norm_bounding` keeps the one, the mean both."""
  uploads = sent(centre=0.0, num=K)
  rng = np.random.default_rng(3)
  riders = {2: 0.0, 6: 12.0}
  update = {k: np.copy(v) for k, v in uploads.update.items()}
  for row, std in riders.items():
    for k, v in update.items():
      update[k][row] = std * rng.normal(size=v[row].shape)
  uploads = uploads._replace(update=update)
  spread = flat(update).std(1)
  middle = np.median(spread)
  z = 0.6745 * (spread - middle) / np.median(np.abs(spread - middle))
  keep = np.abs(z) <= 3.5
  assert (~keep).nonzero()[0].tolist() == [6]
  rule = aggregators.without_free_riders(threshold=2.0)
  keep = np.abs(z) <= 2.0
  assert not keep[list(riders)].any() and keep.sum() >= K - 3
  weight = np.where(keep, uploads.weight, 0.0)
  got = rule.aggregate(uploads, (), PARAMS, KEY)[0].delta
  want = np.average(flat(update), 0, weight)
  np.testing.assert_allclose(flat_one(got), want, atol=1e-5)
  bounded = aggregators.as_stack(aggregators.norm_bounding(bound=2.0))
  state = bounded.init(PARAMS, KEY)
  other = bounded.aggregate(uploads, state, PARAMS, KEY)[0].delta
  assert np.abs(flat_one(other) - want).max() > 0.05
  with pytest.raises(Error, match='threshold=0 must be above 0'):
    aggregators.without_free_riders(threshold=0)


def test_a_minority_of_smaller_ranks_is_no_free_rider():
  """Two clients train one of three columns; a third one sends zeros."""
  rng = np.random.default_rng(4)
  low, rider = [0, 1], 8
  trained = np.ones((K, 3), bool)
  trained[low, 1:] = False
  update = (rng.normal(size=(K, 40, 3)) * trained[:, None]).astype(np.float32)
  update[rider] = 0
  masks = Masks(*({'w': trained},) * 2)
  ones = np.ones(K, np.float32)
  uploads = Uploads({'w': update}, None, masks, ones, ones > 0)
  wide = update.astype(np.float64)
  spread = np.array([u[:, m].std() for u, m in zip(wide, trained)])
  middle = np.median(spread)
  z = 0.6745 * (spread - middle) / np.median(np.abs(spread - middle))
  here = jnp.ones(K, bool)
  got = riders.scores(uploads.update, here, masks.trained)
  np.testing.assert_allclose(got, z, rtol=1e-3, atol=1e-4)
  assert (np.abs(z) > 3.5).nonzero()[0].tolist() == [rider]
  unmasked = riders.scores(uploads.update, here)
  assert np.abs(unmasked)[low].min() > 3.5  # what reading no masks would do
  rule = aggregators.without_free_riders()
  result = rule.aggregate(uploads, (), {'w': jnp.zeros((40, 3))}, KEY)[0].delta
  want = aggregators.as_stack(aggregators.mean()).aggregate(
    uploads._replace(weight=np.float32(np.arange(K) != rider)), (),
    {'w': jnp.zeros((40, 3))}, KEY,
  )[0].delta  # fmt: skip
  near(result['w'], want['w'])


def flat_one(tree):
  return np.concatenate(
    [np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)]
  )
