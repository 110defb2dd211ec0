"""Client-level privacy: sensitivity, noise, epsilon, refused combinations."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy
from scipy import optimize, stats
from tiny import close

from fedjax_llm import aggregators, privacy, recipes, scopes, tree, uploads
from fedjax_llm.privacy import accounting
from fedjax_llm.privacy.clipping import Adaptive
from fedjax_llm.run import config, experiment, guarantee
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error, Masks, Shared, Uploads

CLIP, NOISE, DENOMINATOR = 0.2, 0.7, 4.0

NO_MASKS: Any = Masks(None, None)


def averaged(**parts):
  parts.setdefault('aggregator', privacy.noisy_mean(CLIP, NOISE, DENOMINATOR))
  return recipes.fed_avg(toy.loss, toy.sgd(), measure=None, **parts)


_compiled = functools.cache(lambda algorithm: jax.jit(algorithm.round))


def served(algorithm=None, valid=None, **parts):
  """The parameters after one compiled round of five clients."""
  algorithm = algorithm or averaged(**parts)
  cohort = toy.cohort()
  if valid is not None:
    cohort = cohort._replace(valid=np.array(valid))
  state = algorithm.init(tiny.KEY, toy.params())
  return _compiled(algorithm)(state, cohort, toy.base())[0].params


def stacked(update, valid=None):
  num = len(update['w'])
  valid = np.ones(num, bool) if valid is None else valid
  weight = np.arange(1, num + 1, dtype=np.float32) * 100  # it must not matter
  return Uploads(update, None, NO_MASKS, weight, valid)


PARAMS = {'w': jnp.zeros((3, 2)), 'b': jnp.zeros(4)}


@jax.jit
def _sum(update, valid):
  rule = privacy.noisy_mean(1.5, 1.0, 2.0)
  state = rule.init(PARAMS, tiny.KEY)
  zero = rule.zero(PARAMS)
  return rule.accumulate(zero, stacked(update, valid), state, PARAMS)


def norm(x):
  flat = [np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(x)]
  return np.linalg.norm(np.concatenate(flat))


# ------------------------------------------------------------- sensitivity --


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e8])
def test_one_client_changes_the_sum_by_at_most_the_clip_norm(scale):
  rng = np.random.default_rng(0)
  draw: Any = lambda: {
    'w': np.float32(rng.normal(size=(4, 3, 2)) * scale),
    'b': np.float32(rng.normal(size=(4, 4)) * scale),
  }
  update, valid = draw(), np.ones(4, bool)
  whole = _sum(update, valid).total
  for one in range(4):
    without = _sum(update, valid & (np.arange(4) != one)).total
    change = norm(tree.sub(whole, without))
    own = norm({k: v[one] for k, v in update.items()})
    # One norm over both leaves, and not one of each.
    slack = 1e-5 + 1e-6 * norm(whole)
    assert abs(change - min(own, 1.5)) < slack
  other = {k: np.copy(v) for k, v in update.items()}
  for k in other:
    other[k][2] = -update[k][2]
  assert norm(tree.sub(whole, _sum(other, valid).total)) <= 3.0 + 1e-5
  # Every clipped client alone is within the bound, however it is rounded.
  factor, norms = privacy.clipping.clipped(update, 1.5)
  assert (np.float64(factor) * np.float64(norms) <= 1.5).all()


# ------------------------------------------------------------------- noise --


def test_the_round_is_the_equation_with_a_public_denominator():
  """Against float64; weights and the number of reports do not matter."""
  algorithm, params = averaged(), toy.params()
  state = algorithm.init(tiny.KEY, params)
  train: Any = algorithm.train
  sent, _, _ = jax.jit(train)(state, toy.cohort(), toy.base())
  factors = sent.update['q']
  each = {name: np.float64(getattr(factors, name)) for name in 'ab'}  # [K, ..]
  norms = np.sqrt(sum((u**2).sum((1, 2)) for u in each.values()))
  assert (norms > CLIP).any()
  keep = np.array([True, False, True, True, False])
  some, none = served(algorithm, keep), served(algorithm, keep & False)
  factor = np.minimum(1, CLIP / norms) * keep / DENOMINATOR
  for name, update in each.items():
    # A round of nobody has the same noise, and nothing else.
    noise = np.float64(getattr(none['q'], name) - getattr(params['q'], name))
    assert abs(noise).max() > 0.1 * NOISE * CLIP / DENOMINATOR
    change = np.float64(getattr(some['q'], name) - getattr(none['q'], name))
    np.testing.assert_allclose(
      change, np.tensordot(factor, update, 1), atol=2e-6
    )


def test_the_noise_of_the_rule_has_the_planned_deviation():
  """sigma C / (q N) in every leaf, its own in each round and leaf."""
  rule = privacy.noisy_mean(CLIP, NOISE, DENOMINATOR)
  params = {'a': jnp.zeros((100, 100)), 'b': jnp.zeros(10_000)}
  state = rule.init(params, tiny.KEY)
  noise = jax.jit(
    lambda key: rule.finalize(rule.zero(params), state, params, key)[0].delta
  )
  one, two = noise(jax.random.key(1)), noise(jax.random.key(2))
  flat = [np.ravel(x) for x in (one['a'], one['b'], two['a'], two['b'])]
  want = NOISE * CLIP / DENOMINATOR
  for x in flat:  # 4.5 deviations of the estimate, seeds fixed
    assert abs(x.std() / want - 1) < 4.5 / math.sqrt(2 * x.size)
    assert abs(x.mean()) < 4.5 * want / math.sqrt(x.size)
  correlation = np.corrcoef(flat) - np.eye(4)
  assert abs(correlation).max() < 4.5 / 100


def test_blocks_add_the_noise_once():
  whole, blocks = (served(block_size=size) for size in (None, 2))
  close(blocks, whole, atol=2e-6)


def test_a_private_round_costs_few_operations():
  """As XLA counts them in the program before it optimises; loops count once."""
  counts = []
  for rule in (
    aggregators.uniform_mean(),
    privacy.noisy_mean(CLIP, NOISE, DENOMINATOR),
  ):
    method = recipes.fed_avg(
      tiny.loss, tiny.sgd(), aggregator=rule, measure=None
    )
    state = method.init(tiny.KEY, tiny.lora())
    cohort = tiny.cohort(steps=1)
    cohort = cohort._replace(states=tiny.fresh(method, state))
    program = jax.jit(method.round).lower(state, cohort, tiny.base())
    cost: Any = program.cost_analysis()
    counts.append(cost['flops'])
  assert 1 < counts[1] / counts[0] <= 1.05


def test_frozen_leaves_get_no_noise():
  params, scope = toy.params(), scopes.frozen('/a$')
  state = served(scope=scope)
  labels = scope.labels(params)
  same = jax.tree.map(
    lambda new, old, label: bool((new == old).all()) == (label != Shared),
    state, params, labels,
  )  # fmt: skip
  assert all(jax.tree.leaves(same))


# ---------------------------------------------------------------- adaptive --


def test_the_clip_norm_follows_the_quantile():
  """Andrew et al. 2021, algorithm 1; the noise of the count is its own."""
  rule = privacy.noisy_mean(
    1.0, 0.0, 4.0, Adaptive(0.75, 0.2, count_noise=1e-6)
  )
  update = {'w': jnp.array([[0.5], [2.0], [3.0]])}
  params = {'w': jnp.zeros(1)}
  state = rule.init(params, tiny.KEY)

  @jax.jit
  def after(update):
    zero = rule.zero(params)
    sums = rule.accumulate(zero, stacked(update), state, params)
    return rule.finalize(sums, state, params, tiny.KEY)[1]

  clip = after(update).clip
  share = (0.5 - 0.5 - 0.5) / 4 + 0.5  # one client below, two above
  assert float(clip) == pytest.approx(math.exp(-0.2 * (share - 0.75)), rel=1e-5)
  z = privacy.clipping.sum_noise(1.3, 2.0)
  assert z**-2 + (2 * 2.0) ** -2 == pytest.approx(1.3**-2)
  with pytest.raises(Error, match='must be above half'):
    privacy.noisy_mean(1.0, 1.0, 4.0, Adaptive())


# -------------------------------------------------------------- accounting --


def gaussian(noise: float, rounds: int, delta: float) -> float:
  """Epsilon of T Gaussian mechanisms (Balle and Wang 2018, theorem 8)."""
  mu = math.sqrt(rounds) / noise

  def excess(e):
    first = stats.norm.cdf(mu / 2 - e / mu)
    return first - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu) - delta

  root: Any = optimize.brentq(excess, 0, 200)
  return root


def test_epsilon_of_gaussians_is_that_of_the_closed_form():
  pytest.importorskip('dp_accounting')
  for noise, rounds in ((2.0, 1), (8.0, 16)):
    exact = gaussian(noise, rounds, 1e-5)
    at: Any = dict(
      noise_multiplier=noise, rate=1.0, num_rounds=rounds, delta=1e-5
    )
    pld = accounting.epsilon(**at, accountant='pld')
    assert exact * (1 - 1e-6) <= pld <= exact * 1.005
    assert exact <= accounting.epsilon(**at) <= exact * 1.25


def test_epsilon_of_samples_is_that_of_the_package():
  dp = pytest.importorskip('dp_accounting')
  for noise, rate, rounds in ((1.0, 0.1, 20), (2.0, 0.5, 5)):
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    event = dp.SelfComposedDpEvent(event, rounds)
    at: Any = dict(noise_multiplier=noise, rate=rate, num_rounds=rounds)
    at['delta'] = 1e-5
    orders = list(range(2, 65))
    want = dp.rdp.RdpAccountant(orders).compose(event).get_epsilon(1e-5)
    assert accounting.epsilon(**at) == pytest.approx(want)
    cut = accounting.epsilon(**at, overflow=1e-12)
    assert want < cut < want * 1.01
    assert accounting.epsilon(**at, overflow=1e-4) == math.inf
  assert accounting.epsilon(**at | {'num_rounds': 0}) == 0


def test_the_noise_of_a_target_reaches_it_closely():
  pytest.importorskip('dp_accounting')
  at: Any = dict(rate=0.2, num_rounds=10, delta=1e-5)
  noise = accounting.noise_multiplier(epsilon=3.0, **at)
  assert 2.98 < accounting.epsilon(noise_multiplier=noise, **at) <= 3.0
  plan = privacy.client_level(
    clip=1.0, delta=1e-5, epsilon=3.0, noise_multiplier=noise / 1.2,
    rate=0.2, num_clients=50, num_rounds=10,
  )  # fmt: skip
  assert 0 < plan.num_rounds < 10
  assert (
    plan.epsilon(plan.num_rounds) <= 3.0 < plan.epsilon(plan.num_rounds + 1)
  )
  assert plan.denominator == 10.0
  assert 'not covered' in plan.record()['not covered by the guarantee']
  plan.check(plan.rule().init(PARAMS, tiny.KEY))
  with pytest.raises(Error, match='has the noise multiplier 9'):
    plan.check(privacy.noisy_mean(1.0, 9.0, 1.0).init(PARAMS, tiny.KEY))


# --------------------------------------------------------------- sampling --


def test_poisson_draws_each_client_on_its_own():
  from fedjax_llm import clients

  sample = clients.poisson(6, 6, rate=0.3, seed=3)
  here = np.zeros((4000, 6))
  for r in range(4000):
    ids = sample(r).ids
    here[r, ids[ids >= 0]] = 1
  # 0.3, standard deviation 0.007; independent: correlations of 1 / 63.
  assert abs(here.mean(0) - 0.3).max() < 0.03
  assert abs(np.corrcoef(here.T) - np.eye(6)).max() < 0.07
  sizes = np.bincount(here.sum(1).astype(int), minlength=7) / 4000
  np.testing.assert_allclose(
    sizes, stats.binom.pmf(range(7), 6, 0.3), atol=0.03
  )
  few = clients.poisson(6, 2, rate=0.9)
  assert len(few(0).ids) == 2 and few(0).reports.all()
  with pytest.raises(Error, match='above 0 and at most 1'):
    clients.poisson(6, 2, rate=1.5)


# ---------------------------------------------------------------- refusals --


def conf(**sections):
  base = dict(
    num_rounds=3,
    privacy=dict(clip=1.0, delta=1e-3, noise_multiplier=1.0),
    clients=dict(name='poisson', cohort_size=4, rate=0.5),
    cohort=dict(num_steps=1, batch_size=1, weight_by='uniform'),
    algorithm=dict(name='fed_avg'),
    local=dict(name='sgd', learning_rate=0.1),
  )
  return base | sections


@pytest.mark.parametrize(
  'sections, sentence',
  [
    (dict(clients=dict(name='uniform')), 'set clients.name=poisson'),
    (dict(clients=dict(name='poisson')), 'clients.rate is missing'),
    (dict(cohort=dict()), 'set cohort.weight_by=uniform'),
    (dict(aggregator=dict(name='median')), 'leave the section aggregator out'),
    (dict(partition=dict(name='pooled')), 'pooled texts have only one'),
  ],
)
def test_sections_that_break_the_guarantee_are_refused(sections, sentence):
  with pytest.raises(Error, match=sentence):
    guarantee.check(conf(**sections))
  guarantee.check(conf())
  guarantee.check(conf(**sections) | {'privacy': None})


def test_methods_that_pass_the_rule_by_are_refused():
  params = toy.params()
  rule = privacy.noisy_mean(1.0, 1.0, 1.0)
  with pytest.raises(Error, match='wraps the aggregator'):
    recipes.scaffold(toy.loss, toy.sgd(), num_clients=9, aggregator=rule)
  additive = uploads.identity()._replace(additive=True)
  with pytest.raises(Error, match='no single update can be clipped'):
    averaged(upload=additive)
  other = guarantee.watched(averaged(aggregator=aggregators.mean()), 'mine')
  with pytest.raises(Error, match='does not take the rule of privacy'):
    other.init(tiny.KEY, params)
  kept = uploads.identity()._replace(
    init=lambda update: tree.zeros_like(update)
  )
  with pytest.raises(Error, match='without error feedback'):
    guarantee.watched(averaged(upload=kept), 'fed_avg').init(tiny.KEY, params)
  planned = averaged()._replace(plan=lambda state: state)
  with pytest.raises(Error, match='plans from reports'):
    guarantee.watched(planned, 'fed_avg')
  build = lambda name: experiment.algorithm(
    conf(algorithm=dict(name=name)),
    loss=None, model=None, adapter=tiny_adapter(), num_clients=4,
  )  # fmt: skip
  with pytest.raises(Error, match='privacy brings the aggregator of the run'):
    build('flora')
  for name in ('fed_avg', 'fed_adam', 'fed_prox'):
    build(name).init(tiny.KEY, params)


def tiny_adapter():
  from fedjax_llm import adapters

  return adapters.lora(rank=2)


def test_a_config_without_privacy_does_not_mention_it():
  conf = config.load('tiny:smoke')
  assert 'privacy' not in config.resolved(conf, SPEC)
  private = conf | dict(privacy=dict(clip=1.0, delta=1e-5, epsilon=2.0))
  assert config.resolved(private, SPEC)['privacy']['accountant'] == 'rdp'
