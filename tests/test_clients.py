"""Who takes part, with which batches, and what a client shares and keeps."""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm import clients, scopes, tree
from fedjax_llm.clients import cohorts, sampling
from fedjax_llm.nodes import LowRank
from fedjax_llm.scopes import labels
from fedjax_llm.types import ClientState, Context, Draw, Error, Example, Label

SAMPLERS = {
  name: getattr(sampling, name)
  for name in ('uniform', 'by_size', 'cyclic', 'poisson')
}


def make(name, num_clients, cohort_size, **kwargs):
  sizes = kwargs.pop('sizes', np.arange(1, num_clients + 1))
  return SAMPLERS[name](num_clients, cohort_size, sizes=sizes, **kwargs)


@pytest.mark.parametrize('module', [sampling, cohorts, labels])
def test_docstring_examples_run(module):
  result = doctest.testmod(module)
  assert result.attempted and not result.failed


# ---------------------------------------------------------------- sampling --


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_draw_is_a_pure_function_of_the_round(name):
  first, again = (
    make(name, 20, 5, availability=0.8, dropout=0.2) for _ in '12'
  )
  forward = [first(r) for r in range(8)]
  backward = [again(r) for r in reversed(range(8))][::-1]
  for a, b in zip(forward, backward):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.reports, b.reports)
  assert len({tuple(d.ids) for d in forward}) > 1
  other = make(name, 20, 5, seed=1)
  assert any((other(r).ids != make(name, 20, 5)(r).ids).any() for r in range(3))


@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('availability', [1.0, 0.3])
def test_no_client_is_drawn_twice_in_a_round(name, availability):
  sample = make(name, 11, 4, availability=availability, dropout=0.1)
  for r in range(50):
    draw = sample(r)
    ids = draw.ids[draw.ids >= 0]
    assert draw.ids.shape == draw.reports.shape == (4,)
    assert draw.ids.dtype == np.int32 and draw.reports.dtype == bool
    assert len(set(ids)) == len(ids) and (ids < 11).all()
    # Ascending, padding last, and padding never reports.
    np.testing.assert_array_equal(draw.ids[: len(ids)], np.sort(ids))
    assert not draw.reports[len(ids) :].any()


def test_uniform_draws_every_client_equally_often():
  sample = clients.uniform(10, 3)
  count = np.bincount(np.concatenate([sample(r).ids for r in range(4000)]))
  # 1200 expected, standard deviation 29.
  assert abs(count - 1200).max() < 130


def test_by_size_follows_the_successive_sampling_formula():
  size, draws = np.array([5.0, 3.0, 1.0, 1.0]), 6000
  sample = clients.by_size(4, 2, sizes=size)
  p = size / size.sum()
  expected = {
    frozenset(pair): sum(
      p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(pair)
    )
    for pair in itertools.combinations(range(4), 2)
  }
  seen = [frozenset(sample(r).ids.tolist()) for r in range(draws)]
  for pair, probability in expected.items():
    spread = np.sqrt(probability * (1 - probability) / draws)
    assert abs(seen.count(pair) / draws - probability) < 4.5 * spread


def test_by_size_never_draws_a_client_without_data():
  sample = clients.by_size(5, 4, sizes=[1, 0, 2, 0, 3])
  assert all(sample(r).ids.tolist() == [0, 2, 4, -1] for r in range(20))


@pytest.mark.parametrize('cohort_size', [1, 4, 5, 12])
def test_a_cyclic_pass_visits_every_client_once(cohort_size):
  sample = clients.cyclic(12, cohort_size)
  rounds = -(-12 // cohort_size)
  passes = [
    np.concatenate([sample(p * rounds + r).ids for r in range(rounds)])
    for p in range(3)
  ]
  for ids in passes:
    np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(12))
  if cohort_size == 4:
    assert len({tuple(ids) for ids in passes}) == 3


@pytest.mark.parametrize('name', ['uniform', 'cyclic', 'by_size'])
def test_availability_and_dropout_have_their_probabilities(name):
  sample = make(name, 40, 40, availability=0.7, dropout=0.25)
  draws = [sample(r) for r in range(200)]
  present = np.array([(d.ids >= 0).sum() for d in draws])
  reports = np.array([d.reports.sum() for d in draws])
  assert abs(present.mean() / 40 - 0.7) < 0.02
  assert abs(reports.sum() / present.sum() - 0.75) < 0.02


@pytest.mark.parametrize('name', ['uniform', 'by_size'])
def test_a_client_fares_the_same_in_a_larger_population(name):
  small = make(name, 30, 30, availability=0.5, dropout=0.5)
  large = make(name, 90, 90, availability=0.5, dropout=0.5)
  for r in range(5):
    a, b = small(r), large(r)
    fates = dict(zip(b.ids.tolist(), b.reports.tolist()))
    assert set(a.ids) - {-1} == {i for i in fates if 0 <= i < 30}
    assert all(fates[i] == s for i, s in zip(a.ids, a.reports) if i >= 0)


def test_dropout_changes_who_reports_and_not_who_is_drawn():
  a, b = clients.uniform(50, 10), clients.uniform(50, 10, dropout=0.5)
  for r in range(5):
    np.testing.assert_array_equal(a(r).ids, b(r).ids)


def test_full_takes_everybody_who_is_available():
  assert clients.full(4)(3).ids.tolist() == [0, 1, 2, 3]
  sample = clients.full(60, availability=0.5)
  assert 10 < (sample(0).ids >= 0).sum() < 50
  with pytest.raises(Error, match=r'all 4 clients every round.*not 3'):
    clients.full(4, 3)


@pytest.mark.parametrize('name', SAMPLERS)
def test_wrong_settings_are_refused_in_a_sentence(name):
  with pytest.raises(Error, match=r'cohort_size is 5.* only 4 clients'):
    make(name, 4, 5)
  with pytest.raises(Error, match='cohort_size is 0'):
    make(name, 4, 0)
  with pytest.raises(Error, match=r'availability is 1.5'):
    make(name, 4, 2, availability=1.5)
  with pytest.raises(Error, match=r'dropout is 1.0'):
    make(name, 4, 2, dropout=1.0)
  with pytest.raises(Error, match='seed is -1'):
    make(name, 4, 2, seed=-1)


@pytest.mark.parametrize(
  'sizes, says',
  [(None, 'needs sizes'), ([1, 2], '2 numbers for 3'), ([0] * 3, 'above 0'),
   ([1, -1, 1], 'not negative'), ([1, np.nan, 1], 'finite')],
)  # fmt: skip
def test_by_size_refuses_wrong_sizes(sizes, says):
  with pytest.raises(Error, match=says):
    clients.by_size(3, 1, sizes=sizes)


# ----------------------------------------------------------------- cohorts --


def text(length, name, first=1):
  """Tokens that tell which text they are of: name * 100 + position."""
  mask = np.arange(length) >= first
  return Example(np.int32(name * 100) + np.arange(length, dtype=np.int32), mask)


def population(seed=0, num_clients=6, longest=9):
  rng = np.random.default_rng(seed)
  names = itertools.count(1)
  return tuple(
    tuple(
      text(int(rng.integers(1, longest)), next(names), int(rng.integers(0, 3)))
      for _ in range(rng.integers(1, 8))
    )
    for _ in range(num_clients)
  )


def draw(*ids, reports=None):
  ids = np.array(ids, np.int32)
  return Draw(ids, ids >= 0 if reports is None else np.array(reports, bool))


def texts_of(batch):
  """The texts of a batch [..., T] as (first token, length), in order."""
  found = []
  width = batch.tokens.shape[-1]
  for tokens, mask, segments, positions in zip(
    *(np.reshape(x, (-1, width)) for x in batch[:4])
  ):
    for segment in range(1, segments.max() + 1):
      here = np.flatnonzero(segments == segment)
      assert (np.diff(here) == 1).all()
      np.testing.assert_array_equal(positions[here], np.arange(len(here)))
      assert not mask[here[0]]
      found.append((int(tokens[here[0]]), len(here)))
    assert not mask[segments == 0].any()
  return found


def names_of(examples):
  return sorted((int(x.tokens[0]), len(x.tokens)) for x in examples)


@pytest.mark.parametrize('packing', [False, True])
def test_a_clients_batches_do_not_depend_on_the_rest_of_the_cohort(packing):
  build = cohorts.cohorts(
    population(), num_steps=3, batch_size=2, max_length=9, packing=packing
  )
  full = build(draw(0, 1, 2, 3, 4, 5), 7)
  mixed = build(draw(-1, 5, 2, -1, 0), 7)
  for k, client in ((1, 5), (2, 2), (4, 0)):
    jax.tree.map(
      np.testing.assert_array_equal,
      tree.take(mixed.batches, k),
      tree.take(full.batches, client),
    )
    assert mixed.weight[k] == full.weight[client]


def test_batches_change_with_the_round_and_the_seed_only():
  def tokens(seed, round):
    build = cohorts.cohorts(
      population(), num_steps=2, batch_size=2, max_length=9, seed=seed
    )
    return build(draw(0, 1, 2), round).batches.tokens

  np.testing.assert_array_equal(tokens(0, 1), tokens(0, 1))
  assert (tokens(0, 1) != tokens(0, 2)).any()
  assert (tokens(0, 1) != tokens(1, 1)).any()


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('epochs', [1, 3])
def test_every_example_is_used_once_an_epoch_and_the_rest_is_padding(
  packing, epochs
):
  examples = population()
  build = cohorts.cohorts(
    examples,
    num_steps=25,
    batch_size=2,
    max_length=9,
    epochs=epochs,
    packing=packing,
    pad_id=9999,
  )
  cohort = build(draw(*range(6)), 0)
  for k, own in enumerate(examples):
    batch = tree.take(cohort.batches, k)
    assert sorted(texts_of(batch)) == sorted(names_of(own) * epochs)
    tokens = sum(len(x.tokens) for x in own) * epochs
    assert (batch.segments > 0).sum() == tokens
    assert (batch.tokens == 9999).sum() == 25 * 2 * 9 - tokens
    # Padding comes last: a used step never follows an unused one.
    used = (batch.segments > 0).any((1, 2))
    assert not (np.diff(used.astype(int)) > 0).any()


@pytest.mark.parametrize('packing', [False, True])
def test_without_a_limit_passes_repeat_until_the_steps_are_full(packing):
  examples = population()
  build = cohorts.cohorts(
    examples, num_steps=12, batch_size=2, max_length=9, packing=packing
  )
  cohort = build(draw(*range(6)), 0)
  for k, own in enumerate(examples):
    batch = tree.take(cohort.batches, k)
    assert (batch.segments > 0).any((1, 2)).all()
    count = [texts_of(batch).count(name) for name in names_of(own)]
    if packing:
      # First-fit changes rows within a step; a step takes the stream in order.
      used = (batch.segments > 0).sum(-1)
      assert (used <= 9).all()
    else:
      assert (batch.segments[..., 0] == 1).all()
    assert max(count) - min(count) <= 1
  first, second = (
    texts_of(tree.take(cohort.batches, 3))[i : i + len(examples[3])]
    for i in (0, len(examples[3]))
  )
  if not packing:
    assert sorted(first) == sorted(second) == names_of(examples[3])


def test_packing_closes_a_step_only_when_the_next_text_fits_nowhere():
  examples = ((text(5, 1), text(4, 2), text(3, 3), text(2, 4)),)
  build = cohorts.cohorts(
    examples, num_steps=9, batch_size=2, max_length=8, packing=True
  )
  for r in range(5):
    segments = build(draw(0), r).batches.segments[0]  # [S, B, T]
    room = 8 - (segments > 0).sum(-1)
    begins = (segments[:, 0] == 1).sum(-1)  # the text that opened the step
    assert (begins[1:] > room[:-1].max(-1)).all()
    # 14 of the 16 places hold the four texts in most orders.
    assert segments.max() >= 2


def test_tokens_and_masks_are_those_of_the_example():
  examples = ((text(4, 1, first=2),),)
  build = cohorts.cohorts(examples, num_steps=1, batch_size=2, max_length=6)
  batch = tree.take(build(draw(0), 0).batches, (0, 0, 1))
  assert batch.tokens.tolist() == [100, 101, 102, 103, 0, 0]
  assert batch.loss_mask.tolist() == [False, False, True, True, False, False]
  assert batch.segments.tolist() == [1, 1, 1, 1, 0, 0]
  assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0]
  assert batch.tokens.dtype == np.int32 and batch.loss_mask.dtype == bool


@pytest.mark.parametrize('weight_by', ['examples', 'tokens', 'uniform'])
def test_weights_count_what_they_say(weight_by):
  examples = population()
  build = cohorts.cohorts(
    examples, num_steps=2, batch_size=2, max_length=9, weight_by=weight_by
  )
  cohort = build(draw(0, 3, 4, -1, reports=[1, 1, 0, 0]), 0)
  expected = {
    'examples': [len(examples[0]), len(examples[3]), 0, 0],
    'tokens': cohort.batches.loss_mask.sum((1, 2, 3)),
    'uniform': [1, 1, 0, 0],
  }[weight_by]
  np.testing.assert_array_equal(cohort.weight, np.float32(expected))
  assert cohort.weight.dtype == np.float32
  assert cohort.valid.tolist() == [True, True, False, False]
  # Padding and drop-outs are empty in every field.
  assert not any(np.any(x[2:]) for x in cohort.batches[:4])


def test_profiles_follow_their_clients():
  build = cohorts.cohorts(
    population(),
    num_steps=1,
    batch_size=1,
    max_length=9,
    profiles={'rank': np.arange(6) * 10},
  )
  assert build(draw(4, 1, -1), 0).profiles['rank'].tolist() == [40, 10, 0]


@pytest.mark.parametrize('profiles', [None, (), {'rank': np.arange(6)}])
def test_the_tier_of_a_draw_is_a_profile(profiles):
  make = functools.partial(
    *(cohorts.cohorts, population()), num_steps=1, batch_size=1, max_length=9
  )
  drawn = draw(4, 1)._replace(tier=np.array([2, 2]))
  build = make(profiles=profiles)
  rows = build(drawn, 0).profiles
  assert rows['tier'].tolist() == [2, 2]
  assert set(rows) == {'tier', *(profiles or {})}
  build = make(profiles=np.arange(6) * 10)
  assert build(drawn, 0).profiles.tolist() == [40, 10]  # it has no names


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('epochs', [None, 1, 2])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), batch_size=st.integers(1, 9))
def test_no_step_holds_more_targets_than_the_bound(
  packing, epochs, seed, batch_size
):
  examples = population(seed, num_clients=3)
  bound = cohorts.max_targets(
    examples,
    batch_size=batch_size,
    max_length=10,
    epochs=epochs,
    packing=packing,
  )
  build = cohorts.cohorts(
    examples,
    num_steps=6,
    batch_size=batch_size,
    max_length=10,
    epochs=epochs,
    packing=packing,
  )
  for r in range(3):
    held = build(draw(0, 1, 2), r).batches.loss_mask.sum((2, 3))
    assert held.max() <= bound


def test_the_bound_without_packing_is_reached_across_two_passes():
  # One client of 4 texts, 3 rows: a text may end a pass and begin the next.
  examples = ((text(9, 1), text(3, 2), text(2, 3), text(2, 4)),)
  build = cohorts.cohorts(examples, num_steps=200, batch_size=3, max_length=9)
  held = build(draw(0), 0).batches.loss_mask.sum((2, 3))
  bound = cohorts.max_targets(examples, batch_size=3, max_length=9)
  assert held.max() == bound == 8 + 2 + 8


def test_rows_hold_every_example_once_beside_its_owner():
  examples = population()
  for buckets in ((), (3, 5, 99)):
    groups = cohorts.rows(
      examples,
      batch_size=4,
      max_length=9,
      owners=range(10, 16),
      buckets=buckets,
    )
    found = {}
    for batches, owners in groups:
      assert batches.tokens.shape[:2] == owners.shape
      for slot in np.ndindex(*owners.shape):
        here = texts_of(tree.take(batches, slot))
        assert len(here) == (owners[slot] >= 0)
        found.setdefault(int(owners[slot]), []).extend(here)
    found.pop(-1, None)
    assert {o: sorted(x) for o, x in found.items()} == {
      10 + i: names_of(own) for i, own in enumerate(examples)
    }
    widths = [group.batches.tokens.shape[-1] for group in groups]
    assert widths == ([3, 5, 9] if buckets else [9])
    lengths = np.concatenate(
      [(g.batches.segments > 0).sum(-1)[g.owners >= 0] for g in groups]
    )
    assert (np.diff(lengths) >= 0).all()


@pytest.mark.parametrize(
  'kwargs, examples, says',
  [
    ({}, ((text(9, 1),), (text(10, 2),)), 'example 0 of client 1 has 10.*=9'),
    ({}, ((text(0, 1),),), 'example 0 of client 0 has 0 tokens'),
    ({}, ((text(1, 1),), ()), 'client 1 has no example'),
    ({'weight_by': 'size'}, ((text(1, 1),),), "'size'.*examples, tokens"),
    ({'num_steps': 0}, ((text(1, 1),),), 'num_steps is 0'),
    ({'epochs': 0}, ((text(1, 1),),), 'epochs is 0'),
  ],
)
def test_what_does_not_fit_is_refused(kwargs, examples, says):
  settings = {'num_steps': 1, 'batch_size': 1, 'max_length': 9, **kwargs}
  with pytest.raises(Error, match=says):
    cohorts.cohorts(examples, **settings)


def test_a_draw_from_another_population_is_refused():
  build = cohorts.cohorts(population(), num_steps=1, batch_size=1, max_length=9)
  with pytest.raises(Error, match='client 6 was drawn from a population of 6'):
    build(draw(6), 0)


# ------------------------------------------------------------------ scopes --


def parameters(residual=None):
  def node():
    return LowRank(
      a=jnp.ones((2, 4, 3)), b=jnp.zeros((2, 3, 5)), scale=jnp.ones(2),
      residual=residual,
    )  # fmt: skip

  return {
    'layers': {'self_attn': {'q_proj': node(), 'v_proj': node()}},
    'head': jnp.zeros(4),
    'step': jnp.int32(0),
  }


def labels_by_name(scope, params):
  labels = scope.labels(params)
  return dict(zip(scopes.leaf_paths(params), jax.tree.leaves(labels)))


def test_leaves_are_named_by_keys_and_fields():
  assert scopes.leaf_paths(parameters()) == [
    'head',
    *(
      f'layers/self_attn/{target}/{field}'
      for target in ('q_proj', 'v_proj')
      for field in ('a', 'b', 'scale')
    ),
    'step',
  ]


def test_everything_shares_all_floats_but_scales_and_residuals():
  params = parameters(residual=jnp.zeros((2, 4, 5)))
  labels = labels_by_name(scopes.everything(), params)
  frozen = {name for name, label in labels.items() if label is Label.FROZEN}
  assert frozen == {'step'} | {
    f'layers/self_attn/{target}/{field}'
    for target in ('q_proj', 'v_proj')
    for field in ('scale', 'residual')
  }
  assert {labels[n] for n in set(labels) - frozen} == {Label.SHARED}


def test_everything_is_held_and_trained_where_it_is_not_frozen():
  params, scope = parameters(), scopes.everything()
  masks = scope.mask(params, ClientState(), Context())
  expected = tree.full_masks(params, scope.labels(params))
  assert jax.tree.structure(masks) == jax.tree.structure(expected)
  assert all(bool(x) for x in jax.tree.leaves(masks))
  assert masks.held['layers']['self_attn']['q_proj'].scale is None
  assert len(jax.tree.leaves(masks.trained)) == 5


def test_labels_also_work_on_shapes_alone():
  params = parameters()
  shapes = jax.eval_shape(lambda: params)
  assert labels_by_name(scopes.everything(), shapes) == labels_by_name(
    scopes.everything(), params
  )


def test_patterns_choose_leaves_and_the_first_that_matches_decides():
  scope = scopes.labelled({'q_proj/b$': 'private', 'proj/': Label.FROZEN})
  labels = labels_by_name(scope, parameters())
  assert labels['layers/self_attn/q_proj/b'] is Label.PRIVATE
  assert labels['layers/self_attn/q_proj/a'] is Label.FROZEN
  assert labels['layers/self_attn/v_proj/b'] is Label.FROZEN
  assert labels['head'] is Label.SHARED


def test_private_and_frozen_leave_the_rest_shared():
  params = parameters()
  for scope, wanted in (
    (scopes.private('/b$'), Label.PRIVATE),
    (scopes.frozen('/b$'), Label.FROZEN),
  ):
    labels = labels_by_name(scope, params)
    assert labels['layers/self_attn/v_proj/b'] is wanted
    assert labels['layers/self_attn/v_proj/a'] is Label.SHARED


def test_all_private_shares_nothing_and_trains_what_everything_trains():
  params = parameters()
  shared = labels_by_name(scopes.everything(), params)
  kept = labels_by_name(scopes.all_private(), params)
  assert Label.SHARED not in kept.values()
  assert {n for n in kept if kept[n] is Label.PRIVATE} == {
    n for n in shared if shared[n] is Label.SHARED
  }


@pytest.mark.parametrize('pattern', ['k_proj', '/scale$', '^step$'])
def test_a_pattern_that_matches_nothing_trainable_lists_the_leaves(pattern):
  with pytest.raises(Error, match=r'matches no leaf.*head.*q_proj/a.*v_proj/b'):
    scopes.private(pattern).labels(parameters())


def test_wrong_patterns_and_labels_are_refused():
  with pytest.raises(Error, match=r"'\(' is no regular expression"):
    scopes.private('(')
  with pytest.raises(Error, match="'mine' is no label; there are shared"):
    scopes.labelled({'a': 'mine'})
  with pytest.raises(Error, match='at least one pattern'):
    scopes.labelled({})
  with pytest.raises(Error, match="'q_proj/b' is decided by the patterns"):
    scopes.labelled({'/b$': 'private', 'q_proj/b': 'frozen'}).labels(
      parameters()
    )
