"""Privacy by examples, in messages, in sums, with correlated noise."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy
from scipy import stats

from fedjax_llm import (
  adapters,
  aggregators,
  clients,
  local,
  privacy,
  recipes,
  uploads,
)
from fedjax_llm.local import per_example
from fedjax_llm.nodes import LowRank
from fedjax_llm.privacy import accounting, correlated, mechanisms, sent
from fedjax_llm.run import experiment, guarantee
from fedjax_llm.sweep import groups
from fedjax_llm.sweep.grid import Run
from fedjax_llm.types import Context, Draw, Error, Example, Masks
from fedjax_llm.uploads import secure

CLIP = 0.3
NONE: Any = Masks(None, {'w': jnp.bool_(True)})


def norm(x):
  flat = [np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(x)]
  return np.linalg.norm(np.concatenate(flat))


# ---------------------------------------------------------------- examples --


@functools.cache
def gradient(noise, clipping='abadi', microbatch=None):
  trained = {'q': toy.params()['q']._replace(scale=None)}
  build = per_example.noisy(
    CLIP, noise, 4.0, clipping=clipping, microbatch=microbatch
  )
  return jax.jit(
    lambda batch, key: build(
      toy.loss, toy.base(), trained, toy.params(), batch, key
    )
  )


def rows(mask=(1, 1, 1, 0)):
  rng = np.random.default_rng(4)
  x, y = rng.normal(size=(4, toy.D)), rng.normal(size=(4, toy.F)) * 3
  narrow = lambda v: v.astype(np.float32)
  return toy.Rows(narrow(x), narrow(y), np.array(mask, bool))


def by_hand(batch, clipping):
  """The sum of clipped gradients over four, in NumPy float64."""
  q = toy.params()['q']
  wide = lambda v: np.asarray(v, np.float64)
  a, b, s = wide(q.a), wide(q.b), float(q.scale)
  total = [0.0, 0.0]
  for x, y, there in zip(wide(batch.x), wide(batch.y), batch.mask):
    error = x @ (wide(toy.base()) + s * a @ b) - y
    one = [s * np.outer(x, error @ b.T), s * np.outer(a.T @ x, error)]
    size = norm(one)
    by = min(1, CLIP / size) if clipping == 'abadi' else CLIP / (size + 0.01)
    total = [t + there * by * g / 4 for t, g in zip(total, one)]
  return total


@pytest.mark.parametrize('clipping', per_example.CLIPPINGS)
def test_gradients_are_clipped_by_example(clipping):
  batch = rows()
  grads, sums = gradient(0.0, clipping)(batch, tiny.KEY)
  for got, want in zip((grads['q'].a, grads['q'].b), by_hand(batch, clipping)):
    np.testing.assert_allclose(got, want, atol=2e-6)
  assert float(sums.count) == 3
  # One example less changes the sum by at most C, and by C if it was cut.
  less, _ = gradient(0.0, clipping)(rows((1, 0, 1, 0)), tiny.KEY)
  change = 4 * norm(jax.tree.map(lambda x, y: x - y, grads, less))
  assert CLIP * 0.9 < change <= CLIP * (1 + 1e-5)


def test_microbatches_change_only_rounding():
  one, _ = gradient(0.5)(rows(), tiny.KEY)
  toy.close(one, gradient(0.5, microbatch=2)(rows(), tiny.KEY)[0])
  with pytest.raises(Error, match='microbatch is 3, which does not'):
    gradient(0.0, microbatch=3)(rows(), tiny.KEY)


def test_a_step_without_examples_is_noise_of_the_planned_deviation():
  """z C / B; its count is not zero, which would mark padding."""
  empty, noise = rows((0, 0, 0, 0)), gradient(0.5)
  keys = jax.random.split(tiny.KEY, 400)
  grads, sums = jax.vmap(lambda key: noise(empty, key))(keys)
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
  want = 0.5 * CLIP / 4
  assert abs(flat.std() / want - 1) < 4.5 / math.sqrt(2 * flat.size)
  assert abs(flat.mean()) < 4.5 * want / math.sqrt(flat.size)
  assert 0 < float(sums.count[0]) < 1e-3


def test_a_step_holds_each_example_on_its_own_and_no_cut_sample():
  texts = [
    Example(np.full(2, i, np.int32), np.array([0, 1], bool)) for i in range(6)
  ]
  build = clients.cohorts.cohorts(
    [texts], num_steps=500, batch_size=2, max_length=2, rate=0.4, seed=3
  )
  batches = build(Draw(np.array([0]), np.array([True])), 0).batches
  there = batches.segments[0, ..., 0] > 0  # [S, B]
  size = there.sum(1)
  share = stats.binom.pmf(np.arange(3), 6, 0.4)
  share[0] += stats.binom.sf(2, 6, 0.4)  # too large a sample: near one half
  np.testing.assert_allclose(
    np.bincount(size, minlength=3) / 500, share, atol=0.09
  )
  drawn = batches.tokens[0, ..., 0][there]
  assert abs(np.bincount(drawn, minlength=6) / len(drawn) - 1 / 6).max() < 0.05
  wrong: Any = (
    ({'rate': 1.5}, 'example_rate is 1.5'),
    ({'rate': 0.5, 'epochs': 1}, 'leave cohort.packing and'),
  )
  for fields, sentence in wrong:
    with pytest.raises(Error, match=sentence):
      clients.cohorts.cohorts(
        [texts], num_steps=1, batch_size=1, max_length=2, **fields
      )


# ---------------------------------------------------------- local messages --


def test_the_worst_change_of_one_client_is_what_is_counted():
  """Through the compiled round: 2 C with local noise, of K clients equal."""
  codec = sent.noised(uploads.identity(), CLIP, 0.0)
  method = recipes.fed_avg(toy.loss, toy.sgd(0.02), upload=codec, measure=None)
  cohort = toy.cohort()._replace(weight=np.ones(5, np.float32))
  state = method.init(tiny.KEY, toy.params())
  run = jax.jit(method.round)
  ends = []
  for sign in (1.0, -1.0):
    y = np.copy(cohort.batches.y)
    y[2] = sign * 50.0
    moved = cohort._replace(batches=cohort.batches._replace(y=y))
    ends.append(run(state, moved, toy.base())[0].params)
  change = 5 * norm(jax.tree.map(lambda x, y: x - y, *ends))
  assert CLIP < change <= 2 * CLIP * (1 + 1e-4)


def test_local_noise_has_the_deviation_and_the_epsilon_of_its_plan():
  update = {'w': jnp.full(20_000, 7.0)}
  codec = sent.noised(uploads.identity(), CLIP, 2.0)
  encode = jax.jit(lambda key: codec.encode(update, NONE, (), Context(key=key)))
  message = encode(jax.random.key(3))[0]['w'] - CLIP / math.sqrt(20_000)
  want = 2.0 * CLIP
  assert abs(float(message.std()) / want - 1) < 4.5 / math.sqrt(40_000)
  dp = pytest.importorskip('dp_accounting')
  plan = mechanisms.local_level(
    clip=CLIP, delta=1e-5, noise_multiplier=20.0, turns=(0, 1, 2, 2)
  )
  for rounds, turns in enumerate((0, 1, 2, 2)):
    exact = dp.rdp.RdpAccountant(list(range(2, 400)))
    if turns:
      event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(10.0), turns)
      exact.compose(event)
    want = exact.get_epsilon(1e-5) if turns else 0.0
    assert plan.epsilon(rounds) == pytest.approx(want, rel=1e-3)


# ------------------------------------------------------------ correlated --


def test_correlated_noise_is_white_after_its_matrix():
  """C y = n with the deviation z C |c|, independent over rounds."""
  bands, num = 3, 6
  rule = privacy.correlated_mean(CLIP, 0.7, 2.0, bands)
  params = {'w': jnp.zeros(4000)}
  step = jax.jit(
    lambda state, key: rule.finalize(rule.zero(params), state, params, key)
  )
  state, noises = rule.init(params, tiny.KEY), []
  for t in range(num):
    result, state = step(state, jax.random.key(t))
    noises.append(np.float64(result.delta['w']) * 2.0)
  c = correlated.coefficients(bands)
  matrix = np.sum([w * np.eye(num, k=-i) for i, w in enumerate(c)], 0)
  white = matrix @ np.stack(noises)
  want = 0.7 * CLIP * math.sqrt(sum(x * x for x in c))
  assert abs(white.std(1) / want - 1).max() < 4.5 / math.sqrt(8000)
  assert abs(np.corrcoef(white) - np.eye(num)).max() < 4.5 / math.sqrt(4000)
  # The noise of the sum over rounds is smaller than with independent noise.
  assert np.sum(noises, 0).std() < math.sqrt(num) * want
  plain = privacy.noisy_mean(CLIP, 0.7, 2.0)
  one = privacy.correlated_mean(CLIP, 0.7, 2.0, 1)
  noise = lambda rule: (
    rule.finalize(
      rule.zero(params), rule.init(params, tiny.KEY), params, tiny.KEY
    )[0].delta
  )
  toy.close(noise(plain), noise(one))


def test_no_round_of_correlated_noise_is_undone():
  """A sum beyond float16 stays finite, so the noises before are kept."""
  rule = privacy.correlated_mean(1.0, 1e6, 1.0, 2)
  params = {'w': jnp.zeros(8, jnp.float16)}
  state = rule.init(params, tiny.KEY)
  result, state = rule.finalize(rule.zero(params), state, params, tiny.KEY)
  delta = np.asarray(result.delta['w'])
  noise = np.asarray(state.past['w'][0])
  assert (np.abs(noise) > 65504).any() and np.isfinite(delta).all()
  np.testing.assert_array_equal(
    delta, np.clip(noise, -65504, 65504).astype(np.float16)
  )


def test_epsilon_beyond_the_plan_is_refused():
  """The schedule of later rounds may have more turns of a client."""
  plan = mechanisms.Mechanism(
    'local', 'client', 1.0, 2.0, 1e-3, None, 1, 'rdp', (0, 1)
  )
  with pytest.raises(Error, match=r'after 2 rounds is not known.* 0 to 1 rou'):
    plan.epsilon(2)


def test_separated_turns_cost_their_root():
  """Every pattern of turns at least b apart, with the worst signs."""
  bands, num = 3, 7
  c = correlated.coefficients(bands)
  matrix = np.sum([w * np.eye(num, k=-i) for i, w in enumerate(c)], 0)
  worst = 0.0
  for turns in itertools.product((0, 1), repeat=num):
    at = np.flatnonzero(turns)
    if len(at) and (np.diff(at) >= bands).all():
      bound = math.sqrt(len(at)) * correlated.column(bands)
      assert np.linalg.norm(matrix[:, at].sum(1)) <= bound + 1e-12
      worst = max(worst, np.linalg.norm(matrix[:, at].sum(1)) / bound)
    elif len(at) == 2:  # nearer turns cost more: why the sampler is checked
      bound = math.sqrt(2) * correlated.column(bands)
      near = np.linalg.norm(matrix[:, at].sum(1))
      assert near > bound or at[1] == num - 1
  assert worst == pytest.approx(1.0)
  sample = clients.rotating(7, 2, seed=5)
  seen = [set(sample(r).ids.tolist()) - {-1} for r in range(12)]
  for i, j in itertools.combinations(range(12), 2):
    assert bool(seen[i] & seen[j]) == ((j - i) % 4 == 0)


# ------------------------------------------------- secure sums, Skellam --


def test_the_bound_of_skellam_holds_for_exact_divergences():
  """Of shifts by whole numbers, from the probabilities in float64."""
  for variance, shift, order in itertools.product((4, 40), (1, 3), (2, 5)):
    x = np.arange(-150, 151)
    log = lambda at, v=variance: stats.skellam.logpmf(at, v / 2, v / 2)
    p, q = log(x - shift), log(x)
    keep = np.isfinite(p) & np.isfinite(q) & (q > -60)
    exact = np.log(np.exp((order * p + (1 - order) * q)[keep]).sum())
    exact /= order - 1
    bound = accounting.skellam_divergence(order, shift, shift, variance)
    assert 0.25 * order * shift**2 / variance < exact <= bound


@pytest.mark.parametrize('mean', [500.0, 1.7e7])
def test_poisson_numbers_have_their_distribution(mean):
  """At large means too, where that of float32 sums of logarithms fails."""
  num = 20_000
  drawn = jax.jit(lambda key: sent.poisson(key, mean, (num,)))(tiny.KEY)
  drawn = np.asarray(drawn, np.float64)
  assert abs(drawn.mean()) < 4.5 * math.sqrt(mean / num)
  assert abs(drawn.var() / mean - 1) < 4.5 * math.sqrt(2 / num)
  assert abs(stats.kurtosis(drawn)) < 4.5 * math.sqrt(24 / num)
  step = 1 / math.sqrt(2 * math.pi * mean)  # the largest probability
  distance = stats.kstest(drawn + mean, stats.poisson(mean).cdf).statistic
  assert distance < 1.95 / math.sqrt(num) + step
  if mean > 1e6:
    other = jax.jit(lambda key: jax.random.poisson(key, mean, (num,)))(tiny.KEY)
    assert stats.kurtosis(np.float64(other) - mean) > 1


@functools.cache
def sums(noise, least):
  masks = secure.masked, secure.unmasked
  codec = sent.skellam(CLIP, noise, least, 1000.0, *masks)
  ids = jnp.array([5, 2, 9, 4])
  start = {'w': jnp.zeros(3000)}

  @jax.jit
  def run(update, reported):
    def encode(k):
      at = Context(
        client=ids[k], key=jax.random.key(ids[k]), peers=ids,
        round_key=tiny.KEY,
      )  # fmt: skip
      return codec.encode({'w': update[k]}, NONE, (), at)[0]

    sent = jax.vmap(encode)(jnp.arange(4))
    total = jnp.sum(
      sent['w'] * reported[:, None].astype(jnp.uint32), 0, dtype=jnp.uint32
    )
    at = Context(peers=ids, round_key=tiny.KEY, reported=reported)
    return sent['w'], codec.decode({'w': total}, start, at)['w']

  return run


def test_masks_cancel_exactly_also_without_a_client_that_dropped_out():
  rng = np.random.default_rng(0)
  update = np.float32(rng.normal(size=(4, 3000)))
  size = np.linalg.norm(np.float64(update), axis=1, keepdims=True)
  whole = np.trunc(np.float64(update) * 1000 / size * (1 - 1e-6))
  for reported in ([1, 1, 1, 1], [1, 0, 1, 1]):
    there = np.array(reported, bool)
    sent, total = sums(0.0, 3)(update, there)
    want = (whole * there[:, None]).sum(0)
    assert abs(np.float64(total) * 1000 / CLIP - want).max() < 1.01
  # A message alone is uniform: its top bits are those of random numbers.
  top = np.bincount(np.ravel(np.asarray(sent) >> 29), minlength=8) / 12_000
  assert abs(top - 1 / 8).max() < 0.02


def test_noise_of_all_clients_together_is_that_of_the_plan():
  zero, every = np.zeros((4, 3000), np.float32), np.ones(4, bool)
  total = np.float64(sums(1.5, 4)(zero, every)[1])
  want = 1.5 * CLIP
  assert abs(total.std() / want - 1) < 4.5 / math.sqrt(6000)
  some = np.array([1, 1, 0, 1], bool)
  assert not np.any(sums(1.5, 4)(zero, some)[1])  # given up


def test_a_secure_sum_is_the_mean_and_needs_a_linear_rule():
  method = lambda **parts: recipes.fed_avg(
    toy.loss, toy.sgd(), measure=None, **parts
  )
  cohort, ends = toy.cohort(), []
  cohort = cohort._replace(valid=np.array([1, 1, 0, 1, 1], bool))
  for upload in (uploads.identity(), uploads.secure_sum(largest=50.0)):
    algorithm = method(upload=upload)
    state = algorithm.init(tiny.KEY, toy.params())
    run = jax.jit(algorithm.round)
    ends.append(run(state, cohort, toy.base())[0].params)
  toy.close(*ends, atol=1e-5)
  with pytest.raises(Error, match='sees no single client'):
    method(upload=uploads.secure_sum(), aggregator=aggregators.median())
  with pytest.raises(Error, match='an even number'):
    uploads.secure_sum(neighbours=3)


# ---------------------------------------------------------------- refusals --


def conf(mechanism, name='fed_avg', privacy: Any = (), **sections):
  base = dict(
    num_rounds=4,
    privacy=dict(
      mechanism=mechanism, clip=1.0, delta=1e-3, noise_multiplier=2.0
    )
    | dict(privacy),
    clients=dict(name='uniform', cohort_size=3),
    cohort=dict(num_steps=2, batch_size=2, weight_by='uniform'),
    algorithm=dict(name=name),
    local=dict(name='sgd', learning_rate=0.1),
  )
  return base | sections


SAMPLED = dict(example_rate=0.5)


@pytest.mark.parametrize(
  'sections, sentence',
  [
    (conf('correlated'), 'set clients.name=rotating'),
    (conf('examples'), 'example_rate is missing'),
    (conf('local', clients=dict(name='buffered')), 'follows their work'),
    (conf('local', clients=dict(name='by_value')), 'computed from their texts'),
    (
      conf('examples', privacy=dict(example_rate=0.5), selection=dict(a=1)),
      'leave it out',
    ),
    (conf('local', cohort={}), 'set cohort.weight_by=uniform'),
    (conf('distributed', upload=dict(name='sign')), 'leave the section upload'),
    (conf('local', adversary=dict(name='alie')), "adversary.name is 'alie'"),
    (
      conf('local', adversary=dict(name='model_replacement')),
      'model_replacement with a scale',
    ),
  ],
)
def test_sections_that_break_a_mechanism_are_refused(sections, sentence):
  with pytest.raises(Error, match=sentence):
    guarantee.check(sections)


def test_plans_count_the_turns_of_the_sampler():
  pytest.importorskip('dp_accounting')
  rotating = dict(name='rotating', cohort_size=3)
  plan = guarantee.of(conf('correlated', clients=rotating), 6)
  assert plan.counts == (0, 1, 1, 2, 2) and plan.bands == 2
  assert plan.epsilon(1) == accounting.epsilon(
    noise_multiplier=2.0, rate=1.0, num_rounds=1, delta=1e-3
  )
  plan = guarantee.of(conf('examples', privacy=SAMPLED, clients=rotating), 6)
  assert plan.counts == (0, 2, 2, 4, 4)  # two steps a turn
  assert plan.epsilon(4) == accounting.epsilon(
    noise_multiplier=2.0, rate=0.5, num_rounds=4, delta=1e-3
  )
  plan = guarantee.of(
    conf('local', clients=rotating)
    | dict(privacy=dict(mechanism='local', clip=1.0, delta=1e-3, epsilon=2.0)),
    6,
  )
  assert 1.97 < plan.epsilon(4) <= 2.0
  with pytest.raises(Error, match='bands must be at most 2'):
    guarantee.of(conf('correlated', privacy=dict(bands=3), clients=rotating), 6)
  with pytest.raises(Error, match='bands is 2, and mechanism'):
    guarantee.of(conf('local', privacy=dict(bands=2)), 6)
  drawn = guarantee.of(
    conf(
      'distributed',
      privacy=dict(noise_multiplier=3.0, least=2),
      clients=rotating,
    ),
    6,
  )
  assert drawn.least == 2
  assert drawn.epsilon(2) == pytest.approx(
    accounting.epsilon(
      noise_multiplier=3.0, rate=1.0, num_rounds=1, delta=1e-3
    ),
    rel=1e-4,
  )


def built(mechanism, name, adapter=None, **sections):
  return experiment.algorithm(
    conf(mechanism, name, **sections),
    loss=tiny.loss, model=tiny.loaded().model,
    adapter=adapter or adapters.lora(rank=2), num_clients=9,
  )  # fmt: skip


def traced(method, params=None, base=None):
  params, base = params or tiny.lora(), base or tiny.base()
  cohort = tiny.cohort(steps=1)
  state = method.init(tiny.KEY, params)
  cohort = cohort._replace(states=tiny.fresh(method, state))
  return jax.eval_shape(method.round, state, cohort, base)


@pytest.mark.parametrize(
  'name', ['ffa_lora', 'la_lora', 'fedask', 'rolora', 'fed_svd']
)
def test_methods_train_by_examples(name):
  pytest.importorskip('dp_accounting')
  traced(built('examples', name, privacy=SAMPLED))


@pytest.mark.parametrize('mechanism', ['examples', 'central'])
def test_biases_and_prompts_train_privately(mechanism):
  """DP-BiTFiT and DP prompts: an adapter and a mechanism, no method."""
  pytest.importorskip('dp_accounting')
  base = jax.tree.map(lambda x: x, tiny.base())  # dicts of its own
  query = base['layers']['self_attn']['q_proj']
  query['bias'] = jnp.zeros(query['kernel'].shape[::2])
  cases = (
    ('fed_avg', adapters.bitfit()),
    ('fed_prompt', adapters.soft_prompt(length=2)),
  )
  poisson = dict(clients=dict(name='poisson', rate=0.5))
  more: Any = dict(privacy=SAMPLED) if mechanism == 'examples' else poisson
  for name, adapter in cases:
    params = adapter.init(tiny.KEY, base)
    method = built(mechanism, name, adapter, **more)
    state, _, _ = traced(method, params, base)
    shapes = lambda x: jax.tree.map(jnp.shape, x)
    assert shapes(state.params) == shapes(params)


@pytest.mark.parametrize(
  'mechanism, name, sentence',
  [
    ('examples', 'fed_mezo', 'estimates its gradients itself'),
    ('examples', 'ditto', 'train 2 times on the texts'),
    ('local', 'fed_kseed_pro', 'privacy brings the upload'),
    ('local', 'flasc', 'privacy brings the upload'),
  ],
)
def test_methods_that_pass_a_mechanism_by_are_refused(
  mechanism, name, sentence
):
  pytest.importorskip('dp_accounting')
  more: Any = SAMPLED if mechanism == 'examples' else ()
  with pytest.raises(Error, match=sentence):
    traced(built(mechanism, name, privacy=more))


def test_sampled_replies_are_refused_with_the_reason():
  unused: Any = None
  sampled = local.Sampled(tiny.loaded().model, unused, unused, ())
  with pytest.raises(Error) as error:
    experiment.algorithm(
      conf('examples', 'fed_avg_grpo', privacy=SAMPLED),
      loss=sampled, model=tiny.loaded().model, adapter=adapters.lora(rank=2),
      num_clients=9,
    )  # fmt: skip
  assert str(error.value) == (
    "privacy.mechanism is 'examples', and the clients of this task sample "
    'replies outside of the gradient whose examples are clipped: take another '
    "task.name, or another mechanism, such as 'central'."
  )


def test_runs_of_a_sweep_with_privacy_train_one_by_one():
  """One program would count with the clients and the rounds of the first."""
  run = Run(0, 0, 'a', conf('local'), {})
  unread: Any = None
  reason = groups._why_not(groups.Member(run, unread, unread))
  assert reason is not None and 'the budget of each run' in reason


def test_a_run_does_not_go_on_with_another_noise(tmp_path):
  plan = mechanisms.Mechanism(
    'local', 'client', 1.0, 2.0, 1e-3, None, 1, 'rdp', (0, 1)
  )
  guarantee.same_noise(tmp_path, plan)
  (tmp_path / 'privacy.json').write_text('{"noise_multiplier": 2.0}')
  guarantee.same_noise(tmp_path, plan)
  with pytest.raises(Error, match='this run has the noise multiplier 2'):
    guarantee.same_noise(tmp_path, plan._replace(noise_multiplier=3.0))


# ------------------------------------------------------------- the product --


def test_noise_of_both_factors_is_quadratic_in_the_product():
  """a n_b grows with z, n_a n_b with its square; with b alone there is none."""
  start = {'q': LowRank(jnp.ones((40, 4)), jnp.zeros((4, 40)), None)}

  def product(noise, both):
    rule = privacy.noisy_mean(1.0, noise, 1.0)
    zero = rule.zero(start)
    result = rule.finalize(zero, rule.init(start, tiny.KEY), start, tiny.KEY)[0]
    q: Any = result.delta['q']
    a = start['q'].a + (q.a if both else 0)
    return np.asarray(a, np.float64) @ np.asarray(q.b, np.float64)

  linear = product(0.1, False)
  np.testing.assert_allclose(product(1.0, False), 10 * linear, rtol=1e-4)
  extra = [product(z, True) - product(z, False) for z in (0.1, 1.0)]
  np.testing.assert_allclose(extra[1], 100 * extra[0], rtol=1e-3, atol=1e-3)
  # R z^4 of 2 R z^2 at z = 1: half of the variance is the quadratic term.
  share = product(1.0, True).var() / product(1.0, False).var()
  assert 1.5 < share < 2.6
