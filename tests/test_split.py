"""Split learning: a cut network equals the whole one, and learns as its paper.

`references_split` holds the two parties' halves of a step in float64.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_split as reference
import tiny

from fedjax_llm import (
  adapters,
  aggregators,
  local,
  models,
  recipes,
  tree,
  uploads,
)
from fedjax_llm.adapters import halves
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.models.network import transformer
from fedjax_llm.nodes import Halves, Prompt
from fedjax_llm.plan import work
from fedjax_llm.recipes.split import cutting
from fedjax_llm.run import config, experiment, sections
from fedjax_llm.types import Error, LossSum, Model

RATE, LAYERS, CUT = 0.2, 3, 1

# -------------------------------------------------------------- the network --


@functools.cache
def network():
  return tiny.loaded(LAYERS)


def loss(base, params, batch, key):
  return local.causal_lm(network().model)(base, params, batch, key)


@functools.cache
def factors():
  """LoRA on two matrices of every layer, of which no factor is zero."""
  params = adapters.lora(2, targets=('q_proj', 'up_proj')).init(
    tiny.KEY, network().base
  )
  return jax.tree.map(lambda x: x + 0.1, params)


def cuts(loaded, params, batch):
  """Hidden states of the whole network, and through a cut at every layer."""
  num = loaded.config.num_layers

  @jax.jit
  def all_of(base, params, batch):
    layers = functools.partial(
      cutting.layers_of(loaded.model), base, params, batch
    )
    whole = loaded.model.hidden(base, params, batch)
    through = []
    for cut in range(num + 1):
      states = layers(range(cut), ends=False)
      through.append(layers(range(cut, num), states))
    return whole, through

  return all_of(loaded.base, params, batch)


@pytest.mark.parametrize('kind', ['decoder', 'prompt', 'encoder', 'gemma'])
def test_the_halves_of_every_cut_compose_to_the_network(kind):
  params, loaded = factors(), network()
  if kind == 'prompt':
    rows = jax.random.normal(tiny.KEY, (2, tiny.D))
    params = {**params, 'inputs': Prompt(rows)}
  if kind == 'encoder':
    params, loaded = (
      {},
      models.random_encoder(
        labels=('a', 'b'), hidden_size=16, intermediate_size=16, vocab_size=29
      ),
    )
  if kind == 'gemma':  # windows and rotations differ between its layers
    params, loaded = {}, mixed()
  batch = jax.tree.map(jnp.asarray, tiny.texts(tiny.B))
  whole, through = cuts(loaded, params, batch)
  assert len(through) == loaded.config.num_layers + 1
  for hidden in through:
    tiny.close(hidden, whole, rtol=1e-5)


def mixed():
  """A network whose layers differ in their windows."""
  loaded = network()
  config = loaded.config._replace(windows=(2, 0, 3))
  return loaded._replace(config=config, model=transformer.build(config))


def test_layers_left_out_are_those_of_a_closed_gate():
  params, loaded = factors(), network()
  batch = jax.tree.map(jnp.asarray, tiny.texts(tiny.B))
  gated = adapters.gates.added(params)
  gated['layers']['gate'] = jnp.array([1.0, 0.0, 1.0])
  layers = cutting.layers_of(loaded.model)

  @jax.jit
  def both(base, params, gated, batch):
    some = layers(base, params, batch, (0, 2))
    return some, loaded.model.hidden(base, gated, batch)

  tiny.close(*both(loaded.base, params, gated, batch), rtol=1e-5)


def test_a_layer_that_does_not_exist_is_named():
  with pytest.raises(Error, match='layer 3 is not one of the 3 layers'):
    cutting.layers_of(network().model)(network().base, {}, None, (0, 3))
  with pytest.raises(Error, match=r'no `Model\.layers`'):
    cutting.layers_of(Model(lambda *_: jnp.ones(1), lambda *_: jnp.ones(1)))


def test_an_adapter_is_cut_and_joined():
  for cut in range(LAYERS + 1):
    both = halves.at_layer(factors(), cut)
    assert ('layers' in both.client, 'layers' in both.server) == (
      cut > 0,
      cut < LAYERS,
    )
    tiny.close(halves.joined(both), factors(), rtol=0, atol=0)
  with pytest.raises(Error, match='cut is 4; it must be from 0 to 3'):
    halves.at_layer(factors(), 4)
  with pytest.raises(Error, match='stacked over layers'):
    halves.at_layer({'lm_head': jnp.ones(2)}, 0)
  some = adapters.picked.pick(factors(), network().base, [0, 2])
  with pytest.raises(Error, match=r'leave adapter\.layers out'):
    halves.at_layer(some, 1)


# ------------------------------------------------- a network of two matrices --

K, S, B, D, H, O = 3, 2, 4, 5, 3, 2


def toy_loss(base, params, batch, key):
  del base, key
  error = jnp.tanh(batch['x'] @ params['c']) @ params['v'] - batch['y']
  return LossSum(0.5 * jnp.sum(error**2), jnp.float32(B), jnp.float32(0))


def toy(rate=RATE, name='sgd', **settings):
  return cutting.compose(
    toy_loss,
    local.optimizer(name, rate),
    lambda base, params, batch: (batch['y'], batch['y']),
    lambda p: Halves({'c': p['c']}, {'v': p['v']}),
    measure=None,
    **settings,
  )


@functools.cache
def toy_world():
  rng = np.random.default_rng(3)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  params = {'c': normal(D, H), 'v': normal(H, O)}
  batches = {'x': normal(K, S, B, D), 'y': normal(K, S, B, O)}
  return jax.tree.map(jnp.asarray, params), batches


def toy_cohort(**changes):
  cohort = tiny.cohort(batches=toy_world()[1])
  return cohort._replace(**changes)


def two_rounds(algorithm, cohort=None, init=None):
  """Two rounds: (state, clients' states, info)."""
  cohort = cohort or toy_cohort()
  state = algorithm.init(tiny.KEY, toy_world()[0]) if init is None else init
  states = tiny.fresh(algorithm, state, len(cohort.ids))
  step = jax.jit(algorithm.round)
  info: Any = None
  for _ in range(2):
    state, states, info = step(state, cohort._replace(states=states))
  return state, states, info


def referred(order, average, clients: Any = slice(None)):
  params, batches = toy_world()
  x, y = batches['x'][clients], batches['y'][clients]
  weight = np.array([3.0, 1.0, 2.0])[clients]
  c, v = np.stack([params['c']] * len(x)), params['v']
  for _ in range(2):
    c, v = reference.round(
      c, v, x, y, rate=RATE, order=order, average=average, weight=weight
    )
  return c, v


@functools.cache
def learned(order, client_part='averaged'):
  return two_rounds(toy(order=order, client_part=client_part))


@pytest.mark.parametrize('client_part', ['averaged', 'private'])
@pytest.mark.parametrize('order', ['sequential', 'parallel'])
def test_rounds_equal_the_loops_of_the_reference(order, client_part):
  state, states, _ = learned(order, client_part)
  c, v = referred(order, client_part == 'averaged')
  tiny.close(state.params.server['v'], v, rtol=1e-5)
  if client_part == 'averaged':
    tiny.close(state.params.client['c'], c[0], rtol=1e-5)
  else:  # the server's copy of the clients' part stays as it was
    tiny.close(states.private.client['c'], c, rtol=1e-5)
    tiny.close(state.params.client['c'], toy_world()[0]['c'], rtol=0)


def test_the_two_orders_and_the_two_parts_differ():
  for average in (True, False):
    one, other = (referred(o, average) for o in ('sequential', 'parallel'))
    assert tiny.differs(one[1], other[1])
  one, other = (referred('parallel', average) for average in (True, False))
  assert tiny.differs(one[1], other[1])


def test_blocks_change_nothing_but_rounding():
  whole, *_ = learned('parallel')
  state, *_ = two_rounds(toy(order='parallel', block_size=2))
  tiny.close(state.params, whole.params, rtol=1e-5)


@pytest.mark.parametrize('order', ['sequential', 'parallel'])
def test_clients_that_do_not_report_change_nothing(order):
  valid = np.array([True, False, True])
  state, _, info = two_rounds(
    toy(order=order, block_size=2), toy_cohort(valid=valid)
  )
  c, v = referred(order, True, clients=[0, 2])
  tiny.close(state.params.client['c'], c[0], rtol=1e-5)
  tiny.close(state.params.server['v'], v, rtol=1e-5)
  assert info.reported.tolist() == valid.tolist()
  assert not np.asarray(info.bytes_up)[1].any()


def test_a_client_that_is_not_finite_leaves_the_model_finite():
  batches = toy_world()[1]
  x = batches['x'].copy()
  x[1, 1] = np.nan
  cohort = toy_cohort(batches={**batches, 'x': x})
  for order in ('sequential', 'parallel'):
    state, _, info = two_rounds(toy(order=order), cohort)
    assert info.finite.tolist() == [True, False, True]
    assert bool(tree.all_finite(state.params))


def test_moments_of_the_server_are_part_of_its_state():
  state, states, _ = two_rounds(
    toy(name='adam', rate=0.01, keep_optimizer=True)
  )
  counts = [x for x in jax.tree.leaves(state.optimizer.server) if x.ndim == 0]
  assert 2 * S * K in [int(x) for x in counts]  # a step for every client
  kept = [x for x in jax.tree.leaves(states.local) if x.shape == (K,)]
  assert any(np.all(np.asarray(x) == 2 * S) for x in kept)


def test_rules_of_the_round_act_on_the_clients_part():
  state, *_ = two_rounds(toy(order='parallel', aggregator=aggregators.median()))
  params, batches = toy_world()
  c, v = np.stack([params['c']] * K), params['v']
  for _ in range(2):
    ends, v = reference.round(
      c, v, batches['x'], batches['y'], rate=RATE, order='parallel',
      average=False, weight=None,
    )  # fmt: skip
    c = np.stack([np.median(ends, 0)] * K)
  tiny.close(state.params.client['c'], c[0], rtol=1e-5)
  tiny.close(state.params.server['v'], v, rtol=1e-5)


PRIVATE = aggregators.mean()
PRIVATE = PRIVATE._replace(traits=PRIVATE.traits._replace(private='x'))
NOISED = uploads.identity()._replace(private=True)


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(order='random'), "order is 'random'; it must be one of sequential"),
    (dict(client_part='own'), "client_part is 'own'; it must be one of aver"),
    (dict(block_size=0), 'block_size is 0; it must be at least 1'),
    (dict(mesh=object()), 'not built for several devices'),
    (dict(history=2), 'leave history out'),
    (dict(aggregator=PRIVATE), 'neither clipped nor noised'),
    (dict(upload=NOISED), 'neither clipped nor noised'),
    (dict(upload=NOISED._replace(additive=True)), 'neither clipped nor noised'),
  ],
)
def test_settings_that_split_learning_has_not_are_refused(settings, words):
  with pytest.raises(Error, match=words):
    toy(**settings)


def test_a_cut_that_leaves_a_side_nothing_is_refused():
  for cut, side in ((0, 'client'), (LAYERS, 'server')):
    method = recipes.split_lora(
      loss, tiny.sgd(), model=network().model, cut=cut
    )
    with pytest.raises(Error, match=f'leaves the {side} nothing to train'):
      method.init(tiny.KEY, factors())


# -------------------------------------------------- methods on a transformer --


@functools.cache
def world():
  """One step of three clients, the last of which has half of its rows."""
  batches = jax.tree.map(np.array, tiny.texts(tiny.K, 1, tiny.B, seed=4))
  batches.loss_mask[2, 0, 1] = False
  return tiny.cohort(batches=batches)


def split_lora(**settings):
  settings = {'cut': CUT, 'order': 'parallel', **settings}
  return recipes.split_lora(
    loss, tiny.sgd(RATE), model=network().model, measure=None, **settings
  )


def ran(algorithm, params, cohort):
  state = algorithm.init(tiny.KEY, params)
  states = tiny.fresh(algorithm, state, len(cohort.ids))
  step = jax.jit(algorithm.round)
  return step(state, cohort._replace(states=states), network().base)


@functools.cache
def protocol():
  """The two parties' programs of a step of SplitLoRA on the transformer."""
  model = network().model
  layers = functools.partial(cutting.layers_of(model), network().base)

  def below(c, *, batch):
    return layers(halves.joined(whole(client=c)), batch, range(CUT), ends=False)

  def above(v, sent, batch):
    def hidden(base, params, batch):
      del base
      return layers(params, batch, range(CUT, LAYERS), sent)

    top = local.causal_lm(Model(hidden, model.logits))
    params = halves.joined(whole(server=v))
    return top(network().base, params, batch, tiny.KEY)

  return jax.jit(below), jax.jit(above)


def whole(**parts):
  """Both halves of the start, with these trained leaves."""
  both = halves.at_layer(factors(), CUT)
  for name, trained in parts.items():
    mine = tree.merge(trained, getattr(both, name))
    both = both._replace(**{name: mine})
  return both


def wire(*arrays):
  """Arrays as the receiver reads them from bytes, and the number of bytes."""
  sent = [np.asarray(x) for x in arrays]
  messages = [x.tobytes() for x in sent]
  read = [
    np.frombuffer(m, x.dtype).reshape(x.shape)
    for m, x in zip(messages, sent, strict=True)
  ]
  return read, sum(map(len, messages))


def test_split_lora_is_what_two_parties_compute_from_each_others_messages():
  """The pooled batch's gradient of v, each client's own gradient of c."""
  cohort = world()
  start = halves.at_layer(tiny.floats(factors()), CUT)
  below, above = protocol()
  updates, to_server, counts = [], [], []
  up, down = [], []
  for k in range(tiny.K):
    batch = tree.take(tree.take(cohort.batches, k), 0)
    sent, pull = jax.vjp(functools.partial(below, batch=batch), start.client)
    (h, *rest), size = wire(sent, *jax.tree.leaves(batch))
    received = jax.tree.unflatten(jax.tree.structure(batch), rest)
    total, slopes, sums = server_half(above, start.server, h, received)
    del total
    (answer,), back = wire(slopes[1])
    updates.append(tree.scale(pull(jnp.asarray(answer))[0], 1 / sums.count))
    to_server.append(slopes[0])
    counts.append(sums.count)
    up.append(size)
    down.append(back)
  assert len(set(map(float, counts))) > 1
  state, _, info = ran(split_lora(), factors(), cohort)
  mean = tiny.mean(tree.stack(updates), cohort.weight)
  pooled = jax.tree.map(lambda *x: sum(x) / sum(counts), *to_server)
  got = halves.at_layer(tiny.moved(halves.joined(state.params), factors()), CUT)
  tiny.close(got.client, tree.scale(mean, -RATE))
  tiny.close(got.server, tree.scale(pooled, -RATE))
  # The neighbour: clients in turn. The server's first client is the same.
  later, *_ = ran(split_lora(order='sequential'), factors(), cohort)
  assert tiny.differs(later.params.server, state.params.server, by=1e-4)
  adapter = sum(x.nbytes for x in jax.tree.leaves(start.client))
  states = tiny.B * tiny.T * tiny.D * 4
  assert [size - states for size in up] == [tiny.B * tiny.T * 13] * tiny.K
  assert down == [states] * tiny.K
  for told, sizes in ((info.bytes_up, up), (info.bytes_down, down)):
    assert np.asarray(told).sum(1).tolist() == [s + adapter for s in sizes]


def server_half(above, v, h, batch):
  (total, sums), slopes = jax.value_and_grad(
    lambda v, h: (lambda s: (s.total, s))(above(v, h, batch)),
    (0, 1),
    has_aux=True,
  )(v, jnp.asarray(h))
  return total, slopes, sums


@pytest.mark.parametrize('name', ['split_lora', 'fed_bert'])
def test_one_client_is_sgd_on_the_whole_model(name):
  cohort = tiny.cohort(
    batches=jax.tree.map(lambda x: x[:1], tiny.texts(tiny.K, tiny.S, tiny.B)),
    ids=[4],
  )
  params = factors()
  if name == 'fed_bert':
    head = adapters.dense('lm_head').init(tiny.KEY, network().base)
    params = {**params, **head}
  average = recipes.fed_avg(loss, tiny.sgd(RATE), measure=None)
  want, _, other = ran(average, params, cohort)
  method = getattr(recipes, name)(
    loss, tiny.sgd(RATE), model=network().model, measure=None
  )
  state, _, info = ran(method, params, cohort)
  served = method.personal(state.params, None)
  tiny.close(served, want.params)
  assert tiny.differs(want.params, params)
  for metric in ('local/loss', 'local/tokens', 'local/steps'):
    np.testing.assert_allclose(
      info.metrics[metric], other.metrics[metric], rtol=1e-5
    )
  states = tiny.B * tiny.T * tiny.D * 4
  number = {'split_lora': 1, 'fed_bert': 2}[name]
  steps = np.asarray(info.bytes_down)[0, -tiny.S :]
  assert steps.tolist() == [number * states] * tiny.S
  # The last columns of the upload: states, and the integers the server reads.
  integers = {'split_lora': 13, 'fed_bert': 8}[name]
  steps = np.asarray(info.bytes_up)[0, -tiny.S :]
  whole = number * states + tiny.B * tiny.T * integers
  assert steps.tolist() == [whole] * tiny.S
  assert method.exchanged is not None
  up, down = method.exchanged(state.params, network().base, cohort.batches)
  assert (up, down) == (tiny.S * whole, tiny.S * number * states)


def test_fed_split_bert_keeps_lower_layers_and_averages_the_others():
  cohort = world()
  parts: dict = dict(measure=None)
  method = recipes.fed_split_bert(loss, tiny.sgd(RATE), cut=CUT, **parts)
  state, states, info = ran(method, factors(), cohort)
  first = jax.tree.map(lambda x: x[:, 0], cohort.batches)
  own = tiny.floats(factors())
  grads = slopes(own, first)  # [K, L, ...]
  got = halves.at_layer(tiny.moved(halves.joined(state.params), factors()), CUT)
  assert not tiny.differs(
    got.client, jax.tree.map(np.zeros_like, got.client), 0
  )
  mean = tiny.mean(tree.scale(grads, -RATE), cohort.weight)
  tiny.close(got.server, halves.at_layer(mean, CUT).server)
  kept = tree.sub(
    states.private.client,
    tree.broadcast(halves.at_layer(own, CUT).client, tiny.K),
  )
  below = {'layers': jax.tree.map(lambda x: x[:, :CUT], grads['layers'])}
  tiny.close(kept, tree.scale(below, -RATE), atol=1e-6)
  sent = sum(
    x.nbytes for x in jax.tree.leaves(halves.at_layer(own, CUT).server)
  )
  assert np.asarray(info.bytes_up).sum(1).tolist() == [sent] * tiny.K
  mine = method.personal(state.params, tree.take(states, 1))
  assert tiny.differs(mine, halves.joined(state.params))
  newcomer = recipes.fed_split_bert(
    loss, tiny.sgd(RATE), cut=CUT, frozen=True, **parts
  ).init_client(method.init(tiny.KEY, factors()).params)
  assert newcomer.private is None  # nothing is trained there


def slopes(trained, batches):
  def one(batch):
    return jax.grad(
      lambda t: mean_loss(loss, network().base, t, factors(), batch, tiny.KEY)[
        0
      ]
    )(trained)

  return jax.jit(jax.vmap(one))(batches)


# ------------------------------------------------------------- the programs --


def method_config(name, **fields):
  path = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
  words = [f'--config.{field}={value}' for field, value in fields.items()]
  argv = ['--config', f'{path}:{name}:smoke', '--workdir', 'none', *words]
  return config.parse(argv, sections.SPEC).config


def test_a_plan_counts_the_messages_within_steps():
  fields = {'clients.cohort_size': 2, 'adapter.targets': 'q_proj'}
  planned = work.read(method_config('split_lora', **fields))
  up, down = work.travel(planned)
  K, _, S, B, T = planned.sizes
  states = 4 * B * T * planned.model.config.hidden_size
  own = tiny.floats(planned.state.params.client)
  adapter = sum(4 * x.size for x in jax.tree.leaves(own))
  assert up == K * (S * (states + 13 * B * T) + adapter)
  assert down == K * (S * states + adapter)


def test_public_texts_are_refused_where_nobody_learns_from_them():
  conf = method_config('fed_avg', **{'public.name': 'packaged'})
  with pytest.raises(
    Error, match='fed_avg does not train its server on public'
  ):
    experiment.algorithm(
      conf, loss=None, model=None, adapter=adapters.lora(), num_clients=3
    )


@pytest.mark.parametrize(
  'mechanism, fields',
  [
    ('local', {}),
    ('examples', {'privacy.example_rate': 0.1}),
  ],
)
def test_privacy_is_refused_when_the_method_is_built(mechanism, fields):
  conf = method_config(
    'split_lora',
    **{
      'privacy.mechanism': mechanism,
      'privacy.noise_multiplier': 1.0,
      'privacy.clip': 1.0,
      'privacy.delta': 1e-5,
      'cohort.weight_by': 'uniform',
      **fields,
    },
  )
  with pytest.raises(Error, match='neither clipped nor noised'):
    experiment.algorithm(
      conf,
      loss=toy_loss,
      model=None,
      adapter=adapters.lora(),
      num_clients=12,
    )
