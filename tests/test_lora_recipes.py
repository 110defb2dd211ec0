"""The recipes of the LoRA family on a federation that is checked by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_lora as ref
import toy

from fedjax_llm import (
  adapters,
  aggregators,
  clients,
  local,
  recipes,
  server,
  tree,
  uploads,
)
from fedjax_llm.clients import scopes
from fedjax_llm.recipes.lora.lora_a2 import selected
from fedjax_llm.recipes.ranks.het_lora import self_pruning
from fedjax_llm.types import (
  ClientOutput,
  Codec,
  Context,
  Error,
  Frozen,
  LocalUpdate,
  LowRank,
  Shared,
)

KEY = jax.random.key(0)
HERE = Context(key=KEY)
K, ROUNDS = 4, 5
RANKS = np.array([2, 1, 1, 2], np.int32)
FACTORS = 4 * toy.R * (toy.D + toy.F)  # bytes of both

# What a recipe promises: whether what is served is the clients' mean exactly.
HOMOGENEOUS = {
  'fed_it': False,
  'ffa_lora': True,
  'rolora': True,
  'fed_sa': None,  # personal: there is no common product
  'fedex_lora': True,
  'lora_fair': False,
  'fed_svd': True,
  'fedrot_lora': False,
  'lora_a2': True,
  'flasc': False,
}
HETEROGENEOUS = {
  'zero_padding': False,
  'rbla': False,
  'replication_padding': False,
  'flora': True,
  'flexlora': False,
  'hlora': False,
  'het_lora': False,
}
RECIPES = {**HOMOGENEOUS, **HETEROGENEOUS}
SETTINGS = {
  'fedex_lora': dict(weighted=True),
  'flasc': dict(server_learning_rate=0.15, per='leaf', upload_density=0.5),
  'het_lora': dict(penalty=0.02, gamma=0.5),
  'lora_a2': dict(budget=1),
}


def build(name, **more):
  settings = {**SETTINGS.get(name, {}), **more}
  return getattr(recipes, name)(
    toy.loss, toy.sgd(0.1), fold=toy.fold, **settings
  )


def watched(codec):
  """The codec, which leaves message and masks in the client's state."""

  def full(update, masks):
    return jax.tree.map(
      lambda u, m: jnp.broadcast_to(m, u.shape), update, masks.trained
    )

  def init(update):
    blank = jax.tree.map(lambda u: jnp.zeros(u.shape, bool), update)
    return tree.zeros_like(update), blank

  def encode(update, masks, state, key):
    message, _ = codec.encode(update, masks, (), key)
    return message, (message, full(update, masks))

  return Codec(init, encode, codec.decode, codec.num_bytes)


def cohort(states=None, profiles: Any = RANKS, **more):
  """Clients whose targets come from one low-rank teacher, nearly."""
  plain = toy.cohort(num_clients=K, steps=3, states=states, **more)
  rng = np.random.default_rng(5)
  teacher = rng.normal(size=(toy.D, 1)) @ rng.normal(size=(1, toy.F))
  own = 0.3 * rng.normal(size=(K, toy.D, toy.F))
  w = np.asarray(toy.base()) + teacher + own
  y = np.einsum('ksbd,kdf->ksbf', plain.batches.x, w).astype(np.float32)
  return plain._replace(batches=plain.batches._replace(y=y), profiles=profiles)


def start_params():
  """a as drawn, b zero, as every adapter starts."""
  q = toy.params()['q']
  return {'q': q._replace(b=jnp.zeros_like(q.b))}


@functools.cache
def run(name, num_rounds=ROUNDS, **more):
  """Every round's (state before, state after, client states, metrics)."""
  codec = uploads.identity(bitmap=name == 'lora_a2')
  watch = {} if name == 'flasc' else {'upload': watched(codec)}
  algorithm = build(name, **watch, **more)
  state = algorithm.init(KEY, start_params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  step = jax.jit(algorithm.round)
  history = []
  for _ in range(num_rounds):
    before = state
    state, states, told = step(before, cohort(states), toy.base())
    history.append((before, state, states, jax.device_get(told)))
  return algorithm, history


def ends(before, states):
  """Whole factors of the clients after training, [K, ...] a and b, float64."""
  message, _ = states.upload
  found = []
  for factor in ('a', 'b'):
    old = np.float64(getattr(before.params['q'], factor))
    new = getattr(message['q'], factor)
    found.append(
      old + (0 if new is None else np.float64(new)) + np.zeros((K, 1, 1))
    )
  return found


@pytest.mark.parametrize('name', RECIPES)
def test_the_loss_falls(name):
  _, history = run(name)
  losses = [told.metrics['local/loss'] for *_, told in history]
  assert losses[-1] < 0.75 * losses[0], losses


@pytest.mark.parametrize('name', [n for n in RECIPES if n != 'flasc'])
def test_bytes_are_those_of_a_serialised_message(name):
  _, history = run(name)
  for t, (_, _, states, told) in enumerate(history[:3]):
    message, sent = states.upload
    for k in range(K):
      wire = b''.join(
        np.asarray(x)[k][np.asarray(m)[k]].tobytes()
        for x, m in zip(
          jax.tree.leaves(message), jax.tree.leaves(sent), strict=True
        )
      )
      if name == 'lora_a2':  # which units: a bit each
        kept = sent['q'].a[k].any(0) if t % 2 else sent['q'].b[k].any(1)
        wire += np.packbits(kept).tobytes()
      assert len(wire) == told.bytes_up[k].sum()


def test_bytes_up_and_down_are_those_of_the_method():
  """Closed forms, by hand: r (m + n) floats of four bytes."""
  d, f, r = toy.D, toy.F, toy.R
  bytes_of = lambda name, way, t: (
    getattr(run(name)[1][t][3], f'bytes_{way}').sum(1).tolist()
  )
  same = lambda num: [num] * K
  by_rank = (FACTORS * RANKS // r).tolist()
  assert bytes_of('fed_it', 'up', 0) == same(FACTORS)
  assert bytes_of('ffa_lora', 'up', 0) == same(4 * r * f)
  assert bytes_of('ffa_lora', 'down', 0) == same(4 * r * f)
  assert bytes_of('rolora', 'up', 0) == same(4 * r * f)
  assert bytes_of('rolora', 'up', 1) == same(4 * r * d)
  assert bytes_of('fed_sa', 'up', 0) == same(4 * r * d)
  # The residual goes down one round later, here dense: 4 * 3 entries are less
  # than its factors.
  assert bytes_of('fedex_lora', 'down', 0) == same(FACTORS)
  assert bytes_of('fedex_lora', 'down', 1) == same(FACTORS + 4 * d * f)
  # FLoRA's factors follow from a seed; only what was stacked goes down.
  assert bytes_of('flora', 'up', 0) == by_rank
  assert bytes_of('flora', 'down', 0) == same(0)
  assert bytes_of('flora', 'down', 1) == same(4 * d * f)
  assert bytes_of('fed_svd', 'up', 0) == same(4 * r * f)
  assert bytes_of('fed_svd', 'down', 1) == same(FACTORS)
  assert bytes_of('fedrot_lora', 'up', 2) == same(FACTORS)
  assert bytes_of('lora_a2', 'up', 0) == same(4 * f + 1)
  assert bytes_of('lora_a2', 'up', 1) == same(4 * d + 1)
  for name in ('rbla', 'flexlora', 'hlora', 'zero_padding'):
    assert bytes_of(name, 'up', 0) == by_rank
    assert bytes_of(name, 'down', 0) == by_rank


@pytest.mark.parametrize('name', [n for n in RECIPES if RECIPES[n]])
def test_what_is_served_is_exactly_the_mean_of_the_clients(name):
  _, history = run(name)
  for before, after, states, told in history[:3]:
    a, b = ends(before, states)
    old, new = before.params['q'], after.params['q']
    scale = np.full(K, float(old.scale))
    if name == 'flora':  # a client's factors beyond its rank are zero
      keep = np.arange(toy.R) < RANKS[:, None]
      a = a * keep[:, None]
    weight = cohort().weight
    want = ref.mean_product(a, b, scale, weight)
    product = scale[0] * np.float64(new.a) @ np.float64(new.b)
    if new.residual is not None:
      product += np.float64(new.residual) - np.float64(old.residual)
    np.testing.assert_allclose(product, want, rtol=1e-5, atol=1e-5)
    # Gram matrices see no smaller error once the basis has changed.
    assert told.metrics['aggregators/error'] < (
      3e-3 if name == 'fed_svd' else 1e-5
    )


@pytest.mark.parametrize('name', ['fed_it', 'lora_fair'])
def test_what_is_served_is_not_the_mean_and_the_metric_says_by_how_much(name):
  _, history = run(name)
  before, after, states, told = history[2]
  a, b = ends(before, states)
  want = ref.mean_product(a, b, np.ones(K), cohort().weight)
  mean_a, mean_b = ref.f64(after.params['q'].a, after.params['q'].b)
  gap = mean_a @ mean_b - want
  error = np.linalg.norm(gap) / np.linalg.norm(want)
  assert error > 1e-4
  np.testing.assert_allclose(
    told.metrics['aggregators/error'], error, rtol=0.02
  )


def test_lora_fair_is_nearer_to_the_mean_product_than_fed_it():
  error = lambda name: run(name)[1][2][3].metrics['aggregators/error']
  assert error('lora_fair') < error('fed_it')


def test_fed_it_is_fed_avg():
  _, history = run('fed_it')
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(0.1))
  state = algorithm.init(KEY, start_params())
  state, _, _ = jax.jit(algorithm.round)(state, cohort(), toy.base())
  toy.close(state.params, history[0][1].params)


def test_ffa_lora_never_moves_a_and_rolora_takes_turns():
  first = start_params()['q'].a
  for before, after, *_ in run('ffa_lora')[1]:
    assert (after.params['q'].a == first).all()
    assert (after.params['q'].b != before.params['q'].b).any()
  for t, (before, after, *_) in enumerate(run('rolora')[1]):
    old, new = before.params['q'], after.params['q']
    still, moved = ('b', 'a') if t % 2 else ('a', 'b')
    assert (getattr(new, still) == getattr(old, still)).all()
    assert (getattr(new, moved) != getattr(old, moved)).any()


def test_fed_sa_keeps_b_with_the_client():
  algorithm, history = run('fed_sa')
  _, after, states, _ = history[-1]
  assert states.private['q'].a is None
  b = states.private['q'].b
  assert np.ptp(np.asarray(b), axis=0).max() > 1e-2
  served = algorithm.personal(after.params, tree.take(states, 1))['q']
  assert (served.b == b[1]).all() and (served.a == after.params['q'].a).all()
  new = algorithm.personal(after.params, None)['q']
  assert not new.b.any()  # a client never trained on: b as it started


def test_a_residual_acts_where_it_is_tested_as_where_it_is_trained():
  algorithm, history = run('fedex_lora')
  params = algorithm.personal(history[-1][1].params, None)
  base, bare = toy.fold(toy.base(), params)
  assert bare['q'].residual is None and np.abs(base - toy.base()).max() > 1e-3


def test_flora_starts_afresh_every_round():
  seen = []
  for _, after, *_ in run('flora')[1]:
    q = after.params['q']
    assert not q.b.any() and np.abs(q.a).max() <= toy.D**-0.5
    seen.append(np.asarray(q.a))
  assert np.abs(seen[0] - seen[1]).max() > 0.05


@pytest.mark.parametrize('name', ['rbla', 'het_lora'])
def test_a_masked_client_is_exactly_a_client_of_that_rank(name):
  """One client of rank one in buffers of rank two, and one of rank one."""
  alone = cohort(profiles=np.array([1, 2, 2, 2], np.int32))
  alone = alone._replace(valid=np.arange(K) == 0)
  algorithm = build(name, upload=watched(uploads.identity()))
  state = algorithm.init(KEY, toy.params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  _, states, told = jax.jit(algorithm.round)(
    state, alone._replace(states=states), toy.base()
  )
  message = states.upload[0]['q']

  q = toy.params()['q']
  small = {'q': q._replace(a=q.a[:, :1], b=q.b[:1])}
  # The tail of a client of rank one is empty: HetLoRA's penalty is zero.
  plain = recipes.fed_avg(toy.loss, toy.sgd(0.1))
  want, _, plain_told = jax.jit(plain.round)(
    plain.init(KEY, small), alone, toy.base()
  )
  new = want.params['q']
  np.testing.assert_allclose(message.a[0, :, :1], new.a - q.a[:, :1], atol=2e-7)
  np.testing.assert_allclose(message.b[0, :1], new.b - q.b[:1], atol=2e-7)
  assert not message.a[0, :, 1:].any() and not message.b[0, 1:].any()
  np.testing.assert_allclose(
    told.metrics['local/loss'], plain_told.metrics['local/loss'], 1e-6
  )


def test_equal_ranks_are_fed_it():
  algorithm = build('rbla')
  state = algorithm.init(KEY, start_params())
  full = cohort(profiles=np.full(K, toy.R, np.int32))
  state, _, _ = jax.jit(algorithm.round)(state, full, toy.base())
  toy.close(state.params, run('fed_it')[1][0][1].params)


def test_het_lora_prunes_for_good_what_shrinks():
  _, history = run('het_lora')
  ranks = np.array([states.local.rank for _, _, states, _ in history])
  assert (ranks[0] == RANKS).all()  # b starts at zero: its tail only grows
  assert (np.diff(ranks, axis=0) <= 0).all() and ranks.min() >= 1
  _, strong = run('het_lora', num_rounds=3, penalty=3.0)
  pruned = [states.local.rank for _, _, states, _ in strong]
  assert (np.asarray(pruned[-1])[RANKS == 2] == 1).all()
  told = strong[-1][3]
  assert told.bytes_up.sum(1).tolist() == [FACTORS // 2] * K
  assert told.metrics['local/rank'] == 1


def test_het_loras_local_steps_equal_a_python_loop():
  """Loss + penalty ||a tail|| ||b tail||, by hand, from nonzero factors."""
  rate, penalty = 0.1, 0.7
  update = self_pruning(toy.loss, toy.sgd(rate), penalty=penalty, gamma=0.5)
  params = toy.params()
  rows = tree.take(cohort().batches, 1)
  masks = tree.full_masks(params, {'q': params['q']._replace(a=0, b=0)})
  one = jnp.bool_(True)
  masks = masks._replace(
    held={'q': params['q']._replace(a=one, b=one, scale=None)},
    trained={'q': params['q']._replace(a=one, b=one, scale=None)},
  )
  out = jax.jit(
    lambda p: update.run(toy.base(), p, update.init(p), rows, masks, HERE)
  )(params)
  a, b = ref.f64(params['q'].a, params['q'].b)
  w, s = np.float64(toy.base()), float(params['q'].scale)
  for t in range(3):
    m = rows.mask[t]
    x, y = ref.f64(rows.x[t], rows.y[t])
    e = x @ (w + s * a @ b) - y
    g = x.T @ (e * m[:, None]) / m.sum()
    g_a, g_b = s * g @ b.T, s * a.T @ g
    norm_a, norm_b = np.linalg.norm(a[:, 1:]), np.linalg.norm(b[1:])
    g_a[:, 1:] += penalty * norm_b * a[:, 1:] / norm_a
    g_b[1:] += penalty * norm_a * b[1:] / norm_b
    a, b = a - rate * g_a, b - rate * g_b
  np.testing.assert_allclose(out.update['q'].a, a - params['q'].a, atol=1e-5)
  np.testing.assert_allclose(out.update['q'].b, b - params['q'].b, atol=1e-5)
  q = params['q']
  tail = lambda a, b: np.linalg.norm(a[:, 1:]) * np.linalg.norm(b[1:])
  assert out.state.rank == (1 if tail(a, b) < tail(q.a, q.b) else 2)


# ----------------------------------------------------------- LoRA-A2, FedSVD --


def test_lora_a2_trains_the_units_of_the_largest_scores():
  """Two layers of one target: two units in all, chosen over both."""
  rng = np.random.default_rng(3)
  draw = lambda *s: rng.normal(size=s).astype(np.float32)
  start = {'q': LowRank(draw(2, 4, 3), draw(2, 3, 5), jnp.ones(2))}
  slope = {'q': LowRank(draw(2, 4, 3), draw(2, 3, 5), None)}

  def run(base, start, state, batches, masks, context):
    moved = tree.apply_mask(slope, masks.trained)
    return ClientOutput(moved, masks, state)

  update = selected(LocalUpdate(lambda p: (), run), budget=1)
  for round, factor in ((0, 'b'), (1, 'a')):
    turns: Any = scopes.alternating('/b$', '/a$')
    masks = turns.mask(start, None, Context(round=round))
    out = update.run(None, start, (), None, masks, Context(round=round))
    zero = slope['q']._replace(**{k: 0 * getattr(slope['q'], k)
                                  for k in 'ab' if k != factor})  # fmt: skip
    units = ref.units(start['q'].a, start['q'].b, zero.a, zero.b, budget=1)
    assert units.sum() == 2
    got = out.update['q']
    np.testing.assert_array_equal(got.a, zero.a * units[:, None])
    np.testing.assert_array_equal(got.b, zero.b * units[..., None])
  with pytest.raises(Error, match='above the rank'):
    selected(LocalUpdate(lambda p: (), run), budget=4).run(
      None, start, (), None, masks, Context()
    )


def test_lora_a2_with_the_whole_budget_is_rolora():
  algorithm = build('lora_a2', budget=toy.R)
  state = algorithm.init(KEY, start_params())
  step = jax.jit(algorithm.round)
  for t in range(2):
    state, *_ = step(state, cohort(), toy.base())
    toy.close(state.params, run('rolora')[1][t][1].params)


def test_fed_svd_keeps_a_orthonormal_and_moves_it():
  for before, after, *_ in run('fed_svd')[1]:
    a = np.asarray(after.params['q'].a)
    np.testing.assert_allclose(a.T @ a, np.eye(toy.R), atol=1e-5)
    assert np.abs(a - before.params['q'].a).max() > 1e-3


def test_fed_svds_first_round_is_that_of_ffa_lora():
  product = lambda state: state.params['q'].a @ state.params['q'].b
  one, two = (run(name)[1][0][1] for name in ('fed_svd', 'ffa_lora'))
  np.testing.assert_allclose(product(one), product(two), atol=1e-6)


# -------------------------------------------------------------------- FLASC --


def test_flasc_of_density_one_is_fed_adam():
  settings = dict(server_learning_rate=0.15, tau=1e-3)
  dense = build('flasc', download_density=1.0, upload_density=1.0, **{})
  plain = recipes.fed_avg(
    toy.loss,
    toy.sgd(0.1),
    aggregator=aggregators.uniform_mean(),
    server=server.fed_adam(
      settings['server_learning_rate'], tau=settings['tau']
    ),
  )
  states = []
  for algorithm in (dense, plain):
    state = algorithm.init(KEY, start_params())
    step = jax.jit(algorithm.round)
    for _ in range(2):
      state, _, told = step(state, cohort(), toy.base())
    assert told.bytes_up.sum(1).tolist() == [FACTORS] * K
    states.append(state.params)
  toy.close(*states)


@pytest.mark.parametrize('per', ['tree', 'leaf'])
@pytest.mark.parametrize('density', [0.02, 0.3, 1.0])
def test_top_k_keeps_the_largest_and_counts_what_it_serialises(per, density):
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  start = {'q': toy.params()['q']._replace(a=draw(9, 7), b=draw(7, 8))}
  update = {'q': LowRank(draw(9, 7), draw(7, 8) * 5, None)}
  masks = tree.full_masks(start, scopes.everything().labels(start))
  codec = uploads.top_k(density, per)
  message, _ = jax.jit(lambda u: codec.encode(u, masks, (), HERE))(update)
  got = codec.decode(message, start, HERE)
  assert jax.tree.structure(got) == jax.tree.structure(update)
  parts = [[update['q'].a, update['q'].b]]
  parts = parts if per == 'tree' else [[x] for x in parts[0]]
  for xs in parts:
    flat = np.concatenate([np.ravel(x) for x in xs])
    k = int(np.ceil(density * flat.size))
    bound = np.sort(np.abs(flat))[-k]
    for x, y in ((update['q'].a, got['q'].a), (update['q'].b, got['q'].b)):
      if any(x is z for z in xs):
        np.testing.assert_array_equal(y, np.where(np.abs(x) >= bound, x, 0))
  wire = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(message))
  counts = jax.tree.leaves(codec.num_bytes(message, masks))
  assert sum(map(int, counts)) == len(wire)
  if density == 1:
    assert len(wire) == 4 * (63 + 56)


@pytest.mark.parametrize(
  'broken',
  [
    lambda: uploads.top_k(0.0),
    lambda: uploads.top_k(0.5, 'row'),
    lambda: self_pruning(toy.loss, toy.sgd(), penalty=-1.0),
    lambda: self_pruning(toy.loss, toy.sgd(), gamma=1.0),
    lambda: self_pruning(toy.loss, toy.sgd(), min_rank=0),
    lambda: selected(local.sgd(toy.loss, toy.sgd()), budget=0),
  ],
)
def test_settings_out_of_range_are_refused(broken):
  with pytest.raises(Error, match=r'must|neither'):
    broken()


# ------------------------------------------------------------- combinations --


def test_combinations_that_make_no_sense_are_refused_when_built():
  for name in ('flora', 'flexlora'):
    with pytest.raises(Error, match='changes the basis'):
      build(name, server=server.fed_adam())
  with pytest.raises(Error, match='needs fold'):
    recipes.fedex_lora(toy.loss, toy.sgd())
  with pytest.raises(Error, match='brings its own aggregator'):
    build('fedex_lora', aggregator=aggregators.mean())
  with pytest.raises(Error, match='brings its own server'):
    build('flasc', server=server.sgd())


def test_clients_without_a_rank_are_refused():
  algorithm = build('rbla')
  state = algorithm.init(KEY, start_params())
  with pytest.raises(Error, match='the rank of every client'):
    algorithm.round(state, cohort(profiles=()), toy.base())
  ranks = {'rank': RANKS, 'memory': np.ones(K)}
  named, base = cohort(profiles=ranks), toy.base()
  jax.eval_shape(lambda: algorithm.round(state, named, base))


@pytest.mark.parametrize('name', ['fed_prox', 'fed_adam', 'scaffold'])
def test_the_rule_of_fedex_works_under_other_methods(name):
  more = {'num_clients': K} if name == 'scaffold' else {}
  rule = aggregators.fedex()
  algorithm = getattr(recipes, name)(
    toy.loss, toy.sgd(0.1), aggregator=rule, fold=toy.fold, **more
  )
  state = algorithm.init(KEY, start_params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  step = jax.jit(algorithm.round)
  losses = []
  for _ in range(3):
    state, states, told = step(state, cohort(states), toy.base())
    losses.append(float(told.metrics['local/loss']))
  assert losses[-1] < losses[0]
  served = algorithm.personal(state.params, None)['q']
  assert np.abs(served.residual).max() > 0


# ----------------------------------------------------------------- profiles --


def test_ranks_meet_their_shares_and_depend_on_the_seed():
  draw = functools.partial(clients.profiles.ranks, num_clients=40)
  got = draw((2, 4, 8), (0.5, 0.25, 0.25))['rank']
  assert [(got == r).sum() for r in (2, 4, 8)] == [20, 10, 10]
  assert (got == draw((2, 4, 8), (2, 1, 1))['rank']).all()
  assert (got != draw((2, 4, 8), (2, 1, 1), seed=1)['rank']).any()
  counts = np.bincount(draw((1, 2, 3))['rank'])[1:]
  assert counts.sum() == 40 and np.ptp(counts) <= 1


@pytest.mark.parametrize(
  'broken',
  [
    dict(choices=()),
    dict(choices=(0, 2)),
    dict(choices=(1, 2), shares=(1.0,)),
    dict(choices=(1, 2), shares=(0.0, 0.0)),
    dict(choices=(1, 2), shares=(-1.0, 2.0)),
    dict(choices=(1, 2), seed=-1),
  ],
)
def test_ranks_out_of_range_are_refused(broken):
  with pytest.raises(Error, match=r'profiles|seed'):
    clients.profiles.ranks(num_clients=4, **broken)


def test_alternating_and_ranks_say_what_is_wrong():
  with pytest.raises(Error, match='two patterns'):
    scopes.alternating('/b$')
  wrong: Any = (scopes.alternating('/b$', '/c$'), scopes.untrained('/c$'))
  for scope in wrong:
    with pytest.raises(Error, match='matches no leaf'):
      scope.mask(toy.params(), None, Context())


# ------------------------------------------------------------------ FeDeRA --


def test_federa_starts_as_the_base_on_its_largest_directions():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 6, 5)).astype(np.float32)
  base = {'layers': {'q_proj': {'kernel': kernel}}}
  adapter = adapters.federa(rank=2, alpha=3.0, targets='q_proj')
  params = adapter.init(KEY, base)
  node = params['layers']['q_proj']
  np.testing.assert_allclose(
    adapter.merge(base, params)['layers']['q_proj']['kernel'], kernel, atol=1e-5
  )
  for i in range(2):
    u, s, v = np.linalg.svd(np.float64(kernel[i]))
    want = (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose(1.5 * node.a[i] @ node.b[i], want, atol=1e-5)
    np.testing.assert_allclose(kernel[i] + node.residual[i], kernel[i] - want,
                               atol=1e-5)  # fmt: skip
    sizes = np.linalg.norm(node.a[i], axis=0), np.linalg.norm(node.b[i], axis=1)
    np.testing.assert_allclose(*sizes, rtol=1e-5)
  folded, bare = adapter.fold(base, params)
  assert bare['layers']['q_proj'].residual is None
  frozen = folded['layers']['q_proj']['kernel']
  np.testing.assert_allclose(frozen, kernel + node.residual, atol=1e-6)
  # Residuals of rules add to it.
  labels = scopes.everything().labels(params)['layers']['q_proj']
  assert labels.residual is Frozen and labels.a is Shared
