"""Personalised LoRA on a federation that is checked by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_personalised as ref
import toy

from fedjax_llm import (
  adapters,
  aggregators,
  local,
  recipes,
  server,
  sharding,
  tree,
  uploads,
)
from fedjax_llm.adapters import multi
from fedjax_llm.clients import scopes
from fedjax_llm.types import Codec, Error, LossSum, LowRank

KEY = jax.random.key(0)
K, S, ROUNDS, RATE = 4, 3, 10, 0.1
D, F, R = toy.D, toy.F, toy.R
BOTH = 4 * R * (D + F)  # bytes of both factors

SETTINGS = {
  'fed_rep': {},
  'ditto': dict(strength=0.4),
  'fed_dpa_t': dict(local_weight=0.6),
  'fed_dpa_f': dict(federated_rounds=2),
  'fed_lora': {},
  'fd_lora': dict(sync_every=2, fusion=(0.7, 0.3)),
  'perfit': dict(expansion=1.4),
}
RATES = {'fed_dpa_t': 0.3}  # its local adapter starts at zero, in part
DUAL = [name for name in SETTINGS if name != 'fed_rep']


def loss(base, params, batch, key):
  """As in `toy`, with residuals where factors have them."""
  del key
  error = batch.x @ (base + adapters.product(params['q'])) - batch.y
  each = 0.5 * jnp.sum(error**2, -1)
  return LossSum(
    total=jnp.sum(jnp.where(batch.mask, each, 0.0)),
    count=jnp.sum(batch.mask.astype(jnp.float32)),
    correct=jnp.float32(0.0),
  )


def cohort(states=None, steps=S, skew=0.8):
  """Clients whose targets come from one teacher and a skew of their own."""
  plain = toy.cohort(num_clients=K, steps=steps, states=states)
  rng = np.random.default_rng(5)
  teacher = rng.normal(size=(D, 1)) @ rng.normal(size=(1, F))
  own = skew * rng.normal(size=(K, D, F))
  w = np.asarray(toy.base()) + teacher + own
  y = np.einsum('ksbd,kdf->ksbf', plain.batches.x, w).astype(np.float32)
  return plain._replace(batches=plain.batches._replace(y=y))


def watched(codec):
  """The codec, which leaves the message in the client's state."""

  def init(update):
    blank = jax.tree.map(lambda u: jnp.zeros(u.shape, bool), update)
    return tree.zeros_like(update), blank

  def encode(update, masks, state, key):
    message, _ = codec.encode(update, masks, (), key)
    wide = lambda u, m: jnp.broadcast_to(m, u.shape)
    return message, (message, tree.map_present(wide, update, masks.trained))

  return Codec(init, encode, codec.decode, codec.num_bytes)


def build(name, **more):
  parts = {**SETTINGS.get(name, {}), 'fold': toy.fold, **more}
  rate = RATES.get(name, RATE)
  return getattr(recipes, name)(loss, toy.sgd(rate), **parts)


@functools.cache
def plain(name, num_rounds, **more):
  """The last of a few rounds of a method that is not watched."""
  return rounds(build(name, **more), num_rounds)[-1]


def rounds(algorithm, num_rounds, step=None):
  """Every round's (state, client states, metrics), the first before any."""
  state = algorithm.init(KEY, toy.params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  of, step = cohort(), step or jax.jit(algorithm.round)
  history: list[Any] = [(state, states, {})]
  for _ in range(num_rounds):
    state, states, told = step(state, of._replace(states=states), toy.base())
    history.append((state, states, jax.device_get(told)))
  return history


@functools.cache
def run(name):
  codec = uploads.identity(bitmap=name == 'perfit')
  algorithm = build(name, upload=watched(codec))
  step = jax.jit(algorithm.round)
  return algorithm, step, rounds(algorithm, ROUNDS, step)


def start():
  q = toy.params()['q']
  return np.float64(toy.base()), np.float64(q.a), np.float64(q.b), 0.5


def rows():
  return ref.clients(cohort().batches)


def same(node, pair, atol=1e-5):
  np.testing.assert_allclose(node.a, pair[0], atol=atol, rtol=1e-5)
  np.testing.assert_allclose(node.b, pair[1], atol=atol, rtol=1e-5)


# -------------------------------------------------------------- references --


def ends(name):
  *_, history = run(name)
  state, states, _ = history[-1]
  return state.params, states.private


def test_fed_rep_is_head_then_body():
  params, private = ends('fed_rep')
  base, a, b, s = start()
  a, own = ref.fed_rep(base, a, b, s, rows(), cohort().weight, RATE, ROUNDS)
  np.testing.assert_allclose(params['q'].a, a, atol=1e-5)
  np.testing.assert_allclose(private['q'].b, own, atol=1e-5)
  assert private['q'].a is None


def test_fed_rep_in_parts_of_the_batches():
  history = rounds(build('fed_rep', private_steps=2), 2)
  state, states, told = history[-1]
  base, a, b, s = start()
  a, own = ref.fed_rep(base, a, b, s, rows(), cohort().weight, RATE, 2, first=2)
  np.testing.assert_allclose(state.params['q'].a, a, atol=1e-5)
  np.testing.assert_allclose(states.private['q'].b, own, atol=1e-5)
  assert told.metrics['local/tokens'] == cohort().batches.mask.sum()


def dual(name, reference):
  params, private = ends(name)
  shared, own = reference
  same(params.shared['q'], shared)
  for k in range(K):
    same(tree.take(private.personal['q'], k), own[k])


def test_ditto():
  dual(
    'ditto',
    ref.ditto(*start(), rows(), cohort().weight, RATE, ROUNDS, 0.4),
  )


def test_fed_dpa_t():
  base, a, b, s = start()
  first = run('fed_dpa_t')[2][0][0].params.personal['q']
  assert np.abs(first.a - a).max() > 0.1 and not first.b.any()
  dual(
    'fed_dpa_t',
    ref.fed_dpa_t(
      *(base, a, b, np.float64(first.a), s, rows(), cohort().weight),
      *(RATES['fed_dpa_t'], ROUNDS, 0.6),
    ),
  )


def test_fed_dpa_f():
  dual(
    'fed_dpa_f',
    ref.fed_dpa_f(*start(), rows(), cohort().weight, RATE, ROUNDS, 2),
  )


def test_fed_lora():
  params, private = ends('fed_lora')
  theta, own = ref.fed_lora(*start(), rows(), cohort().weight, RATE, ROUNDS)
  np.testing.assert_allclose(toy.base() + params.shared['q'], theta, atol=1e-5)
  for k in range(K):
    same(tree.take(private.personal['q'], k), own[k])


def test_fd_lora():
  dual('fd_lora', ref.fd_lora(*start(), rows(), RATE, ROUNDS, 2, 0.7, 0.9))


def test_perfit():
  params, private = ends('perfit')
  density = 1 / 1.4
  shared, patterns = ref.perfit(
    *start(), rows(), cohort().weight, RATE, ROUNDS, density
  )
  same(params.shared['q'], shared)
  found = private.personal['q']
  assert (np.asarray(found.a) == [m[0] for m in patterns]).all()
  assert (np.asarray(found.b) == [m[1] for m in patterns]).all()
  assert len({m[0].tobytes() for m in patterns}) > 1
  assert sum(m.sum() for m in patterns[0]) == round(density * R * (D + F))


# -------------------------------------------------------------- identities --


def test_fed_rep_without_a_private_part_is_fed_avg():
  one = plain('fed_rep', 2, private='')[0]
  two = plain('fed_avg', 2)[0]
  toy.close(one.params, two.params, rtol=0, atol=0)


def test_perfit_that_prunes_nothing_is_fed_avg():
  state, _, told = plain('perfit', 2, expansion=1.0)
  toy.close(state.params.shared, plain('fed_avg', 2)[0].params)
  bits = -(-D * R // 8) + -(-R * F // 8)
  assert told.bytes_up.sum(1).tolist() == [BOTH + bits] * K


def test_perfit_serves_what_the_client_holds():
  algorithm, _, history = run('perfit')
  state, states, told = history[-1]
  for k in range(K):
    one = tree.take(states, k)
    served = algorithm.personal(state.params, one)['q']
    kept = one.private.personal['q']
    shared = state.params.shared['q']
    assert (served.a == shared.a * kept.a).all()
    assert (served.b == shared.b * kept.b).all()
    held = int(kept.a.sum() + kept.b.sum())
    assert told.bytes_down[k].sum() == 4 * held


@pytest.mark.parametrize('name', ['ditto', 'fed_dpa_f'])
def test_what_is_shared_is_federated_averaging(name):
  alone = plain('fed_avg', 2)[0]
  toy.close(run(name)[2][2][0].params.shared, alone.params)


def test_ditto_without_a_tether_is_local_training():
  alone = plain('local_only', 3)[1].private
  free = plain('ditto', 3, strength=0.0)[1].private
  toy.close(free.personal, alone)


def test_ditto_on_a_short_tether_tracks_the_server():
  """eta lambda = 1: a step lands within eta of what was received."""
  rate = 1e-3
  algorithm = recipes.ditto(loss, toy.sgd(rate), strength=1 / rate)
  history = rounds(algorithm, 3)
  before, (_, states, _) = history[-2][0].params.shared, history[-1]
  away = tree.sub(
    states.private.personal['q'], before['q']._replace(scale=None)
  )
  moved = tree.sub(states.private.personal['q'], toy.params()['q']
                   ._replace(scale=None))  # fmt: skip
  assert tree.norm(away) < 0.1 and tree.norm(moved) > 0


def test_a_weight_of_zero_or_one_serves_one_adapter():
  state, states, _ = run('fed_dpa_t')[2][2]
  one = tree.take(states, 1)
  for weight, part in ((0.0, 'shared'), (1.0, 'personal')):
    algorithm = build('fed_dpa_t', local_weight=weight)
    served = algorithm.personal(state.params, one)['q']
    want = getattr(tree.merge(one.private, state.params), part)['q']
    product = adapters.product(want)
    np.testing.assert_allclose(adapters.product(served), product, atol=1e-6)


def test_a_mix_is_the_sum_of_the_changes():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  one = LowRank(draw(2, 5, 3), draw(2, 3, 4), draw(2), draw(2, 5, 4))
  two = LowRank(draw(2, 5, 2), draw(2, 2, 4), draw(2))
  dense = draw(2, 5, 4)
  got = multi.mix(({'q': one}, {'q': two}, {'q': dense}), (0.3, -2.0, 0.5))['q']
  bare = adapters.product(one._replace(residual=None))
  want = 0.3 * bare + one.residual - 2 * adapters.product(two) + 0.5 * dense
  np.testing.assert_allclose(adapters.product(got), want, atol=1e-5)
  assert got.a.shape == (2, 5, 5)


def test_phases_on_all_leaves_are_one_longer_training():
  """Two phases of the same update are its steps over the batches twice."""
  step = local.sgd(loss, toy.sgd(RATE))
  twice = local.phases(
    *[local.Phase(step, scopes.everything())] * 2, steps=(2,)
  )
  split, once = rounds(recipes.compose(twice), 2)[-1], plain('fed_avg', 2)
  toy.close(split[0].params, once[0].params)
  one, other = split[2].metrics, once[2].metrics
  assert one['local/tokens'] == other['local/tokens']
  np.testing.assert_allclose(one['local/loss'], other['local/loss'], rtol=1e-5)


def test_a_phase_that_waits_is_a_branch_and_not_a_selection():
  algorithm, _, history = run('fed_dpa_f')
  state, states, _ = history[0]
  program = jax.make_jaxpr(algorithm.round)(state, cohort(states), toy.base())
  assert str(program).count('= cond[') == 2


# -------------------------------------------------------------- guarantees --


@pytest.mark.parametrize('name', SETTINGS)
def test_private_leaves_never_travel(name):
  *_, history = run(name)
  for t, (_, states, told) in enumerate(history[1:]):
    message, sent = states.upload
    if name != 'fed_rep':
      assert not jax.tree.leaves(message.personal)
    for k in range(K):
      wire = b''.join(
        np.asarray(x)[k][np.asarray(m)[k]].tobytes()
        for x, m in zip(
          jax.tree.leaves(message), jax.tree.leaves(sent), strict=True
        )
      )
      if name == 'perfit':  # which entries: a bit each
        q = sent.shared['q']
        wire += np.packbits(q.a[k]).tobytes() + np.packbits(q.b[k]).tobytes()
      assert len(wire) == told.bytes_up[k].sum()
    if name == 'perfit':
      continue
    want = {
      'fed_rep': 4 * D * R,
      'fed_lora': 4 * D * F,
      'fed_dpa_f': BOTH if t < 2 else 0,
    }.get(name, BOTH)
    assert told.bytes_up.sum(1).tolist() == [want] * K
    if want:
      assert told.bytes_down.sum(1).tolist() == [want] * K


@pytest.mark.parametrize('name', ['fed_dpa_f', 'fd_lora', 'perfit'])
def test_blocks_on_a_mesh_change_nothing(name):
  state, states, _ = run(name)[2][3]
  wanted = state.params, states.private, states.local
  algorithm = build(name, block_size=3, mesh=sharding.mesh())
  state, states, _ = rounds(algorithm, 3)[-1]
  toy.close((state.params, states.private, states.local), wanted)


@pytest.mark.parametrize('name', SETTINGS)
def test_a_client_that_is_left_out_keeps_its_part(name):
  _, step, history = run(name)
  state, states, _ = history[2]
  some = cohort(states)._replace(valid=np.array([True, False, True, True]))
  _, new, _ = step(state, some, toy.base())
  toy.close(tree.take(new, 1), tree.take(states, 1), rtol=0, atol=0)
  moved = tree.sub(tree.take(new.private, 0), tree.take(states.private, 0))
  assert tree.norm(moved) > 0 or name in ('fd_lora', 'perfit')


@pytest.mark.parametrize('name', DUAL)
def test_a_client_never_trained_on_is_served_the_shared_part(name):
  algorithm, _, history = run(name)
  params = history[-1][0].params
  served = algorithm.personal(params, None)
  fresh = algorithm.personal(params, algorithm.init_client(params))
  toy.close(served, fresh, rtol=0, atol=0)
  want = params.shared['q']
  if name == 'fed_lora':  # and the initial factors
    want = want + adapters.product(toy.params()['q'])
  else:
    want = adapters.product(want)
  np.testing.assert_allclose(adapters.product(served['q']), want, atol=1e-6)


@pytest.mark.parametrize('name', DUAL)
def test_a_fresh_state_may_be_donated(name):
  leaves = jax.tree.leaves(run(name)[2][0][0])
  assert len({x.unsafe_buffer_pointer() for x in leaves if x.size > 1}) == len(
    [x for x in leaves if x.size > 1]
  )


def own_loss(algorithm, state, states):
  """Each client's loss on fresh data of its own, as it is served."""
  test = cohort(steps=8)
  found = []
  for k in range(K):
    client = tree.take(states, k)
    batch = jax.tree.map(lambda x, k=k: x[k].reshape(-1, *x.shape[3:]),
                         test.batches)  # fmt: skip
    each = []
    for one in (client, None):
      served = algorithm.personal(state.params, one)
      sums = loss(toy.base(), served, batch, KEY)
      each.append(float(sums.total / sums.count))
    found.append(each)
  return np.mean(found, 0)


@pytest.mark.parametrize('name', SETTINGS)
def test_under_skew_a_clients_own_model_beats_the_shared_one(name):
  algorithm, _, history = run(name)
  state, states, _ = history[-1]
  own, shared = own_loss(algorithm, state, states)
  assert own < 0.95 * shared, (own, shared)
  assert own < 0.7 * own_loss(algorithm, *history[0][:2])[0]


def test_product_rules_work_beside_a_personal_part():
  algorithm = build('ditto', aggregator=aggregators.fedex())
  history = rounds(algorithm, 2)
  state, states, _ = history[-1]
  toy.close(state.params.shared, plain('fedex_lora', 2)[0].params)
  one = tree.take(states, 0)
  served = algorithm.personal(state.params, one)['q']
  assert (served.residual == state.params.shared['q'].residual).all()
  assert np.abs(served.residual).max() > 1e-3
  assert (served.a == one.private.personal['q'].a).all()


@pytest.mark.parametrize(
  'rule', ['krum', 'median', 'masked_mean', 'lora_fair', 'flora', 'flexlora']
)
def test_every_rule_carries_a_round_beside_a_personal_part(rule):
  more = dict(num_byzantine=0) if rule == 'krum' else {}
  algorithm = build(
    'ditto',
    aggregator=getattr(aggregators, rule)(**more),
    scope=scopes.ranks(),
    server=server.sgd() if rule.startswith('fl') else server.fed_adam(),
  )

  of = cohort()._replace(profiles=np.array([1, 2, 2, 1], np.int32))
  base = toy.base()

  def whole(params):
    state = algorithm.init(KEY, params)
    states = tree.broadcast(algorithm.init_client(state.params), K)
    return state, algorithm.round(state, of._replace(states=states), base)

  before, (after, *_) = jax.eval_shape(whole, toy.params())
  assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize(
  'broken',
  [
    lambda: build('ditto', strength=-1.0),
    lambda: build('fed_dpa_t', local_weight=1.5),
    lambda: build('fed_dpa_f', federated_rounds=0),
    lambda: build('fd_lora', sync_every=0),
    lambda: build('ditto', private_steps=0),
  ],
)
def test_settings_out_of_range_are_refused(broken):
  with pytest.raises(Error, match='must'):
    broken()


def test_parts_that_a_method_brings_itself_are_refused():
  with pytest.raises(Error, match='brings its own server'):
    build('fd_lora', server=server.sgd())
  with pytest.raises(Error, match='brings its own scope'):
    build('fed_rep', scope=scopes.everything())
  with pytest.raises(Error, match='at least one phase'):
    local.phases()
  algorithm = build('fed_rep', private_steps=S)
  with pytest.raises(Error, match='num_steps'):
    rounds(algorithm, 1)
