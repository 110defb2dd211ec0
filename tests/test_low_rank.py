"""The low-rank algebra and the rules over it, against full matrices."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_lora as ref

from fedjax_llm import adapters, aggregators, models, tree
from fedjax_llm.aggregators import low_rank, low_rank_metrics
from fedjax_llm.clients import scopes
from fedjax_llm.types import Batch, Context, Error, LowRank, Shared, Uploads

# Clients, layers, D, F, R: the stack is below both sides, between, above both.
SHAPES = {
  'small': (3, (2,), 9, 8, 2),
  'mixed': (3, (), 12, 4, 2),
  'wide': (4, (1,), 5, 7, 3),
}
PENALTY = 0.05
few = hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
draws = hypothesis.given(
  shape=st.sampled_from(sorted(SHAPES)),
  seed=st.integers(0, 10**6),
  gaps=st.booleans(),
)


def clients(shape, seed, scales=True):
  """Factors that share a part, as those of clients do; weights; numpy."""
  k, lead, d, f, r = SHAPES[shape]
  rng = np.random.default_rng(seed)
  near = lambda *s: rng.normal(size=s) + 0.5 * rng.normal(size=(k, *s))
  scale = (
    rng.uniform(0.3, 2.0, (k, *lead)) if scales else np.full((k, *lead), 2)
  )
  return (
    LowRank(*map(np.float32, (near(*lead, d, r), near(*lead, r, f), scale))),
    rng.uniform(0.1, 3.0, k).astype(np.float32),
  )


def each(nodes):
  """Every layer as (a [K, D, R], b [K, R, F], scale [K])."""
  k, lead = nodes.scale.shape[0], nodes.scale.shape[1:]
  flat = [x.reshape(k, -1, *x.shape[1 + len(lead) :]) for x in nodes[:3]]
  for layer in range(flat[0].shape[1]):
    yield tuple(x[:, layer] for x in flat)


def layers(x, lead):
  return np.asarray(x).reshape(-1, *np.shape(x)[len(lead) :])


def near(got, want, atol=2e-5, rtol=1e-5):
  size = max(1.0, float(np.abs(want).max()))
  np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * size)


@jax.jit
def algebra(nodes, weight):
  share = tree.normalise(weight)
  stack = low_rank.stack(nodes, share)
  rank = nodes.a.shape[-1]
  same = nodes._replace(scale=jnp.ones_like(nodes.scale))
  mean = low_rank.mean(same, share)
  served = LowRank(mean.a + 0.1, mean.b - 0.2, nodes.scale[0])
  rounded = {
    split: low_rank.svd_round(stack, rank, scale=nodes.scale[0], split=split)
    for split in ('a', 'b', 'both')
  }
  return {
    'stack': low_rank.dense(stack),
    'norm': low_rank.fro_norm(stack),
    'effective_rank': low_rank.effective_rank(stack),
    'rounded': rounded,
    'covariance': low_rank.dense(low_rank.residual(same, share)),
    'served': served,
    'missed': low_rank.dense(low_rank.residual(nodes, share, served)),
    'ridge': low_rank.ridge(same, share, mean, PENALTY),
  }


@few
@draws
def test_the_algebra_equals_full_matrices_in_float64(shape, seed, gaps):
  nodes, weight = clients(shape, seed)
  if gaps:
    weight[1] = 0  # a client that did not report
  lead, rank = SHAPES[shape][1], SHAPES[shape][-1]
  got = algebra(nodes, weight)
  for i, (a, b, scale) in enumerate(each(nodes)):
    at = lambda x, i=i: layers(x, lead)[i]
    wanted = ref.mean_product(a, b, scale, weight)
    near(at(got['stack']), wanted)
    near(at(got['norm']), np.linalg.norm(wanted))
    near(at(got['effective_rank']), ref.effective_rank(wanted), 1e-4)
    best = ref.flexlora(a, b, scale, weight, rank)
    for rounded in got['rounded'].values():
      assert rounded.a.shape[-1] == rank
      near(at(low_rank.dense(rounded)), best)
    ones = np.ones_like(scale)
    _, mean_b, missed = ref.fedex(a, b, ones, weight)
    near(at(got['covariance']), missed)
    served = [at(x) for x in got['served'][:2]]
    near(at(got['missed']), wanted - scale[0] * served[0] @ served[1])
    _, fair = ref.lora_fair(a, b, weight, PENALTY)
    near(mean_b + at(got['ridge']), fair, 1e-4, 1e-4)


def test_the_factors_of_a_rounded_product_are_ordered_and_orthogonal():
  nodes, weight = clients('small', 5)
  rounded = algebra(nodes, weight)['rounded']
  a, b = rounded['b'].a, rounded['b'].b
  near(np.swapaxes(a, -1, -2) @ a, np.broadcast_to(np.eye(2), (2, 2, 2)))
  norms = np.linalg.norm(b, axis=-1)
  assert (np.diff(norms) < 0).all()
  both = rounded['both']
  near(np.linalg.norm(both.a, axis=-2), np.linalg.norm(both.b, axis=-1))


def test_the_first_columns_of_a_rounded_product_are_the_best_of_that_rank():
  nodes, weight = clients('wide', 3)
  rounded = algebra(nodes, weight)['rounded']['b']
  ((a, b, scale),) = each(nodes)
  for rank in (1, 2, 3):
    cut = scale[0] * rounded.a[0, :, :rank] @ rounded.b[0, :rank]
    near(cut, ref.flexlora(a, b, scale, weight, rank))


def test_a_residual_has_rank_k_minus_one_times_r():
  nodes, weight = clients('small', 1, scales=False)
  missed = algebra(nodes, weight)['covariance']
  values = np.linalg.svd(np.asarray(missed), compute_uv=False)
  assert (values[:, 4:] < 1e-5 * values[:, :1]).all()  # (3 - 1) * 2
  assert (values[:, 3] > 1e-3).all()


def test_rank_above_the_sides_is_padded_with_zeros():
  node = LowRank(jnp.ones((3, 5)), jnp.ones((5, 2)), jnp.ones(()))
  rounded = low_rank.svd_round(node, 4)
  assert rounded.a.shape == (3, 4) and rounded.b.shape == (4, 2)
  near(low_rank.dense(rounded), np.full((3, 2), 5.0))


def test_norms_and_ranks_of_products_that_are_zero_or_huge():
  zero = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.ones(()))
  assert low_rank.fro_norm(zero) == 0 and low_rank.effective_rank(zero) == 0
  for size in (1e-9, 1e9):
    node = LowRank(size * jnp.eye(4), jnp.eye(4), jnp.ones(()))
    near(low_rank.effective_rank(node), 4.0)


def test_rounding_makes_no_matrix_of_the_full_size():
  d, f, r, k = 60, 50, 2, 3
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  nodes = LowRank(like(k, d, r), like(k, r, f), like(k))

  def run(nodes, weight):
    stack = low_rank.stack(nodes, weight)
    served = low_rank.mean(nodes, weight)
    return (
      low_rank.svd_round(stack, r),
      low_rank.residual(nodes, weight, served),
      low_rank.ridge(nodes, weight, served, 0.1),
      low_rank.fro_norm(stack),
      low_rank.effective_rank(stack),
    )

  text = jax.jit(run).lower(nodes, like(k)).as_text()
  assert f'{d}x{k * r}x' in text  # the stack is there
  for shape in (f'{d}x{f}x', f'{f}x{d}x', f'{d}x{d}x', f'{f}x{f}x'):
    assert shape not in text


@pytest.mark.parametrize(
  'broken',
  [
    lambda: low_rank.svd_round(NODE, 0),
    lambda: low_rank.svd_round(NODE, 1, split='c'),
    lambda: low_rank.ridge(NODE, jnp.ones(1), NODE, 0.0),
    lambda: aggregators.fedex(residual_rank=0),
    lambda: aggregators.lora_fair(penalty=-1.0),
    lambda: aggregators.flexlora(split='sqrt'),
    lambda: aggregators.norm_weighted(per='layer'),
    lambda: aggregators.fedsvd(every=0),
    lambda: aggregators.fedrot(strength=1.5),
    lambda: aggregators.fedrot(first='c'),
  ],
)
def test_settings_out_of_range_are_refused(broken):
  with pytest.raises(Error, match=r'must be|neither|none of'):
    broken()


NODE = LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.ones(()))

# -------------------------------------------------------------------- rules --

RULES = {
  'fedex': aggregators.fedex(),
  'fedex_weighted': aggregators.fedex(weighted=True),
  'fedex_rank_1': aggregators.fedex(residual_rank=1),
  'flora': aggregators.flora(),
  'flexlora': aggregators.flexlora(),
  'hlora': aggregators.flexlora(split='a'),
  'fedsvd': aggregators.fedsvd(),
  'fedrot': aggregators.fedrot(),
  'lora_fair': aggregators.lora_fair(penalty=PENALTY),
  'norm_weighted': aggregators.norm_weighted(),
  'norm_per_target': aggregators.norm_weighted(per='target'),
  'zero_padding': aggregators.zero_padding(),
  'rbla': aggregators.as_stack(aggregators.masked_mean('mask')),
  'replication': aggregators.replication(),
}
KEY = jax.random.key(2)
RANKS: Any = scopes.ranks()
rule_draws = hypothesis.given(
  shape=st.sampled_from(['small', 'wide']),
  seed=st.integers(0, 10**6),
  gaps=st.booleans(),
)


def uploads_of(shape, seed, ranks=None, drop=None):
  """A server's node, and the uploads of clients that hold the first ranks."""
  nodes, weight = clients(shape, seed, scales=False)
  k, lead, d, f, r = SHAPES[shape]
  rng = np.random.default_rng(seed + 1)
  server = LowRank(
    rng.normal(size=(*lead, d, r)).astype(np.float32),
    rng.normal(size=(*lead, r, f)).astype(np.float32),
    nodes.scale[0],
  )
  params = {'bias': np.ones(2, np.float32), 'q': server}
  ranks = np.full(k, r) if ranks is None else np.asarray(ranks)
  masks = jax.vmap(
    lambda rank: RANKS.mask(params, None, Context(profile=rank))
  )(jnp.asarray(ranks))
  start = tree.broadcast(params, k)
  held = masks.held['q']
  start['q'] = start['q']._replace(
    a=start['q'].a * np.asarray(tree.rows(held.a, nodes.a)),
    b=start['q'].b * np.asarray(tree.rows(held.b, nodes.b)),
  )
  whole = nodes._replace(
    a=nodes.a * np.asarray(tree.rows(held.a, nodes.a)),
    b=nodes.b * np.asarray(tree.rows(held.b, nodes.b)),
  )
  update = {
    'bias': rng.normal(size=(k, 2)).astype(np.float32),
    'q': LowRank(whole.a - start['q'].a, whole.b - start['q'].b, None),
  }
  valid = np.ones(k, bool)
  if drop is not None:
    valid[drop] = False
    weight[drop] = 0
    update = jax.tree.map(
      lambda x: np.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0), update
    )
  start['q'] = start['q']._replace(a=jnp.asarray(start['q'].a))
  return Uploads(update, start, masks, weight, valid), params, whole, ranks


@functools.cache
def applied(name):
  rule = RULES[name]

  @jax.jit
  def run(uploads, params, key):
    state = rule.init(params, key)
    result, state = rule.aggregate(uploads, state, params, key)
    new = tree.add(params, result.delta)
    if result.assign is not None:
      new = tree.merge(result.assign, new)
    return new, rule.num_bytes(state, ())[0] if rule.num_bytes else ()

  def all_of(uploads, params, key):
    new, bytes_down = run(uploads, params, key)
    return new, bytes_down, measured(uploads, params, new)

  return all_of


measured = jax.jit(low_rank_metrics.measure)  # one program for all rules


def served(node):
  """s a b and the residual: what the model computes, float64."""
  a, b, scale = ref.f64(node.a, node.b, node.scale)
  product = scale[..., None, None] * (a @ b)
  return product if node.residual is None else product + node.residual


@few
@rule_draws
@hypothesis.example(shape='small', seed=0, gaps=True)
def test_every_rule_equals_its_reference(shape, seed, gaps):
  r = SHAPES[shape][-1]
  ranks = [r, *[1] * (SHAPES[shape][0] - 1)] if gaps else None
  uploads, params, whole, ranks = uploads_of(shape, seed, ranks)
  lead = SHAPES[shape][1]
  weight, equal = uploads.weight, np.ones(len(ranks))
  new = {name: applied(name)(uploads, params, KEY)[0]['q'] for name in RULES}
  old = params['q']
  for i, (a, b, scale) in enumerate(each(whole)):
    at = lambda x, i=i: layers(x, lead)[i]
    got = lambda name, at=at: tuple(at(x) for x in new[name][:2])
    near(at(new['flora'].residual), ref.mean_product(a, b, scale, weight))
    best = ref.flexlora(a, b, scale, weight, r)
    near(at(served(new['flexlora'])), best)
    near(at(served(new['hlora'])), best)
    if not gaps:  # papers know these with one rank for everybody
      for name, w in (('fedex', equal), ('fedex_weighted', weight)):
        mean_a, mean_b, residual = ref.fedex(a, b, scale, w)
        near(got(name)[0], mean_a)
        near(got(name)[1], mean_b)
        near(at(new[name].residual), residual)
      u, s, v = np.linalg.svd(ref.fedex(a, b, scale, equal)[2])
      near(at(new['fedex_rank_1'].residual), s[0] * np.outer(u[:, 0], v[0]))
      mean_a, mean_b = ref.mean_factors(a, b, weight)
      near(at(served(new['fedsvd'])), scale[0] * mean_a @ mean_b)
      fair = ref.lora_fair(a, b, weight, PENALTY)
      near(got('lora_fair')[0], fair[0])
      near(got('lora_fair')[1], fair[1], 1e-4, 1e-4)
    for name, want in (
      ('norm_per_target', ref.het_lora(a, b, scale)),
      ('zero_padding', ref.mean_factors(a, b, weight)),
      ('rbla', ref.rbla(a, b, ranks, weight, at(old.a), at(old.b))),
      (
        'replication',
        ref.replication(a, b, ranks, weight, at(old.a), at(old.b)),
      ),
    ):
      near(got(name)[0], want[0])
      near(got(name)[1], want[1])
    assert not at(new['flora'].b).any()
    assert np.abs(at(new['flora'].a)).max() <= a.shape[1] ** -0.5
  # Over all layers at once: one weight a client.
  norms = [np.linalg.norm(served(tree.take(whole, k))) for k in range(len(a))]
  for i, (a, b, _) in enumerate(each(whole)):
    want = ref.mean_factors(a, b, norms)
    near(layers(new['norm_weighted'].a, lead)[i], want[0])
    near(layers(new['norm_weighted'].b, lead)[i], want[1])


EXACT = ('fedex_weighted', 'flora')


@pytest.mark.parametrize('name', RULES)
def test_one_client_is_taken_as_it_is(name):
  uploads, params, whole, _ = uploads_of('small', 4, drop=[1, 2])
  new = applied(name)(uploads, params, KEY)[0]
  want = served(tree.take(whole, 0))
  if name == 'lora_fair':  # the mean product is there already: c = 0
    near(new['q'].b, whole.b[0])
  near(served(new['q']), want)
  near(new['bias'], 1 + uploads.update['bias'][0])


@pytest.mark.parametrize('name', RULES)
def test_identical_clients_are_taken_as_they_are(name):
  uploads, params, whole, _ = uploads_of('small', 4)
  first = lambda x: jnp.broadcast_to(x[:1], x.shape)
  uploads = uploads._replace(update=jax.tree.map(first, uploads.update))
  new, _, told = applied(name)(uploads, params, KEY)
  near(served(new['q']), served(tree.take(whole, 0)))
  assert told['aggregators/drift'] < 1e-6
  assert told['aggregators/error'] < 3e-3  # what Gram matrices resolve


@pytest.mark.parametrize('name', RULES)
def test_a_permuted_stack_gives_the_same_result(name):
  uploads, params, _, _ = uploads_of('small', 6, ranks=[2, 1, 2])
  order = np.array([2, 0, 1])
  one = applied(name)(uploads, params, KEY)
  two = applied(name)(tree.take(uploads, order), params, KEY)
  near(served(one[0]['q']), served(two[0]['q']))
  near(one[2]['aggregators/error'], two[2]['aggregators/error'], 3e-3)


@pytest.mark.parametrize('name', RULES)
def test_a_client_that_did_not_report_counts_for_nothing(name):
  uploads, params, _, _ = uploads_of('small', 7, ranks=[1, 2, 2], drop=[1])
  two = tree.take(uploads, np.array([0, 2]))
  new, bytes_down, _ = applied(name)(uploads, params, KEY)
  alone, alone_down, _ = applied(name)(two, params, KEY)
  near(served(new['q']), served(alone['q']))
  assert jax.tree.map(lambda x: x.tolist(), bytes_down) == jax.tree.map(
    lambda x: x.tolist(), alone_down
  )


@pytest.mark.parametrize(
  'name', ['flexlora', 'norm_weighted', 'zero_padding', 'rbla', 'replication']
)
def test_with_equal_ranks_nothing_is_masked(name):
  """They reduce to the mean, FlexLoRA to the best product of that rank."""
  uploads, params, whole, _ = uploads_of('wide', 8)
  if name == 'norm_weighted':  # equal norms: rows of one client, permuted
    same = tree.take(whole, np.zeros(4, int))
    turned = same._replace(a=same.a[:, :, ::-1] * 1.0)
    whole = turned
    start = uploads.start['q']
    update = LowRank(whole.a - start.a, whole.b - start.b, None)
    norms = [np.linalg.norm(served(tree.take(whole, k))) for k in range(4)]
    assert np.ptp(norms) < 1e-5
    uploads = uploads._replace(update={**uploads.update, 'q': update})
  new = applied(name)(uploads, params, KEY)[0]['q']
  ((a, b, scale),) = each(whole)
  if name == 'flexlora':
    near(served(new)[0], ref.flexlora(a, b, scale, uploads.weight, 3))
    return
  mean_a, mean_b = ref.mean_factors(a, b, uploads.weight)
  near(new.a[0], mean_a)
  near(new.b[0], mean_b)


def test_flexlora_is_exact_once_the_rank_holds_the_stack():
  uploads, params, whole, _ = uploads_of('small', 9)
  uploads = tree.take(uploads, np.array([0, 1]))
  ranks = jnp.array([1, 1])  # two clients of rank one in buffers of rank two
  masks = jax.vmap(
    lambda rank: RANKS.mask(params, None, Context(profile=rank))
  )(ranks)
  uploads = uploads._replace(masks=masks)
  new, _, told = applied('flexlora')(uploads, params, KEY)
  whole = tree.whole(uploads)['q']
  for i, (a, b, scale) in enumerate(each(whole)):
    want = ref.mean_product(a, b, scale, uploads.weight)
    near(served(new['q'])[i], want)
  assert told['aggregators/error'] < 3e-3


@pytest.mark.parametrize('name', EXACT)
def test_rules_that_claim_exactness_serve_the_mean_of_the_clients(name):
  uploads, params, whole, _ = uploads_of('small', 10, ranks=[2, 1, 1])
  new, _, told = applied(name)(uploads, params, KEY)
  for i, (a, b, scale) in enumerate(each(whole)):
    near(served(new['q'])[i], ref.mean_product(a, b, scale, uploads.weight))
  assert told['aggregators/error'] < 1e-6


def test_residuals_of_rounds_add_up():
  uploads, params, whole, _ = uploads_of('small', 11)
  before = np.full((2, 9, 8), 3.0, np.float32)
  params['q'] = params['q']._replace(residual=before)
  new, _, told = applied('fedex_weighted')(uploads, params, KEY)
  for i, (a, b, scale) in enumerate(each(whole)):
    want = ref.mean_product(a, b, scale, uploads.weight)
    near(served(new['q'])[i] - before[i], want)
  assert told['aggregators/error'] < 1e-6


@few
@rule_draws
def test_the_error_told_is_that_of_full_matrices(shape, seed, gaps):
  ranks = [SHAPES[shape][-1], *[1] * (SHAPES[shape][0] - 1)] if gaps else None
  uploads, params, whole, _ = uploads_of(shape, seed, ranks)
  for name in ('lora_fair', 'flexlora', 'rbla', 'fedex_rank_1'):
    new, _, told = applied(name)(uploads, params, KEY)
    gaps_, wants = [], []
    got = layers(served(new['q']), SHAPES[shape][1])
    for i, (a, b, scale) in enumerate(each(whole)):
      want = ref.mean_product(a, b, scale, uploads.weight)
      gaps_.append(np.linalg.norm(got[i] - want))
      wants.append(np.linalg.norm(want))
    error = np.linalg.norm(gaps_) / np.linalg.norm(wants)
    near(told['aggregators/error'], error, 3e-3, 1e-3)
    if SHAPES[shape][1]:
      near(
        told['aggregators/error_by_layer'],
        np.divide(gaps_, wants),
        3e-3,
        1e-3,
      )
    ranks_ = [
      ref.effective_rank(ref.mean_product(a, b, scale, uploads.weight))
      for a, b, scale in each(whole)
    ]
    near(told['aggregators/effective_rank'], np.mean(ranks_), 1e-4, 1e-4)


def test_drift_is_one_where_updates_cancel_and_zero_where_they_agree():
  weight = jnp.array([0.5, 0.5])
  apart = {'w': jnp.array([[1.0, 2.0], [-1.0, -2.0]])}
  assert low_rank_metrics.drift(apart, weight) == 1
  assert low_rank_metrics.drift(jax.tree.map(jnp.abs, apart), weight) == 0
  assert low_rank_metrics.drift(tree.zeros_like(apart), weight) == 0
  layers = {'w': jnp.array([[[1.0], [2.0]], [[-1.0], [2.0]]])}  # [K, L, 1]
  found = low_rank_metrics.drift(layers, weight, axes=2)
  assert found.tolist() == [1, 0]


def test_bytes_down_are_those_of_the_residuals_factors():
  uploads, params, _, _ = uploads_of('small', 12, ranks=[2, 1, 1])
  down = lambda name: applied(name)(uploads, params, KEY)[1]['q'].tolist()
  d, f = 9, 8
  assert down('fedex') == [4 * 4 * (d + f)] * 2  # (K - 1) R = 4 ranks a layer
  assert down('fedex_rank_1') == [4 * (d + f)] * 2
  assert down('flora') == [4 * 4 * (d + f)] * 2  # 2 + 1 + 1
  uploads, params, _, _ = uploads_of('wide', 12)
  assert applied('flora')(uploads, params, KEY)[1]['q'].tolist() == [4 * 5 * 7]


@pytest.mark.parametrize('name', ['fedex', 'flora', 'flexlora', 'lora_fair'])
def test_a_private_factor_is_refused(name):
  uploads, params, _, _ = uploads_of('small', 13)
  update = {**uploads.update}
  update['q'] = update['q']._replace(b=None)
  with pytest.raises(Error, match='q/b to themselves'):
    applied(name)(uploads._replace(update=update), params, KEY)


@functools.cache
def counted(every, first, strength):
  """FedSVD and FedRot in a given round."""
  rules = {
    'fedsvd': aggregators.fedsvd(every=every),
    'fedrot': aggregators.fedrot(strength=strength, first=first),
  }

  @jax.jit
  def run(uploads, params, count):
    out = {}
    for name, rule in rules.items():
      result, after = rule.aggregate(uploads, count, params, KEY)
      new = tree.add(params, result.delta)
      out[name] = tree.merge(result.assign, new)['q'], after
    return out

  return run


@pytest.mark.parametrize('first, strength', [('a', 1.0), ('b', 0.4)])
def test_fedrot_and_fedsvd_equal_their_references(first, strength):
  run = counted(2, first, strength)
  for seed in range(4):
    uploads, params, whole, _ = uploads_of('small', seed)
    for count in range(3):
      new = run(uploads, params, jnp.int32(count))
      assert new['fedrot'][1] == new['fedsvd'][1] == count + 1
      for i, (a, b, scale) in enumerate(each(whole)):
        old = params['q'].a[i], params['q'].b[i]
        aligned = first if count % 2 else {'a': 'b', 'b': 'a'}[first]
        want = ref.fedrot(a, b, uploads.weight, *old, aligned, strength)
        means = ref.mean_factors(a, b, uploads.weight)
        got = new['fedrot'][0]
        for x, y in zip((got.a[i], got.b[i]), want if count else means):
          near(x, y, 1e-4, 1e-4)
        got = new['fedsvd'][0]
        if count % 2:  # every second round
          u, rest = ref.fedsvd(a, b, scale, uploads.weight)
          sign = np.sign(np.sum(u * np.asarray(got.a[i]), axis=0))
          near(got.a[i] * sign, u, 1e-4, 1e-4)
          near(got.b[i] * sign[:, None], rest, 1e-4, 1e-4)
        else:
          near(got.a[i], means[0])
          near(got.b[i], means[1])


def test_clients_that_differ_by_a_rotation_are_averaged_exactly_by_fedrot():
  uploads, params, _, _ = uploads_of('small', 3)
  old = params['q']
  rng = np.random.default_rng(0)
  turn = np.stack(
    [ref.nearest_rotation(rng.normal(size=(2, 2))) for _ in range(3)]
  )[:, None]
  a = np.float32(old.a @ turn)
  b = np.float32(np.swapaxes(turn, -1, -2) @ old.b)
  update = LowRank(a - uploads.start['q'].a, b - uploads.start['q'].b, None)
  uploads = uploads._replace(update={**uploads.update, 'q': update})
  run = counted(2, 'a', 1.0)
  for count in (1, 2):
    new = run(uploads, params, jnp.int32(count))['fedrot'][0]
    near(served(new), served(old))
  plain = run(uploads, params, jnp.int32(0))['fedrot'][0]
  assert np.abs(served(plain) - served(old)).max() > 0.1


@pytest.mark.parametrize('name', ['flora', 'flexlora', 'fedsvd', 'fedrot'])
def test_writing_a_frozen_factor_is_refused(name):
  uploads, params, _, _ = uploads_of('small', 13)
  thaw = lambda x: {**x, 'q': x['q']._replace(a=None)}
  uploads = uploads._replace(
    update=thaw(uploads.update),
    masks=type(uploads.masks)(*map(thaw, uploads.masks)),
  )
  with pytest.raises(Error, match='q/a is frozen'):
    applied(name)(uploads, params, KEY)


def test_a_transformer_serves_the_logits_of_the_mean_weights():
  """FedEx and FLoRA to 1e-4 with a residual beside the base or folded in."""
  loaded = models.random(vocab_size=31, hidden_size=24, intermediate_size=32)
  adapter = adapters.lora(rank=3, alpha=6.0)
  params = adapter.init(jax.random.key(0), loaded.base)
  num, rng = 3, np.random.default_rng(0)
  labels = scopes.everything().labels(params)
  update = tree.map_present(
    lambda x: jnp.asarray(rng.normal(0, 0.3, (num, *x.shape)), jnp.float32),
    tree.select(params, labels, Shared),
  )
  masks = tree.broadcast(tree.full_masks(params, labels), num)
  weight = jnp.array([3.0, 1.0, 2.0])
  start = tree.broadcast(params, num)
  uploads = Uploads(update, start, masks, weight, jnp.ones(num, bool))
  whole = tree.whole(uploads)
  merged = [adapter.merge(loaded.base, tree.take(whole, k)) for k in range(num)]
  mean = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(
    np.asarray(weight) / 6, xs)), *merged)  # fmt: skip

  tokens = jnp.asarray(rng.integers(0, 31, (2, 7)), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
  batch = Batch(tokens, tokens > 0, jnp.ones_like(tokens), positions)

  @jax.jit
  def logits(base, params):
    hidden = loaded.model.hidden(base, params, batch)
    return loaded.model.logits(base, params, hidden)

  none = jax.tree.map(lambda _: None, params, is_leaf=low_rank.is_node)
  want = logits(mean, none)
  far = {}
  for name in ('fedex_weighted', 'flora', 'mean'):
    rule = {**RULES, 'mean': aggregators.as_stack(aggregators.mean())}[name]
    state = rule.init(params, KEY)
    result, _ = rule.aggregate(uploads, state, params, KEY)
    new = tree.add(params, result.delta)
    new = new if result.assign is None else tree.merge(result.assign, new)
    for base, served in (
      (loaded.base, new),
      adapter.fold(loaded.base, new),
    ):
      gap = jnp.abs(logits(base, served) - want).max()
      far[name] = max(float(gap), far.get(name, 0.0))
  assert far['fedex_weighted'] < 1e-4 and far['flora'] < 1e-4, far
  assert far['mean'] > 1e-2, far
