"""A user's own network, Flax or not, is a client model through one door."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen, nnx

import fedjax_llm as fl
from fedjax_llm import train, tree
from fedjax_llm.adapters import peft
from fedjax_llm.types import Cohort, Error, LossSum, LowRank

K, B, D, H, C = 4, 8, 5, 16, 3
NAMES = ('inner', 'out')
RATE = 0.3
KEY = jax.random.key(0)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(D, H, rngs=rngs)
    self.out = nnx.Linear(H, C, rngs=rngs)

  def __call__(self, x):
    return self.out(self.states(x))

  def states(self, x):
    return jnp.tanh(self.inner(x))


class Linen(linen.Module):
  def setup(self):
    self.inner = linen.Dense(H)
    self.out = linen.Dense(C)

  def __call__(self, x):
    return self.out(self.states(x))

  def states(self, x):
    return jnp.tanh(self.inner(x))


def function(w, x):
  x = jnp.tanh(x @ w['inner']['kernel'] + w['inner']['bias'])
  return x @ w['out']['kernel'] + w['out']['bias']


@pytest.fixture(scope='module')
def doors():
  """The same network, of the same weights, told in three ways."""
  mine = fl.models.own(Nnx(nnx.Rngs(0)))
  return {
    'nnx': mine,
    'linen': fl.models.own(Linen(), {'params': mine.base}),
    'function': fl.models.own(function, mine.base),
  }


KINDS = ('nnx', 'linen', 'function')
ADAPTER = fl.adapters.lora(rank=2, alpha=4.0, targets=NAMES)


def random_params(base, seed=0):
  params = ADAPTER.init(jax.random.key(seed), base)
  leaves, shape = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=x.shape) if x.ndim else x
  return jax.tree.unflatten(shape, [jnp.float32(draw(x)) for x in leaves])


def score(net, batch):
  nats = optax.softmax_cross_entropy_with_integer_labels(
    net(batch['x']), batch['y']
  )
  return nats, batch['real']


def cohort():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(K, 1, B, D)).astype(np.float32)
  real = rng.random((K, 1, B)) < 0.8
  real[..., 0] = True
  y = np.argmax(x @ rng.normal(size=(D, C)), -1).astype(np.int32)
  return Cohort(
    ids=np.arange(K, dtype=np.int32),
    batches={'x': x, 'y': y, 'real': real},
    weight=real.sum((1, 2)).astype(np.float32),
    valid=np.ones(K, bool),
  )


@pytest.fixture(scope='module')
def rounds(doors):
  """kind -> (algorithm, its compiled round)."""

  @functools.cache
  def build(kind):
    optimizer = fl.local.optimizer('sgd', RATE)
    algorithm = fl.recipes.fed_avg(doors[kind].loss(score), optimizer)
    return algorithm, jax.jit(algorithm.round)

  return build


# -------------------------------------------------------------- three ways --


def test_three_spellings_of_a_network_compute_the_same(doors):
  x = np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)
  params = random_params(doors['nnx'].base)
  merged = fl.adapters.merge(doors['nnx'].base, params)
  wanted = function(merged, x)
  assert np.abs(wanted - function(doors['nnx'].base, x)).max() > 0.1
  for mine in doors.values():
    found = mine.bind(mine.base, params)(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    found = mine.bind(merged, {})(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # A residual, a bias and a dense change come along.
    more = {
      'inner': {
        'kernel': params['inner']._replace(residual=jnp.ones((D, H))),
        'bias': jnp.arange(H) / H,
      },
      'out': jnp.full((H, C), 0.3),
    }
    found = mine.bind(mine.base, more)(x)
    by_hand = function(fl.adapters.merge(mine.base, more), x)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_one_step_fedavg_is_a_centralised_sgd_step(doors, rounds, kind):
  (algorithm, step), mine, one = rounds(kind), doors[kind], cohort()
  start = random_params(mine.base)
  state = algorithm.init(jax.random.key(0), start)
  state, _, _ = step(state, one, mine.base)

  together = {k: v.reshape(-1, *v.shape[3:]) for k, v in one.batches.items()}

  def by_hand(factors):
    params = jax.tree.map(
      lambda node, ab: node._replace(a=ab[0], b=ab[1]),
      start,
      factors,
      is_leaf=lambda x: isinstance(x, LowRank),
    )
    logits = function(fl.adapters.merge(mine.base, params), together['x'])
    log_p = jax.nn.log_softmax(logits)[np.arange(K * B), together['y']]
    return -jnp.sum(log_p * together['real']) / together['real'].sum()

  factors = {name: (start[name].a, start[name].b) for name in NAMES}
  gradient = jax.grad(by_hand)(factors)
  for name in NAMES:
    for field, grad in zip('ab', gradient[name]):
      assert np.abs(grad).max() > 1e-3
      np.testing.assert_allclose(
        getattr(state.params[name], field),
        getattr(start[name], field) - RATE * grad,
        rtol=1e-4,
        atol=1e-5,
      )


@pytest.mark.parametrize('kind', KINDS)
def test_a_federation_of_it_learns(doors, rounds, kind):
  (algorithm, step), mine, everybody = rounds(kind), doors[kind], cohort()
  params = ADAPTER.init(jax.random.key(0), mine.base)
  state = algorithm.init(jax.random.key(1), params)
  losses = []
  for _ in range(20):
    state, _, told = step(state, everybody, mine.base)
    losses.append(float(told.metrics['local/loss']))
  assert losses[-1] < 0.7 * losses[0]
  assert told.metrics['local/tokens'] == everybody.weight.sum()


def test_the_base_of_a_flax_module_meets_all_clients_in_one_matmul(doors):
  x = np.ones((K, B, D), np.float32)
  for kind, batched in [('nnx', False), ('linen', False), ('function', True)]:
    mine = doors[kind]
    params = tree.broadcast(random_params(mine.base), K)
    run = jax.vmap(lambda p, x, m=mine: m.bind(m.base, p)(x))
    text = str(jax.make_jaxpr(run)(params, x))
    # The weights of every client, of which there are only the factors.
    assert (f'f32[{K},{D},{H}]' in text) == batched, kind


# ----------------------------------------------------------- other modules --


class Deep(nnx.Module):
  """Layers in a list, layers under a scan, and one used twice."""

  def __init__(self, rngs):
    self.listed = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
      return nnx.Linear(D, D, rngs=nnx.Rngs(key))

    self.stacked = make(jax.random.split(jax.random.key(0), 3))
    self.again = self.listed[0]
    self.norm = nnx.LayerNorm(D, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    for layer in self.listed:
      x = jnp.tanh(nnx.remat(lambda layer, x: layer(x))(layer, x))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def walk(x, layer):
      return jnp.tanh(layer(x))

    x = walk(x, self.stacked)
    return self.dropout(self.norm(self.again(x)))


def test_lists_stacks_and_shared_layers_of_nnx_are_adapted():
  module = Deep(nnx.Rngs(0))
  module.eval()
  mine = fl.models.own(module)
  assert mine.base['stacked']['kernel'].shape == (3, D, D)
  params = fl.adapters.lora(rank=2, targets='.*').init(
    jax.random.key(0), mine.base
  )
  assert len(fl.adapters.targets.find(mine.base, '.*')) == 3  # one is shared
  noisy = jax.tree.map(lambda x: x + 0.3 if x.ndim > 1 else x, params)
  x = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
  found = mine.bind(mine.base, noisy)(x)
  merged = fl.adapters.merge(mine.base, noisy)
  wanted = mine.bind(merged, {})(x)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(found - module(x)).max() > 0.1
  np.testing.assert_allclose(mine.bind(mine.base, {})(x), module(x), rtol=1e-6)


def test_dropout_follows_the_key_and_leaves_the_module_alone():
  module = Deep(nnx.Rngs(0))
  mine, x = fl.models.own(module), jnp.ones((B, D))
  run = jax.jit(lambda key: mine.bind(mine.base, {}, key)(x))
  one, same, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert ((one == 0) != (other == 0)).any()
  assert jax.tree.leaves(nnx.state(module, nnx.RngCount)) == [0]  # no tracer

  class Noisy(linen.Module):
    @linen.compact
    def __call__(self, x):
      return linen.Dropout(0.5, deterministic=False)(linen.Dense(D)(x))

  rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  mine = fl.models.own(Noisy(), Noisy().init(rngs, x))
  run = jax.jit(lambda key: mine.bind(mine.base, {}, key)(x))
  one, same, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert ((one == 0) != (other == 0)).any()


def test_what_is_no_dense_layer_of_linen_is_written_into_its_weights():
  class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
      x = linen.DenseGeneral(D, name='general')(x)
      x = linen.Conv(D, [3], name='conv')(x)
      norm = linen.BatchNorm(use_running_average=True, name='norm')
      return linen.remat(linen.Dense)(C, name='out')(norm(x))

  x = np.random.default_rng(0).normal(size=(2, 6, D)).astype(np.float32)
  variables = Net().init(jax.random.key(0), x)
  mine = fl.models.own(Net(), variables)
  assert 'batch_stats' not in mine.base  # stays as it is
  adapter = fl.adapters.lora(rank=2, targets='.*')
  params = adapter.init(jax.random.key(0), mine.base)
  params = jax.tree.map(lambda x: x + 0.2, params)
  merged = fl.adapters.merge(mine.base, params)
  wanted: Any = Net().apply({**variables, 'params': merged}, x)
  found = mine.bind(mine.base, params)(x)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ language models


class Words(nnx.Module):
  def __init__(self, vocab, rngs):
    self.table = nnx.Embed(vocab, D, rngs=rngs)
    self.inner = nnx.Linear(D, D, rngs=rngs)
    self.head = nnx.Linear(D, vocab, use_bias=False, rngs=rngs)

  def states(self, tokens):
    return jnp.tanh(self.inner(self.table(tokens)))

  def __call__(self, tokens):
    return self.head(self.states(tokens))


def test_an_own_language_model_has_the_loss_of_tokens():
  mine = fl.models.own(Words(11, nnx.Rngs(0)))
  whole = mine.model(lambda net, batch: net(batch.tokens))
  late = mine.model(
    lambda net, batch: net.states(batch.tokens), lambda net, x: net.head(x)
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 11, (2, 7)).astype(np.int32)
  ones = np.ones((2, 7), np.int32)
  batch = fl.types.Batch(tokens, ones > 0, ones, ones)
  params = jax.tree.map(
    lambda x: x + 0.1,
    fl.adapters.lora(rank=2, targets=['inner', 'head']).init(
      jax.random.key(0), mine.base
    ),
  )
  found = [
    fl.local.causal_lm(model)(mine.base, params, batch, KEY)
    for model in (whole, late)
  ]
  np.testing.assert_allclose(found[0].total, found[1].total, rtol=1e-6)

  def score(net, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      net(batch.tokens[:, :-1]), batch.tokens[:, 1:]
    )

  sums = mine.loss(score)(mine.base, params, batch, KEY)
  np.testing.assert_allclose(sums.total, found[0].total, rtol=1e-5)
  assert sums.count == found[0].count == 12


def words(vocab_size: int, seed: int = 0):
  """What a config may name."""
  mine = fl.models.own(Words(vocab_size, nnx.Rngs(seed)))
  model = mine.model(lambda net, batch: net(batch.tokens))
  return mine.loaded(model, vocab_size=vocab_size, max_positions=256)


def test_a_config_trains_an_own_network_and_writes_it_down(tmp_path):
  texts = tmp_path / 'texts.jsonl'
  lines = [
    {'client': f'c{i % 8}', 'text': f'{i:02} abcabcabc'} for i in range(40)
  ]
  texts.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  given = {
    'data.name': 'jsonl',
    'data.path': texts,
    'data.client_key': 'client',
    'data.text_key': 'text',
    'model.name': f'{__name__}:words',
    'model.seed': 3,
    'adapter.targets': "('inner','head')",
    'adapter.rank': 2,
  }
  config = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'
  room = tmp_path / 'run'
  fields = [f'--config.{name}={value}' for name, value in given.items()]
  arguments = ['--config', f'{config}:smoke', '--workdir', str(room), *fields]
  assert train.main(arguments) == 0
  told = (room / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('evals/heldout/loss') for line in told]
  assert losses[-1] < losses[0]
  # Base and adapter under the names of the network, and PEFT's.
  loaded = words(259, seed=3)
  base = safetensors.numpy.load_file(room / 'base' / 'model.safetensors')
  np.testing.assert_array_equal(
    base['inner.kernel'], loaded.base['inner']['kernel']
  )
  assert len(base) == len(jax.tree.leaves(loaded.base))
  params = peft.load(
    room / 'adapter', path_of=lambda name: (tuple(name.split('.')), None)
  )
  assert params['head'].b.shape == (2, 259) and np.abs(params['head'].b).max()


# ---------------------------------------------------------------- mistakes --


def test_a_score_may_be_sums_and_may_not_be_a_mean(doors):
  mine = doors['function']
  batch = jax.tree.map(lambda x: x[0, 0], cohort().batches)
  given = LossSum(jnp.float32(3.0), jnp.float32(2.0), jnp.float32(1.0))
  assert mine.loss(lambda net, batch: given)(mine.base, {}, batch, KEY) == (
    given
  )
  call = lambda score: mine.loss(score)(mine.base, {}, batch, KEY)
  with pytest.raises(Error, match='one number'):
    call(lambda net, batch: jnp.mean(net(batch['x'])))
  with pytest.raises(Error, match=r'losses \[8\] with a mask \[3\]'):
    call(lambda net, batch: (jnp.ones(8), jnp.ones(3)))


def test_what_is_no_network_or_fits_no_weight_is_refused(doors):
  base = doors['nnx'].base
  with pytest.raises(Error, match='takes an NNX or Linen module'):
    fl.models.own(3)
  with pytest.raises(Error, match='takes an NNX or Linen module'):
    fl.models.own(Linen, base)
  with pytest.raises(Error, match='holds its weights'):
    fl.models.own(Nnx(nnx.Rngs(0)), base)
  with pytest.raises(Error, match=r"variables\['params'\]"):
    fl.models.own(Linen(), base)
  with pytest.raises(Error, match='nested dicts'):
    fl.models.own(function, [1.0])
  with pytest.raises(Error, match='single matrix'):
    fl.models.own(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  with pytest.raises(Error, match='has only inner, out'):
    doors['nnx'].bind(base, {'middle': jnp.ones(3)})
