"""Adapters beyond two factors, on a federation that is checked by hand.

The network is y = x sum_l W'_l over two layers, through the models' own
`linear`; references are in NumPy float64 (`references_variants`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_variants as ref
import toy

from fedjax_llm import adapters, local, recipes, tree, uploads
from fedjax_llm.adapters import changes, cores, peft
from fedjax_llm.adapters.tensor_train import TensorTrain, split
from fedjax_llm.clients import scopes
from fedjax_llm.models import layers, tenants
from fedjax_llm.types import ClientState, Codec, Cohort, Error, LossSum

KEY = jax.random.key(0)
K, S, B, L, D, F, R = 4, 3, 5, 2, 6, 4, 2
RATE, ROUNDS = 0.1, 3
RATES = {'lora_plus': 0.02, 'fed_sb': 0.05, 'ravan': 0.05}

# recipe, adapter, its settings
METHODS = {
  'dora': ('fed_avg', 'dora', dict(rank=R, alpha=3.0)),
  'vera': ('fed_avg', 'vera', dict(rank=5)),
  'lora_plus': ('fed_avg', 'lora', dict(rank=R, alpha=3.0)),
  'fed_tt': ('fed_avg', 'tensor_train', dict(rank=R, order=2, alpha=3.0)),
  'fed_tt_plus': (
    'fed_tt_plus',
    'tensor_train',
    dict(rank=R, order=2, alpha=3.0),
  ),
  'fed_sb': ('fed_sb', 'lora_xs', dict(rank=R, alpha=3.0, sigma=0.1)),
  'ravan': ('ravan', 'ravan', dict(heads=2, rank=R, alpha=3.0)),
}
SCALE = 3.0 / R
# Bytes up: of one client, by the numbers that the method trains in a round.
TRAINED = {
  'dora': L * (R * (D + F) + F),
  'vera': L * (5 + F),
  'lora_plus': L * R * (D + F),
  'fed_tt': L * (3 * R + R * 2 * R + R * 2 * R + R * 2),
  'fed_tt_plus': L * R * 2,  # of round 0
  'fed_sb': L * R * R,
  'ravan': L * 2 * R * R,
}
# Whether the mean of the parameters is the mean of the changes.
EXACT = ('fed_tt_plus', 'fed_sb', 'ravan')


def base():
  kernel = jax.random.normal(jax.random.key(7), (L, D, F)) * 0.4
  return {'layers': {'q': {'kernel': kernel}}}


def loss(base, params, batch, key):
  del key
  w, inner = base['layers']['q'], params['layers']
  gate = inner.get('gate', jnp.ones(L))
  y = sum(
    gate[i] * layers.linear(batch.x, tree.take(w, i), tree.take(inner['q'], i))
    for i in range(L)
  )
  each = 0.5 * jnp.sum((y - batch.y) ** 2, -1)
  count = jnp.sum(batch.mask.astype(jnp.float32))
  return LossSum(jnp.sum(each), count, jnp.float32(0))


def cohort(states=None, profiles=()):
  rng = np.random.default_rng(5)
  x = rng.normal(size=(K, S, B, D))
  teacher = rng.normal(size=(D, 1)) @ rng.normal(size=(1, F))
  own = 0.3 * rng.normal(size=(K, D, F))
  w = np.asarray(base()['layers']['q']['kernel']).sum(0) + teacher + own
  y = np.einsum('ksbd,kdf->ksbf', x, w)
  rows = toy.Rows(
    x.astype(np.float32), y.astype(np.float32), np.ones((K, S, B), bool)
  )
  return Cohort(
    ids=np.arange(K, dtype=np.int32),
    batches=rows,
    weight=np.array([1, 2, 3, 4], np.float32),
    valid=np.ones(K, bool),
    profiles=profiles,
    states=states if states is not None else ClientState(),
  )


def clients():
  rows = cohort().batches
  return [list(zip(rows.x[k], rows.y[k])) for k in range(K)]


def watched(codec):
  """The codec, which leaves message and masks in the client's state."""
  wide = lambda u, m: jnp.broadcast_to(m, u.shape)

  def init(update):
    blank = jax.tree.map(lambda u: jnp.zeros(u.shape, bool), update)
    return tree.zeros_like(update), blank

  def encode(update, masks, state, key):
    message, _ = codec.encode(update, masks, (), key)
    return message, (message, tree.map_present(wide, update, masks.trained))

  return Codec(init, encode, codec.decode, codec.num_bytes)


def start(name):
  _, kind, settings = METHODS[name]
  build = getattr(adapters, kind)
  return build(targets='q', **settings).init(KEY, base())


def algorithm_of(name):
  ratio = 4.0 if name == 'lora_plus' else 1.0
  return getattr(recipes, METHODS[name][0])(
    loss,
    local.optimizer('sgd', RATES.get(name, RATE), b_ratio=ratio),
    upload=watched(uploads.identity()),
    fold=adapters.fold,
  )


@functools.cache
def run(name, num_rounds=10):
  algorithm = algorithm_of(name)
  state = algorithm.init(KEY, start(name))
  states = tree.broadcast(algorithm.init_client(state.params), K)
  step = jax.jit(algorithm.round)
  history: list[Any] = [(state, states, None)]
  for _ in range(num_rounds):
    state, states, told = step(state, cohort(states), base())
    history.append((state, states, jax.device_get(told)))
  return history


def node_of(state):
  return state.params['layers']['q']


def wire(states, k):
  """What client k sent, as bytes."""
  message, sent = states.upload
  pairs = zip(jax.tree.leaves(message), jax.tree.leaves(sent), strict=True)
  return b''.join(
    np.asarray(x)[k][np.asarray(m)[k]].tobytes() for x, m in pairs
  )


# -------------------------------------------------------------- every one --


@pytest.mark.parametrize('name', METHODS)
def test_it_starts_as_the_base_and_learns(name):
  history = run(name)
  if name != 'fed_sb':  # its cores start near zero, not at it
    merged = adapters.merge(base(), start(name))
    toy.close(merged, base(), atol=1e-6)
  losses = [told.metrics['local/loss'] for *_, told in history[1:]]
  # Fixed bases reach a part of the teacher alone.
  bound = 0.85 if name in ('fed_sb', 'ravan') else 0.75
  assert losses[-1] < bound * losses[0], losses


@pytest.mark.parametrize('name', METHODS)
def test_bytes_are_those_of_a_serialised_message(name):
  for number, (_, states, told) in enumerate(run(name)[1:4]):
    for k in range(K):
      size = len(wire(states, k))
      assert size == told.bytes_up[k].sum()
      if number == 0:
        assert size == 4 * TRAINED[name]


@pytest.mark.parametrize('name', METHODS)
def test_beside_the_weight_is_as_inside_of_it(name):
  """A layer computes with the node what it computes with the merged weight."""
  params = run(name)[4][0].params
  x = cohort().batches.x[0, 0]
  rows = toy.Rows(x, np.zeros((B, F)), np.ones(B, bool))
  beside = loss(base(), params, rows, KEY)
  inside = loss(
    adapters.merge(base(), params), {'layers': {'q': None}}, rows, 0
  )
  np.testing.assert_allclose(beside.total, inside.total, rtol=1e-5)


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'dora'])
def test_a_node_is_told_to_peft_as_plain_factors(name):
  params = run(name)[4][0].params
  plain = changes.as_low_rank(params)
  toy.close(adapters.merge(base(), plain), adapters.merge(base(), params))


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'dora'])
def test_the_mean_is_exact_where_the_change_is_linear(name):
  before, _, _ = run(name)[2]
  after, states, _ = run(name)[3]
  whole = lambda u: node_of(before._replace(params=tree.add(before.params, u)))
  each = jax.vmap(lambda u: changes.product(whole(u)))(states.upload[0])
  want = np.einsum('k,k...->...', cohort().weight / 10, np.float64(each))
  gap = np.abs(changes.product(node_of(after)) - want).max()
  assert (gap < 1e-6) == (name in EXACT), gap


# -------------------------------------------------------------- references --


def check(name, found, wanted):
  for field, value in found.items():
    np.testing.assert_allclose(
      value, wanted[field], rtol=1e-5, atol=1e-5, err_msg=f'{name} {field}'
    )


def reference(name):
  """(what we have by the names of the reference, what it says)."""
  first = start(name)['layers']['q']
  node = node_of(run(name)[ROUNDS][0])
  w = np.float64(base()['layers']['q']['kernel'])
  more, rate = {}, RATES.get(name, RATE)
  if name == 'dora':
    take = lambda x: {
      'a': x.direction.a, 'b': x.direction.b, 'm': x.magnitude
    }  # fmt: skip
    rule = ref.dora(w, SCALE)
  elif name == 'lora_plus':
    take = lambda x: {'a': x.a, 'b': x.b}
    rule, rate = ref.lora(w, SCALE), {'a': rate, 'b': 4 * rate}
  elif name == 'vera':
    take = lambda x: {'d': x.d, 'b': x.b}
    rule = ref.vera(w, np.float64(first.p), np.float64(first.q))
  elif name.startswith('fed_tt'):
    take = lambda x: {str(i): core for i, core in enumerate(x.cores)}
    rule = ref.train(w, SCALE, (3, 2, 2, 2))
    if name == 'fed_tt_plus':
      more['only'] = lambda t, k: [str(3 - t % 4)]
  else:
    take = lambda x: {'c': x.core}
    num = first.core.shape[1]
    p = np.float64(first.p).reshape(L, D, num, R).swapaxes(1, 2)
    q = np.float64(first.q).reshape(L, num, R, F)
    rule = ref.heads(w, SCALE, p, q)
    more['only'] = lambda t, k: ['c']
  params = take(first)
  if name == 'ravan':
    params['g'] = np.ones((L, 2))
    more['only'] = lambda t, k: ['c', 'g']
    more['settle'] = lambda p: {
      'c': p['c'] * p['g'][..., None, None],
      'g': np.ones_like(p['g']),
    }
  weight = cohort().weight
  wanted = ref.federated(params, *rule, clients(), weight, rate, ROUNDS, **more)
  return take(node), wanted


@pytest.mark.parametrize('name', METHODS)
def test_rounds_are_those_of_the_reference(name):
  found, wanted = reference(name)
  check(name, found, wanted)
  moved = [
    np.abs(value - old).max()
    for value, old in zip(found.values(), take_start(name, found))
  ]
  assert max(moved) > 1e-3


def take_start(name, found):
  leaves = jax.tree.leaves(start(name)['layers']['q'])
  by_shape = lambda x: next(y for y in leaves if y.shape == x.shape)
  return [by_shape(x) for x in found.values()]


# -------------------------------------------------------------- identities --


def test_lora_plus_of_ratio_one_is_lora_and_needs_factors():
  plain, one = local.optimizer('adamw', 0.1), local.optimizer('adamw', 0.1)
  one = local.lora_plus(one, 1.0)
  params = start('lora_plus')['layers']['q']._replace(scale=None)
  grads = jax.tree.map(lambda x: x + 1.0, params)
  steps = [o.update(grads, o.init(params), params, 0)[0] for o in (plain, one)]
  toy.close(*steps)
  with pytest.raises(Error, match='needs low-rank factors'):
    vector = {'d': jnp.ones(2)}
    one.update(vector, one.init(vector), vector, 0)
  with pytest.raises(Error, match='b_ratio is 0; it must be above 0'):
    local.optimizer('sgd', 0.1, b_ratio=0)
  with pytest.raises(Error, match=r'scaffold needs .* not sgd with b_ratio'):
    recipes.scaffold(
      loss, local.optimizer('sgd', 0.1, b_ratio=4.0), num_clients=K
    )


def test_dora_has_the_lengths_it_says_and_fedex_is_exact_on_its_direction():
  node = node_of(run('dora')[4][0])
  merged = adapters.merge(base(), {'layers': {'q': node}})
  lengths = jnp.linalg.norm(merged['layers']['q']['kernel'], axis=-2)
  np.testing.assert_allclose(lengths, jnp.abs(node.magnitude), rtol=1e-5)
  # A residual of the direction acts beside the weight as folded into it.
  residual = jax.random.normal(KEY, (L, D, F))
  more = node._replace(direction=node.direction._replace(residual=residual))
  folded, bare = adapters.fold(base(), {'layers': {'q': more}})
  assert bare['layers']['q'].direction.residual is None
  toy.close(
    adapters.merge(folded, bare),
    adapters.merge(base(), {'layers': {'q': more}}),
    atol=1e-5,
  )
  algorithm = recipes.fedex_lora(
    loss, local.optimizer('sgd', RATE), weighted=True, fold=adapters.fold
  )
  state = algorithm.init(KEY, start('dora'))
  for _ in range(2):
    state, _, told = jax.jit(algorithm.round)(state, cohort(), base())
  assert told.metrics['aggregators/error'] < 1e-5


def test_vera_shares_its_matrices_and_a_frozen_d_makes_the_mean_exact():
  node = start('vera')['layers']['q']
  assert (node.p[0] == node.p[1]).all() and (node.q[0] == node.q[1]).all()
  last = node_of(run('vera')[-1][0])
  assert (last.p == node.p).all() and (last.q == node.q).all()
  bound = (6 / D) ** 0.5
  assert bound / 2 < jnp.abs(node.p).max() < bound
  algorithm = recipes.fed_avg(
    loss,
    local.optimizer('sgd', RATE),
    scope=scopes.frozen('/d$'),
    upload=watched(uploads.identity()),
  )
  state = algorithm.init(KEY, start('vera'))
  states = tree.broadcast(algorithm.init_client(state.params), K)
  new, states, _ = jax.jit(algorithm.round)(state, cohort(states), base())
  each = jax.vmap(lambda u: changes.product(tree.add(node, u['layers']['q'])))
  want = np.tensordot(cohort().weight / 10, each(states.upload[0]), 1)
  np.testing.assert_allclose(changes.product(node_of(new)), want, atol=1e-6)


def test_a_train_of_the_largest_rank_is_any_matrix_and_sides_split():
  assert split(576, 3) == [9, 8, 8]
  assert split(1536, 2) == [48, 32]
  assert split(1, 2) == [1, 1]
  for size in range(1, 60):
    assert np.prod(split(size, 3)) == size
  u, s, v = np.linalg.svd(np.random.default_rng(0).normal(size=(D, F)))
  left, right = (u[:, :F] * s).reshape(1, D, F), v.reshape(F, F, 1)
  whole = TensorTrain((left, right), np.float32(1))
  np.testing.assert_allclose(
    changes.product(whole), (u[:, :F] * s) @ v, atol=1e-5
  )


def test_gains_of_one_change_nothing_and_settle_into_their_cores():
  node = node_of(run('ravan')[4][0])
  params = {'layers': {'q': node}}
  with_gains = cores.with_gains(params)
  toy.close(cores.without_gains(with_gains), params)
  twice = jax.tree.map(lambda x: x, with_gains)
  twice['layers']['q'] = twice['layers']['q']._replace(
    gain=2 * jnp.ones((L, 2))
  )
  settled = cores.without_gains(twice)
  toy.close(changes.product(settled['layers']['q']), 2 * changes.product(node))
  assert node.gain is None
  eye = jnp.swapaxes(node.p, -1, -2) @ node.p
  np.testing.assert_allclose(eye, np.eye(2 * R)[None].repeat(L, 0), atol=1e-5)


@pytest.mark.parametrize(
  'build, words',
  [
    (lambda: adapters.vera(rank=0), 'adapter.rank is 0'),
    (lambda: adapters.lora_xs(rank=0), 'adapter.rank is 0'),
    (lambda: adapters.ravan(heads=0), 'adapter.heads is 0'),
    (lambda: adapters.tensor_train(order=0), 'adapter.order 0'),
    (
      lambda: adapters.ravan(4, 2, targets='q').init(KEY, base()),
      r'heads \* rank is 8, above the smaller side of a target, 4',
    ),
    (
      lambda: adapters.lora_xs(5, targets='q').init(KEY, base()),
      'rank is 5, above the smaller side of a target, 4',
    ),
  ],
)
def test_settings_out_of_range_are_refused(build, words):
  with pytest.raises(Error, match=words):
    build()


@pytest.mark.parametrize('kind', ['fed_sb', 'ravan', 'fed_tt_plus'])
def test_a_method_on_another_adapter_is_refused(kind):
  algorithm = getattr(recipes, kind)(loss, toy.sgd())
  params = adapters.lora(R, targets='q').init(KEY, base())
  with pytest.raises(Error, match=r'lora_xs or ravan|matches no leaf'):
    state = algorithm.init(KEY, params)
    jax.eval_shape(algorithm.round, state, cohort(), base())


def test_a_quantised_base_has_no_norms_to_start_from():
  class Quantised:
    qvalue = None
    shape = (L, D, F)

  there = {'layers': {'q': {'kernel': Quantised()}}}
  for build in (adapters.dora, adapters.lora_xs):
    with pytest.raises(Error, match='quantised base does not have'):
      build(rank=R, targets='q').init(KEY, there)


def test_a_dora_of_some_modules_alone_is_no_dora_of_peft(tmp_path):
  params = {
    'q': start('dora')['layers']['q'],
    'v': start('lora_plus')['layers']['q'],
  }
  with pytest.raises(Error, match='v has no magnitude, and q has one'):
    peft.save(
      tmp_path / 'x',
      params,
      module_name=lambda path, layer: f'{layer}.{path[0]}',
      base_model='b',
    )


def test_a_dora_fits_its_base_and_shares_no_batch():
  params = start('dora')
  tenants.check(base(), params, 'ann')
  with pytest.raises(Error, match='shares no batch with others'):
    tenants.stack(base(), [params, params])
  others = [start('vera'), start('lora_plus')]
  for one in others:
    tenants.check(base(), one, 'ann')
  both = tenants.stack(base(), others)['layers']['q']
  for i, one in enumerate(others):
    want = changes.product(one['layers']['q'])
    # Layers come first there, then adapters.
    found = (both.a * both.scale[..., None, None]) @ both.b
    np.testing.assert_allclose(found[:, i], want, atol=1e-6)
