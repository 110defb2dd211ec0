import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedjax_llm import aggregators, tree
from fedjax_llm.nodes import Controlled, LowRank
from fedjax_llm.types import (
  Aggregator,
  Error,
  Masks,
  StreamingAggregator,
  Uploads,
)

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
KEY = jax.random.key(0)  # these rules draw nothing
NO_MASKS = Masks(None, None)


def flags(num):
  return st.lists(st.booleans(), min_size=num, max_size=num)


def bounded_mean(update, weight):
  norms = jax.vmap(tree.norm)(update)
  bound = jnp.nanmedian(jnp.where(weight > 0, norms, jnp.nan))
  bound = jnp.nan_to_num(bound)
  shrink = jnp.minimum(1.0, bound / jnp.maximum(norms, 1e-12))
  return tree.weighted_sum(update, weight * shrink)


RULES = {
  'mean': aggregators.mean,
  'uniform_mean': aggregators.uniform_mean,
  'masked_mean': aggregators.masked_mean,
  'padded_mean': lambda: aggregators.masked_mean('weight'),
  'median': aggregators.median,
  'trimmed_mean': lambda: aggregators.trimmed_mean(0.3),
  'krum': lambda: aggregators.krum(1),
  'multi_krum': lambda: aggregators.krum(1, num_selected=3),
  'from_rule': lambda: aggregators.from_rule(bounded_mean),
}
STREAMING = ('mean', 'uniform_mean', 'masked_mean', 'padded_mean')
NUM = 7  # clients; most tests share the programs of this size


@functools.cache
def program(name):
  rule = aggregators.as_stack(RULES[name]())

  @jax.jit
  def run(uploads, params):
    state = rule.init(params, KEY)
    return rule.aggregate(uploads, state, params, KEY)[0].delta

  return run


def column(values, leaf):
  """[K] made to broadcast against a stack of `leaf`."""
  return values.reshape((-1,) + (1,) * leaf.ndim)


def make(seed, num=NUM, valid=None, dtype=np.float32, masks=None):
  """Uploads with a LowRank node whose scale is frozen, and their parameters.

  NumPy arrays: only the jitted rules are compiled.
  """
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return rng.normal(size=shape).astype(dtype)

  params = {
    'q': LowRank(leaf(2, 3, 2), leaf(2, 2, 4), None),
    'bias': leaf(5),
    'frozen': None,
  }
  valid = np.array([True] * num if valid is None else valid)
  update = jax.tree.map(
    lambda p: leaf(num, *p.shape) * column(valid, p).astype(dtype), params
  )
  weight = (rng.uniform(1, 50, num) * valid).astype(np.float32)
  if masks is None:
    masks = jax.tree.map(lambda _: np.ones((num,), bool), params)
  start = jax.tree.map(lambda p: np.broadcast_to(p, (num, *p.shape)), params)
  return Uploads(update, start, Masks(masks, masks), weight, valid), params


def close(actual, wanted, rtol=2e-5, atol=2e-6):
  assert jax.tree.structure(actual) == jax.tree.structure(wanted)
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(w, np.float64), rtol, atol
    )


# -------------------------------------------------------------- identities --


@pytest.mark.parametrize('name', RULES)
def test_equal_updates_come_back_unchanged(name):
  uploads, params = make(0)
  one = tree.take(uploads.update, 3)
  same = jax.tree.map(lambda u: np.stack([u[3]] * NUM), uploads.update)
  uploads = uploads._replace(update=same)
  close(program(name)(uploads, params), one)


@pytest.mark.parametrize('name', [n for n in RULES if 'krum' not in n])
def test_a_single_client_is_followed(name):
  uploads, params = make(1, num=1)
  close(program(name)(uploads, params), tree.take(uploads.update, 0))


@pytest.mark.parametrize('name', RULES)
def test_a_client_that_is_left_alone_is_followed(name):
  uploads, params = make(2, valid=[False] * 4 + [True] + [False] * 2)
  close(program(name)(uploads, params), tree.take(uploads.update, 4))


@pytest.mark.parametrize('name', RULES)
@few
@given(seeds, st.permutations(range(NUM)), flags(NUM))
def test_the_order_of_clients_changes_nothing(name, seed, order, valid):
  valid[seed % NUM] = valid[(seed + 2) % NUM] = valid[(seed + 3) % NUM] = True
  uploads, params = make(seed, valid=valid)
  permuted = tree.take(uploads, np.array(order))
  run = program(name)
  close(run(permuted, params), run(uploads, params), atol=1e-6)


@pytest.mark.parametrize('name', RULES)
def test_what_stands_in_a_row_that_is_not_valid_changes_nothing(name):
  valid = [True, False, True, True, False, True, True]
  uploads, params = make(3, valid=valid)
  garbage = jax.tree.map(
    lambda u: np.where(column(uploads.valid, u[0]), u, 1e4).astype(u.dtype),
    uploads.update,
  )
  weight = np.where(uploads.valid, uploads.weight, 9).astype(np.float32)
  dirty = uploads._replace(update=garbage, weight=weight)
  run = program(name)
  close(run(dirty, params), run(uploads, params))


@pytest.mark.parametrize('name', RULES)
def test_a_round_without_valid_clients_changes_nothing(name):
  uploads, params = make(4, valid=[False] * NUM)
  delta = program(name)(uploads, params)
  close(delta, jax.tree.map(np.zeros_like, params), atol=0)


@pytest.mark.parametrize('name', STREAMING)
@pytest.mark.parametrize('sizes', [(1,) * 6, (2, 2, 2), (1, 2, 3), (3, 3)])
def test_blocks_equal_the_stack(name, sizes):
  masks, valid = random_masks(5, 6), [True, True, False, True, True, True]
  uploads, params = make(5, num=6, valid=valid, masks=masks)
  rule = RULES[name]()
  assert isinstance(rule, StreamingAggregator)

  @jax.jit
  def run(uploads, params):
    in_turn, apart, first = rule.zero(params), rule.zero(params), 0
    for size in sizes:
      block = tree.take(uploads, slice(first, first + size))
      in_turn = rule.accumulate(in_turn, block, (), params)
      alone = rule.accumulate(rule.zero(params), block, (), params)
      apart = jax.tree.map(jnp.add, apart, alone)  # as devices would
      first += size
    return [
      rule.finalize(sums, (), params, KEY)[0].delta for sums in (in_turn, apart)
    ]

  whole = program(name)(uploads, params)
  for delta in run(uploads, params):
    close(delta, whole)


def test_frozen_leaves_of_the_parameters_do_not_stop_a_mean():
  uploads, params = make(6)
  more = {**params, 'frozen': jnp.ones(3)}
  delta = program('mean')(uploads, more)
  close({**delta, 'frozen': None}, program('mean')(uploads, params))
  np.testing.assert_array_equal(delta['frozen'], np.zeros(3))


@pytest.mark.parametrize('name', RULES)
def test_the_delta_has_the_dtype_of_the_leaf(name):
  uploads, params = make(7, dtype=jnp.bfloat16)
  delta = program(name)(uploads, params)
  assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype(jnp.bfloat16)}


def test_a_mean_of_bfloat16_updates_sums_in_float32():
  num = 600  # in bfloat16 a running sum of ones stops at 256
  update = jnp.ones((num, 3), jnp.bfloat16)
  uploads = Uploads(update, None, NO_MASKS, jnp.ones(num), jnp.ones(num, bool))
  params = jnp.zeros(3, jnp.bfloat16)
  np.testing.assert_array_equal(
    np.asarray(program('mean')(uploads, params), np.float32), np.ones(3)
  )


# -------------------------------------------------------------- references --


def by_leaf(fn, *trees):
  return jax.tree.map(lambda *xs: fn(*map(np.asarray, xs)), *trees)


def flat(update):
  leaves = [np.asarray(u, np.float64) for u in jax.tree.leaves(update)]
  return np.concatenate([u.reshape(len(u), -1) for u in leaves], axis=1)


@pytest.mark.parametrize('num', [2, NUM])
@few
@given(st.data(), seeds)
def test_means_and_order_statistics_match_their_references(num, data, seed):
  valid = data.draw(flags(num))
  uploads, params = make(seed, num=num, valid=valid)
  weight, ones = np.asarray(uploads.weight), np.float64(valid)
  wanted = {
    'mean': lambda u: references.mean(u, weight),
    'uniform_mean': lambda u: references.mean(u, ones),
    'median': lambda u: references.median(u, valid),
    'trimmed_mean': lambda u: references.trimmed_mean(u, valid, 0.3),
  }
  for name, reference in wanted.items():
    close(program(name)(uploads, params), by_leaf(reference, uploads.update))


def random_masks(seed, num):
  """Masks of ranks, of layers, and of single entries."""
  rng = np.random.default_rng(seed)

  def flip(*shape):
    return rng.random((num, *shape)) < 0.6

  ranks = flip(2)
  return {
    'q': LowRank(ranks, flip(2, 1, 1) & ranks[:, None, :, None], None),
    'bias': flip(5),
    'frozen': None,
  }


@pytest.mark.parametrize('denominator', ['mask', 'weight'])
@few
@given(seeds, flags(NUM))
def test_the_masked_mean_matches_its_reference(denominator, seed, valid):
  masks = random_masks(seed, NUM)
  uploads, params = make(seed, valid=valid, masks=masks)
  name = 'masked_mean' if denominator == 'mask' else 'padded_mean'
  weight = np.asarray(uploads.weight)

  def reference(u, m):
    return references.masked_mean(u, m, weight, denominator)

  close(
    program(name)(uploads, params), by_leaf(reference, uploads.update, masks)
  )


def test_full_masks_make_the_masked_mean_the_mean():
  uploads, params = make(8)
  wanted = program('mean')(uploads, params)
  close(program('masked_mean')(uploads, params), wanted)
  close(program('padded_mean')(uploads, params), wanted)


def test_an_entry_that_nobody_trained_keeps_its_value():
  masks = random_masks(9, NUM)
  masks['bias'][:, 2] = False
  uploads, params = make(9, masks=masks)
  delta = program('masked_mean')(uploads, params)
  assert delta['bias'][2] == 0 and delta['bias'][1] != 0


@pytest.mark.parametrize('selected', [1, 3])
@few
@given(seeds, flags(NUM))
def test_krum_matches_its_reference(selected, seed, valid):
  assume(any(valid))
  uploads, params = make(seed, valid=valid)
  chosen, gap = references.krum(flat(uploads.update), valid, 1, selected)
  assume(gap > 1e-3)
  name = 'krum' if selected == 1 else 'multi_krum'
  rows = tree.take(uploads.update, np.array(chosen))
  close(
    program(name)(uploads, params),
    by_leaf(lambda u: references.mean(u, np.ones(len(u))), rows),
  )


def test_krum_measures_the_whole_update_not_single_tensors():
  # In each tensor alone another client is central: 0 in 'a', 4 in 'b'.
  a = jnp.array([0.0, 1.0, -1.0, 3.0, 9.0])
  b = jnp.array([9.0, 1.0, 3.0, -1.0, 0.0])
  uploads = Uploads({'a': a, 'b': b}, None, NO_MASKS, None, jnp.ones(5, bool))
  delta = program('krum')(uploads, None)
  best, _ = references.krum(np.stack([a, b], 1), [True] * 5, 1)
  assert best == [1]
  assert (delta['a'], delta['b']) == (1.0, 1.0)


def test_krum_tells_mutual_nearest_neighbours_apart_by_all_distances():
  values = np.array([0.0, 1.0, 10.0])  # 0 and 1 have the same nearest one
  rule = aggregators.krum(0)
  run = jax.jit(lambda u: rule.aggregate(u, (), None, KEY)[0].delta)
  for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
    uploads = Uploads(
      values[np.array(order)], None, NO_MASKS, None, np.ones(3, bool)
    )
    assert run(uploads) == 1.0


@pytest.mark.parametrize('fraction', [0.29, 0.1, 0.07])
def test_the_trimmed_fraction_is_the_decimal_that_was_written(fraction):
  num = 100
  values = np.arange(num, dtype=np.float32) ** 2
  uploads = Uploads(
    jnp.asarray(values), None, NO_MASKS, None, jnp.ones(num, bool)
  )
  rule = aggregators.trimmed_mean(fraction)
  delta = rule.aggregate(uploads, (), None, KEY)[0].delta
  wanted = references.trimmed_mean(values, [True] * num, fraction)
  np.testing.assert_allclose(delta, wanted, rtol=1e-6)


def test_values_are_ordered_as_floats_are():
  # A quotient of zeros has a sign on most machines; last it is all the same.
  nan = np.copysign(np.float32(np.nan), np.float32(-1))
  values = [nan, 2, -np.inf, -0.0, np.inf, -1.5, 3e38]
  for num in (3, 5, 7):
    some = np.array(values[:num], np.float32)
    turned = np.stack([np.roll(some, i) for i in range(num)])  # [K, K]
    uploads = Uploads(turned, None, NO_MASKS, None, np.ones(num, bool))
    delta = aggregators.median().aggregate(uploads, (), None, KEY)[0].delta
    np.testing.assert_array_equal(delta, np.sort(some)[num // 2].repeat(num))


# -------------------------------------------------------------- guarantees --


ROBUST = {
  'median': aggregators.median,
  'trimmed_mean': lambda: aggregators.trimmed_mean(0.25),  # 2 of 9
  'krum': lambda: aggregators.krum(2),
  'multi_krum': lambda: aggregators.krum(2, num_selected=3),
}


@functools.cache
def robust_program(name):
  rule = aggregators.as_stack({**RULES, **ROBUST}[name]())
  return jax.jit(lambda u, p: rule.aggregate(u, (), p, KEY)[0].delta)


@pytest.mark.parametrize('size', [1e3, 1e12, 3e30])
@few
@given(seeds, st.sets(st.integers(0, 8), min_size=2, max_size=2))
def test_two_corrupted_clients_of_nine_stay_within_the_honest_range(
  size, seed, corrupted
):
  uploads, params = make(seed, num=9)
  bad = np.isin(np.arange(9), list(corrupted))
  push = size * np.where(np.arange(9) % 2, 1, -1)
  honest = flat(uploads.update)[~bad]
  low, high = honest.min(axis=0), honest.max(axis=0)

  def attack(rows):
    return uploads._replace(
      update=jax.tree.map(
        lambda u: (u + column(push * rows, u[0])).astype(u.dtype),
        uploads.update,
      )
    )

  def outcome(name, rows):
    delta = robust_program(name)(attack(rows), params)
    return flat(jax.tree.map(lambda d: d[None], delta))[0]

  for name in ROBUST:
    result = outcome(name, bad)
    assert np.all(result >= low - 1e-5), name
    assert np.all(result <= high + 1e-5), name
  one = bad & (np.cumsum(bad) == 1)  # a mean gives way to a single client
  assert np.any(np.abs(outcome('uniform_mean', one)) > size / 10)


def test_krum_returns_the_update_of_an_honest_client():
  uploads, params = make(10, num=9)
  for leaf in jax.tree.leaves(uploads.update):
    leaf[:2] += 50
  delta = robust_program('krum')(uploads, params)
  rows = flat(uploads.update)
  got = flat(jax.tree.map(lambda d: d[None], delta))
  (chosen,) = np.flatnonzero(np.all(rows == got, axis=1))  # to the bit
  assert chosen >= 2


def test_traits_say_what_a_rule_is():
  for name, build in RULES.items():
    rule = build()
    streaming = name in STREAMING
    assert isinstance(rule, StreamingAggregator) == streaming
    assert rule.traits.linear == (name == 'mean')
    assert not rule.traits.changes_basis
    stacked = aggregators.as_stack(rule)
    assert isinstance(stacked, Aggregator) and stacked.traits == rule.traits


# -------------------------------------------------------- control variates --


def controlled(seed, valid=None):
  uploads, params = make(seed, valid=valid)
  change, control = make(seed + 1, valid=valid)
  pair = Controlled(params, control)
  masks = Controlled(uploads.masks.held, change.masks.held)
  both = Uploads(
    Controlled(uploads.update, change.update),
    Controlled(uploads.start, change.start),
    Masks(masks, masks),
    uploads.weight,
    uploads.valid,
  )
  return both, pair, uploads


@pytest.mark.parametrize('name', ['mean', 'masked_mean', 'median'])
def test_control_variates_leave_the_inner_rule_alone_and_move_c_over_n(name):
  valid = [True, False, True, True, True, False, True]
  uploads, params, inner = controlled(11, valid)
  rule = aggregators.control_variates(RULES[name](), num_clients=20)
  assert type(rule) is type(RULES[name]())
  plain = RULES[name]().traits
  assert rule.traits == plain._replace(linear=False, rotates=False)
  stacked = aggregators.as_stack(rule)
  run = jax.jit(lambda u, p: stacked.aggregate(u, (), p, KEY)[0])
  result = run(uploads, params)
  close(result.delta.params, program(name)(inner, params.params))
  assert not jax.tree.leaves((result.delta.control, result.assign.params))
  wanted = by_leaf(
    lambda c, d: references.control_variate(c, d, valid, 20),
    params.control,
    uploads.update.control,
  )
  close(result.assign.control, wanted)


def test_blocks_of_control_variates_equal_the_stack():
  uploads, params, _ = controlled(12)
  rule = aggregators.control_variates(aggregators.mean(), num_clients=9)
  assert isinstance(rule, StreamingAggregator)

  @jax.jit
  def run(sizes):
    sums, first = rule.zero(params), 0
    for size in sizes:
      block = tree.take(uploads, slice(first, first + len(size)))
      sums = rule.accumulate(sums, block, (), params)
      first += len(size)
    return rule.finalize(sums, (), params, KEY)[0]

  blocks = [np.zeros(3), np.zeros(3), np.zeros(1)]
  close(run(blocks), run([np.zeros(NUM)]))


def test_with_every_client_present_c_stays_the_mean_of_all_c_k():
  uploads, params, _ = controlled(13)
  old = uploads.update.control  # c_k before and after
  new = jax.tree.map(lambda c: c**3 + 1, old)
  params = params._replace(control=jax.tree.map(lambda c: c.mean(0), old))
  update = uploads.update._replace(control=jax.tree.map(np.subtract, new, old))
  rule = aggregators.as_stack(
    aggregators.control_variates(aggregators.mean(), num_clients=NUM)
  )
  run = jax.jit(lambda u, p: rule.aggregate(u, (), p, KEY)[0])
  result = run(uploads._replace(update=update), params)
  close(result.assign.control, jax.tree.map(lambda c: c.mean(0), new))


# ----------------------------------------------------------------- from_rule --


def test_a_lifted_weighted_sum_is_the_mean():
  uploads, params = make(14, valid=[True] * 5 + [False] * 2)
  rule = aggregators.from_rule(tree.weighted_sum)
  delta = jax.jit(lambda u: rule.aggregate(u, (), params, KEY)[0].delta)
  close(delta(uploads), program('mean')(uploads, params))


def test_a_lifted_rule_sees_weights_that_sum_to_one():
  uploads, params = make(15, valid=[True, False] + [True] * 5)
  seen = []

  def rule(update, weight):
    seen.append(weight)
    return tree.take(update, 0)

  aggregators.from_rule(rule).aggregate(uploads, (), params, KEY)
  (weight,) = seen
  np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-6)
  assert weight[1] == 0 and np.all(weight[2:] > 0)


# ------------------------------------------------------------------- errors --


def test_a_lifted_rule_that_forgets_to_reduce_is_refused():
  uploads, params = make(16)
  rule = aggregators.from_rule(lambda update, weight: update)
  with pytest.raises(Error, match=r'from_rule: <lambda> must return.*\(7, 5\)'):
    rule.aggregate(uploads, (), params, KEY)
  rule = aggregators.from_rule(lambda update, weight: {'bias': weight[0]})
  with pytest.raises(Error, match='from_rule'):
    rule.aggregate(uploads, (), params, KEY)


def test_settings_that_make_no_sense_are_refused():
  with pytest.raises(Error, match="'mask' nor 'weight'"):
    aggregators.masked_mean('rank')
  for fraction in (-0.1, 0.5, float('nan')):
    with pytest.raises(Error, match='trim_fraction'):
      aggregators.trimmed_mean(fraction)
  with pytest.raises(Error, match='num_byzantine=-1'):
    aggregators.krum(-1)
  with pytest.raises(Error, match='num_selected=0'):
    aggregators.krum(1, num_selected=0)
  with pytest.raises(Error, match='num_clients=0'):
    aggregators.control_variates(aggregators.mean(), num_clients=0)


def test_krum_refuses_a_cohort_that_can_never_keep_its_guarantee():
  uploads, params = make(17, num=4)
  with pytest.raises(Error, match=r'K=4 with num_byzantine=1.*5 or more'):
    aggregators.krum(1).aggregate(uploads, (), params, KEY)
  uploads, params = make(17)
  with pytest.raises(Error, match='num_selected=7'):
    aggregators.krum(1, num_selected=7).aggregate(uploads, (), params, KEY)
