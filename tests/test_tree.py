import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Frozen, Masks, Private, Shared, Uploads

few = settings(max_examples=15, deadline=None, derandomize=True)


def normal(seed, *shape, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# ---------------------------------------------------------- absent leaves --


def test_what_is_absent_from_one_tree_is_absent_from_the_result():
  x = {'a': 1, 'b': LowRank(2, None, 3)}
  y = {'a': 10, 'b': LowRank(None, 20, 30)}
  both = tree.map_present(lambda a, b: a + b, x, y)
  assert both == {'a': 11, 'b': LowRank(None, None, 33)}


def test_merging_the_selections_gives_the_tree_back():
  params = {'a': 1, 'b': LowRank(2, 3, 4), 'c': None}
  labels = {'a': Private, 'b': LowRank(Shared, Shared, Frozen), 'c': None}
  parts = [tree.select(params, labels, l) for l in (Shared, Private, Frozen)]
  assert parts[0] == {'a': None, 'b': LowRank(2, 3, None), 'c': None}
  assert tree.select(params, labels, Private, Frozen)['a'] == 1
  assert tree.merge(*parts) == params
  assert tree.like(params, parts[0]) == parts[0]


def test_the_first_tree_wins_a_merge():
  assert tree.merge({'a': None}, {'a': 0}, {'a': 5}) == {'a': 0}


# ------------------------------------------------------------------ stacks --


def test_rows_of_a_stack_are_the_trees_it_was_made_of():
  trees = [{'a': normal(k, 2), 'b': None} for k in range(3)]
  stack = tree.stack(trees)
  assert stack['a'].shape == (3, 2)
  for k in range(3):
    np.testing.assert_array_equal(tree.take(stack, k)['a'], trees[k]['a'])
  same = tree.broadcast(trees[1], 4)['a']
  np.testing.assert_array_equal(same, np.stack([trees[1]['a']] * 4))


@pytest.mark.parametrize('shape', [(), (3,), (1, 3), (4, 1), (2, 1, 1)])
def test_a_stacked_mask_broadcasts_from_the_right_in_every_row(shape):
  mask = normal(1, 5, *shape) > 0
  leaf = normal(2, 5, 2, 4, 3)
  wanted = np.stack([np.where(m, x, 0) for m, x in zip(mask, leaf)])
  stacked = tree.rows(jnp.asarray(mask), jnp.asarray(leaf))
  np.testing.assert_array_equal(tree.apply_mask(leaf, stacked), wanted)


def test_nothing_leaks_from_a_row_that_is_not_valid():
  new = {'a': jnp.array([[1.0], [jnp.nan], [jnp.inf]]), 'b': None}
  old = {'a': jnp.zeros((3, 1)), 'b': None}
  clean = tree.where(jnp.array([True, False, False]), new, old)
  np.testing.assert_array_equal(clean['a'], [[1.0], [0.0], [0.0]])
  assert np.isfinite(tree.weighted_sum(clean, jnp.ones(3))['a']).all()


@few
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_weighted_sums_and_means_match_float64(seed, one_is_zero):
  stack = {'a': normal(seed, 6, 3, 2), 'b': normal(seed + 1, 6)}
  weight = np.abs(normal(seed + 2, 6))
  weight[2] *= 1 - one_is_zero
  total = tree.weighted_sum(stack, jnp.asarray(weight))
  mean = tree.weighted_mean(stack, jnp.asarray(weight))
  for name, x in stack.items():
    wanted = np.tensordot(np.float64(weight), np.float64(x), 1)
    np.testing.assert_allclose(total[name], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
      mean[name], wanted / np.float64(weight).sum(), rtol=1e-5, atol=1e-5
    )


def test_a_mean_of_bfloat16_sums_in_float32_and_returns_bfloat16():
  stack = jnp.ones((600, 2), jnp.bfloat16)
  assert tree.weighted_sum(stack, jnp.ones(600)).dtype == jnp.float32
  mean = tree.weighted_mean(stack, jnp.ones(600))
  assert mean.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(mean, np.float32), np.ones(2))


def test_weights_of_an_empty_round_are_zero_not_nan():
  np.testing.assert_array_equal(tree.normalise(jnp.zeros(3)), np.zeros(3))
  np.testing.assert_allclose(
    tree.normalise(jnp.array([1.0, 3.0])), [0.25, 0.75]
  )


# -------------------------------------------------------------- whole tree --


def test_addition_keeps_the_dtype_and_what_only_one_side_has():
  x = {'a': jnp.ones(2, jnp.bfloat16), 'b': None, 'c': jnp.float32(3)}
  y = {'a': jnp.ones(2, jnp.float32), 'b': jnp.float32(5), 'c': None}
  total = tree.add(x, y)
  assert total['a'].dtype == jnp.bfloat16
  assert (total['b'], total['c']) == (5, 3)
  assert tree.sub(total, x)['b'] is None
  half = tree.scale(x, 0.5)
  assert half['a'].dtype == jnp.bfloat16 and half['c'] == 1.5
  zeros = tree.zeros_like(x, jnp.float32)
  assert zeros['a'].dtype == jnp.float32 and zeros['b'] is None


def test_products_and_norms_are_those_of_the_flat_vectors():
  x = {'a': normal(1, 3, 2), 'b': normal(2, 4), 'c': None}
  y = {'a': normal(3, 3, 2), 'b': normal(4, 4), 'c': None}
  flat = [np.concatenate([t['a'].ravel(), t['b']]) for t in (x, y)]
  np.testing.assert_allclose(tree.dot(x, y), np.dot(*flat), rtol=1e-5)
  np.testing.assert_allclose(tree.norm(x), np.linalg.norm(flat[0]), rtol=1e-5)
  assert tree.norm({'a': None}) == 0
  rows = tree.ravel(tree.stack([x, y]))
  np.testing.assert_array_equal(rows, np.stack(flat))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_single_bad_number_is_found(bad):
  x = {'a': normal(1, 3, 2), 'b': normal(2, 4), 'c': None}
  assert tree.all_finite(x)
  x['b'][3] = bad
  assert not tree.all_finite(x)


DISTANCES = jax.jit(tree.squared_distances)


@few
@given(
  st.integers(0, 2**31 - 1),
  st.sampled_from([0.0, 10.0]),
  st.sampled_from([0.0, 1e3, 1e12]),
)
def test_distances_match_float64_whatever_one_row_holds(seed, common, huge):
  # Steps of 1e-3 from a common part, as updates of clients have, or from none.
  x = {
    'a': 1e-3 * normal(seed, 5, 3, 4) + common,
    'b': 1e-3 * normal(seed + 1, 5),
  }
  x['a'][0] += huge
  flat = np.concatenate([x['a'].reshape(5, -1), x['b'][:, None]], axis=1)
  wanted = np.array(
    [[np.sum((np.float64(p) - q) ** 2) for p in flat] for q in flat]
  )
  distances = DISTANCES(x)
  np.testing.assert_allclose(distances, wanted, rtol=1e-4, atol=0)
  np.testing.assert_array_equal(distances, np.asarray(distances).T)


# ----------------------------------------------------------------- uploads --


def test_whole_factors_are_what_clients_hold_after_training():
  num = 3
  start = {
    'q': LowRank(
      normal(1, num, 2, 4, 3), normal(2, num, 2, 3, 5), np.ones((num, 2))
    ),
    'bias': normal(3, num, 6),
  }
  update = {
    'q': LowRank(normal(4, num, 2, 4, 3), normal(5, num, 2, 3, 5), None),
    'bias': None,
  }
  ranks = np.array([[True] * 3, [True, True, False], [True, False, False]])
  held = {'q': LowRank(ranks, ranks[:, :, None], None), 'bias': None}
  uploads = Uploads(update, start, Masks(held, held), None, None)
  whole = tree.whole(uploads)
  for k in range(num):
    a = start['q'].a[k] + update['q'].a[k]
    b = start['q'].b[k] + update['q'].b[k]
    a[..., ~ranks[k]] = 0
    b[:, ~ranks[k]] = 0
    np.testing.assert_allclose(whole['q'].a[k], a, rtol=1e-6)
    np.testing.assert_allclose(whole['q'].b[k], b, rtol=1e-6)
  np.testing.assert_array_equal(whole['q'].scale, start['q'].scale)
  np.testing.assert_array_equal(whole['bias'], start['bias'])


def test_a_leaf_without_a_mask_passes_and_a_mask_leaves_no_nan():
  x = {'a': jnp.array([1.0, jnp.nan]), 'b': jnp.ones(2), 'c': None}
  mask = {'a': jnp.array([True, False]), 'b': None, 'c': None}
  out = tree.apply_mask(x, mask)
  np.testing.assert_array_equal(out['a'], [1.0, 0.0])
  np.testing.assert_array_equal(out['b'], np.ones(2))
  assert out['c'] is None


def test_full_masks_cover_everything_that_is_not_frozen():
  params = {'a': jnp.ones(2), 'b': jnp.ones(3), 'c': jnp.ones(4)}
  masks = tree.full_masks(params, {'a': Shared, 'b': Frozen, 'c': Private})
  assert masks.held['a'] and masks.trained['c'] and masks.held['b'] is None
