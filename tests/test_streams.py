"""Noise over rounds: its covariance, its sensitivity, its accountant."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import privacy
from fedjax_llm.privacy import correlated, mechanisms, streams
from fedjax_llm.run import guarantee
from fedjax_llm.types import Error

T, CLIP, NOISE, WIDTH = 7, 0.3, 0.7, 4000
DECAYS, SCALES = (0.3, 0.9), (0.2, 0.4)
AT: Any = dict(num_rounds=T, separation=2, turns=3)
STREAMS = {
  'banded': streams.banded(2),
  'blt': streams.buffered(DECAYS, SCALES, **AT),
  'tree': streams.tree(**AT),
}


@functools.cache
def noises(name):
  """The noises that the rule adds in T rounds, [T, WIDTH] float64."""
  rule = privacy.correlated_mean(CLIP, NOISE, 2.0, stream=STREAMS[name])
  params = {'w': jnp.zeros(WIDTH)}
  step = jax.jit(
    lambda state, key: rule.finalize(rule.zero(params), state, params, key)
  )
  state, result = rule.init(params, tiny.KEY), []
  for t in range(T):
    outcome, state = step(state, jax.random.key(t))
    result.append(np.float64(outcome.delta['w']) * 2.0)
  return np.stack(result)


def close(got, want):
  """Within 5 deviations of an estimated covariance."""
  size = np.sqrt(np.outer(np.diag(want), np.diag(want)))
  assert (np.abs(got - want) < 5 * size * math.sqrt(2 / WIDTH)).all()


def toeplitz(coefs):
  return np.sum([c * np.eye(T, k=-i) for i, c in enumerate(coefs)], 0)


def coefs_of_blt():
  """By the sum in float64, a loop."""
  c = [1.0]
  for i in range(1, T):
    c.append(sum(w * d ** (i - 1) for d, w in zip(DECAYS, SCALES)))
  return c


def nodes():
  """[nodes, T]: the rounds that each node of the binary tree holds."""
  rows = []
  for level in range(T.bit_length()):
    for start in range(0, T, 2**level):
      if start + 2**level <= T:
        rows.append([start <= t < start + 2**level for t in range(T)])
  return np.array(rows, float)


def test_the_noise_of_buffers_is_white_after_its_matrix():
  deviation = NOISE * CLIP * STREAMS['blt'].sensitivity
  white = toeplitz(coefs_of_blt()) @ noises('blt')
  close(white @ white.T / WIDTH, deviation**2 * np.eye(T))
  other = toeplitz(coefs_of_blt()) @ noises('banded')
  with pytest.raises(AssertionError):
    deviation = NOISE * CLIP * STREAMS['banded'].sensitivity
    close(other @ other.T / WIDTH, deviation**2 * np.eye(T))


def test_prefix_sums_share_the_noise_of_the_nodes_of_a_tree():
  """S_t is the sum of a node for every 1 in the binary form of t."""
  want = np.zeros((T, T))
  parts: list[set[tuple[int, int]]] = []
  for t in range(1, T + 1):
    start, own = 0, set()
    for level in reversed(range(T.bit_length())):
      if t >> level & 1:
        own.add((level, start))
        start += 2**level
    parts.append(own)
  for i, j in itertools.product(range(T), repeat=2):
    want[i, j] = len(parts[i] & parts[j])
  deviation = NOISE * CLIP * STREAMS['tree'].sensitivity
  sums = np.cumsum(noises('tree'), 0)
  close(sums @ sums.T / WIDTH, deviation**2 * want)
  plain = np.cumsum(
    deviation * np.random.default_rng(0).normal(size=(T, WIDTH)), 0
  )
  with pytest.raises(AssertionError):
    close(plain @ plain.T / WIDTH, deviation**2 * want)


@pytest.mark.parametrize('name', ['blt', 'tree'])
def test_no_pattern_of_turns_changes_more_than_is_counted(name):
  """All patterns with turns b rounds apart, b = 2, of up to three turns."""
  matrix = nodes() if name == 'tree' else toeplitz(coefs_of_blt())
  bound = STREAMS[name].sensitivity
  worst = near = 0.0
  for turns in itertools.product((0, 1), repeat=T):
    at = np.flatnonzero(turns)
    if not 1 <= len(at) <= 3:
      continue
    change = np.linalg.norm(matrix[:, at].sum(1)) / math.sqrt(len(at))
    if len(at) == 1 or np.diff(at).min() >= 2:
      worst = max(worst, change)
    near = max(near, change)
  assert worst <= bound * (1 + 1e-12)
  assert near > bound  # turns in rounds side by side cost more
  if name == 'blt':  # exact; that of the tree is a bound
    assert worst == pytest.approx(bound)


def test_chosen_buffers_beat_the_tree_and_independent_noise():
  at: Any = dict(separation=4, turns=4)
  d, w = streams.optimal(16, **at)
  c = streams.blt(d, w, 16)
  blt = streams.worst(c, 4, 4) * streams.error(c)
  most = max(bin(t).count('1') for t in range(1, 17))
  tree = 4 * streams.tree(16, **at).sensitivity ** 2 * most
  assert blt < 0.6 * 4 * 16 and blt < 0.5 * tree
  matrix = np.sum([x * np.eye(16, k=-i) for i, x in enumerate(c)], 0)
  sums = np.tri(16) @ np.linalg.inv(matrix)
  assert streams.error(c) == pytest.approx((sums**2).sum(1).max())


def test_a_plan_of_a_tree_costs_what_the_accountant_of_trees_counts():
  dp = pytest.importorskip('dp_accounting')
  plan = mechanisms.correlated_level(
    clip=CLIP, delta=1e-5, noise_multiplier=3.0, matrix='tree', separation=T,
    turns=(0, *[1] * T),
  )  # fmt: skip
  stream = plan.stream()
  assert stream is not None
  event = dp.SingleEpochTreeAggregationDpEvent(3.0 * stream.sensitivity, T)
  zeroed = dp.NeighboringRelation.REPLACE_SPECIAL
  account = dp.rdp.RdpAccountant(list(range(2, 65)), zeroed)
  want = account.compose(event).get_epsilon(1e-5)
  assert plan.epsilon(T) == pytest.approx(want, rel=1e-6)
  rule: Any = plan.rule()
  state = rule.init({'w': jnp.zeros(3)}, tiny.KEY)
  plan.check(state)
  longer = plan._replace(counts=(0, *[1] * 8))
  with pytest.raises(Error, match='keep num_rounds and the section clients'):
    longer.check(state)
  with pytest.raises(Error, match=r"bands is 2, and .*'blt' has no"):
    mechanisms.correlated_level(
      clip=1.0, delta=1e-5, noise_multiplier=1.0, matrix='blt', bands=2
    )
  with pytest.raises(Error, match='must be one of banded, blt, tree'):
    mechanisms.correlated_level(
      clip=1.0, delta=1e-5, noise_multiplier=1.0, matrix='trees'
    )


@pytest.mark.parametrize('matrix', ['blt', 'tree'])
def test_a_config_names_the_matrix(matrix):
  """What only reads a state has a rule of the same shapes."""
  pytest.importorskip('dp_accounting')
  conf = dict(
    num_rounds=6,
    privacy=dict(
      mechanism='correlated', clip=1.0, delta=1e-3, noise_multiplier=2.0,
      matrix=matrix,
    ),
    clients=dict(name='rotating', cohort_size=3),
    cohort=dict(num_steps=1, batch_size=1, weight_by='uniform'),
  )  # fmt: skip
  plan = guarantee.of(conf, 6)
  assert plan.separation == 2 and plan.counts == (0, 1, 1, 2, 2, 3, 3)
  reads = guarantee.applied(conf, 6, {'loss': None})[0]['aggregator']
  shapes = [
    jax.eval_shape(rule.init, {'w': jnp.zeros(3)}, tiny.KEY)
    for rule in (plan.rule(), reads)
  ]
  assert shapes[0] == shapes[1]


def test_coefficients_are_those_of_jax_privacy():
  room = 'jax_privacy.matrix_factorization'
  toeplitz = pytest.importorskip(f'{room}.toeplitz')
  buffered_toeplitz = pytest.importorskip(f'{room}.buffered_toeplitz')
  with jax.enable_x64(True):
    want = toeplitz.optimal_max_error_strategy_coefs(30)
    np.testing.assert_allclose(correlated.coefficients(30), want, rtol=1e-5)
    own = streams.blt(np.array(DECAYS), np.array(SCALES), 30)
    theirs = buffered_toeplitz.BufferedToeplitz.build(DECAYS, SCALES)
    np.testing.assert_allclose(own, theirs.toeplitz_coefs(30), rtol=1e-9)
    for b, k in ((1, 1), (3, 4), (7, 2)):
      square = toeplitz.minsep_sensitivity_squared(
        jnp.asarray(own), b, k, skip_checks=True
      )
      assert streams.worst(own, b, k) == pytest.approx(float(square))
