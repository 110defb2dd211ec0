"""The halves of a round, what a rule may promise, and what all are sent."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import (
  aggregators,
  builders,
  config,
  experiment,
  local,
  models,
  recipes,
  sections,
  server,
  tree,
  uploads,
)
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  Cohort,
  Error,
  LocalUpdate,
  LossSum,
  Traits,
)

PATH = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
METHODS = runpy.run_path(str(PATH))
N = 10


@functools.cache
def network(labels):
  """The smallest models of the configs: of two layers, as `fed_ra` wants."""
  sizes = dict(hidden_size=16, intermediate_size=16, num_heads=2, vocab_size=29)
  if labels:
    return models.random_encoder(labels=('a', 'b'), **sizes)
  return models.random(num_kv_heads=1, **sizes)


def cheap(base, params, batch, key):
  """A loss without a network: halves are about all but the network."""
  count = jnp.float32(1) * jnp.sum(batch.segments > 0)
  floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
  return LossSum(
    count * sum(jnp.sum((x - 1) ** 2) for x in floats), count, count
  )


def method(name):
  """A method of the configs on a small adapter: (algorithm, params, cohort)."""
  more = ['--config', f'{PATH}:{name}:smoke', '--workdir', 'none']
  conf = config.parse(more, sections.SPEC).config
  labels = conf.get('task') is not None
  loaded = network(labels)
  if conf['adapter'].get('targets') == 'all-linear':
    conf['adapter']['targets'] = ('q_proj',)
  make = lambda section, **more: builders.build(
    conf[section], sections.SPEC.sections[section], **more
  )
  profiles = None
  if conf.get('profiles'):
    profiles = make('profiles', num_clients=N, seed=0)
  adapter = make('adapter')
  loss = cheap
  if name == 'fed_amole':  # its loss reads what the network tells of routing
    loss = local.causal_lm(loaded.model)
  algorithm = experiment.algorithm(
    conf,
    loss=loss,
    model=loaded.model,
    adapter=adapter,
    num_clients=N,
    profiles=profiles,
  )
  batches = tiny.texts(3, 1, 2)
  if labels:
    label = np.array([[[0, -1]], [[1, 0]], [[-1, 1]]], np.int32)
    batches = batches._replace(label=label)
  ids = np.array([4, 0, 3], np.int32)
  cohort = tiny.cohort(batches=batches, ids=ids)._replace(
    valid=np.array([True, False, True]),
    profiles=jax.tree.map(lambda x: np.asarray(x)[ids], profiles or ()),
  )
  return algorithm, adapter.init(tiny.KEY, loaded.base), cohort, loaded.base


@pytest.mark.parametrize('name', METHODS['NAMES'])
def test_a_round_is_its_two_halves(name):
  algorithm, params, cohort, base = method(name)
  assert algorithm.train is not None and algorithm.aggregate is not None
  state = algorithm.init(tiny.KEY, params)
  cohort = cohort._replace(states=tiny.fresh(algorithm, state, 3))

  @jax.jit
  def both(state, cohort, base):
    uploads, states, info = algorithm.train(state, cohort, base)
    new, metrics = algorithm.aggregate(state, uploads, base)
    info = info._replace(metrics={**info.metrics, **metrics}, reports=None)
    whole = algorithm.round(state, cohort, base)
    return whole, (new, states, info)

  whole, parts = both(state, cohort, base)
  whole = (*whole[:2], whole[2]._replace(reports=None))
  plain = lambda x: x._replace(key=None)
  tiny.close(plain(parts[0]), plain(whole[0]), 1e-6, 1e-6)
  tiny.close(parts[1:], whole[1:], 1e-5, 1e-6)
  if name != 'local_only':
    assert tiny.differs(whole[0].params, state.params, by=1e-6)


def test_the_halves_take_turns_with_a_phase_after_and_an_adversary():
  """What `round` gives to the server's phase, `aggregate` gives as well."""

  def after(state, base, data, key):
    noise = tiny.draw(key, state.params)
    return state._replace(
      params=tree.add(state.params, tree.scale(noise, data))
    )

  def adversary(uploads, key):
    noise = tiny.draw(key, uploads.update)
    return uploads._replace(update=tree.add(uploads.update, noise))

  algorithm = recipes.fed_avg(
    cheap, tiny.sgd(), after=after, adversary=adversary, history=3
  )
  params, cohort = tiny.lora(), tiny.cohort()
  state, received, _ = tiny.received(algorithm, params, cohort)
  data = jnp.float32(0.1)
  new, _ = jax.jit(algorithm.aggregate)(state, received, tiny.base(), data)
  whole, _, _ = tiny.run(algorithm, params, cohort, data=data)
  plain = lambda x: x._replace(key=None)
  tiny.close(plain(new), plain(whole), 1e-6)
  tiny.close(tree.take(new.history, 0), new.params)
  tiny.close(tree.take(new.history, 2), params)


# ------------------------------------------------------------------ memory --


def bytes_of(half, num, width=4096):
  """Bytes that a compiled program needs beside its arguments, K = num."""

  def loss(base, params, batch, key):
    return LossSum(jnp.sum(params['w'] * batch), *jnp.float32([1, 0]))

  algorithm = recipes.fed_avg(loss, tiny.sgd(), block_size=2)
  state = algorithm.init(tiny.KEY, {'w': jnp.ones(width)})
  ids = jnp.arange(num)
  ones = jnp.ones((num, 1, 1))
  cohort = Cohort(ids, ones, ones[:, 0, 0], ids >= 0)
  program = jax.jit(getattr(algorithm, half)).lower(state, cohort).compile()
  memory = program.memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_a_streaming_round_in_blocks_never_holds_the_stack():
  stack = 4 * 4096  # bytes of one client's update
  grown = {
    half: (bytes_of(half, 32) - bytes_of(half, 8)) / 24
    for half in ('round', 'train')
  }
  assert grown['round'] < 0.1 * stack
  assert grown['train'] >= stack


# ------------------------------------------------------ promises and errors --


def built(rule=None, **parts):
  return recipes.fed_avg(cheap, tiny.sgd(), aggregator=rule, **parts)


def promising(**traits):
  return aggregators.mean()._replace(traits=Traits(**traits))


def additive():
  return uploads.identity()._replace(additive=True)


def lying(uploads, key):
  return uploads


# What each trait is for: a combination, and why it is refused.
TRAITS = {
  'linear': (
    dict(rule=promising(), upload=additive()),
    'sees no single client',
  ),
  'changes_basis': (
    dict(rule=promising(changes_basis=True), server=server.fed_adam()),
    'the server optimizer must keep no moments',
  ),
  'writes_residual': (
    dict(rule=promising(writes_residual=True)),
    'so it needs fold, that of the adapter',
  ),
}
REFUSED = {
  **TRAITS,
  'block_size': (dict(block_size=0), 'block_size is 0; it must be at least 1.'),
  'widths': (
    dict(widths=(8, 0)),
    r'widths are \(8, 0\); each must be at least 1.',
  ),
  'history': (dict(history=0), 'history is 0; it must be at least 1.'),
  'a residual of one version': (
    dict(
      rule=promising(writes_residual=True),
      fold=lambda base, params: (base, params),
      history=2,
    ),
    'it needs history=1, and no clients that started earlier.',
  ),
  'an adversary in blocks': (
    dict(adversary=lying, block_size=1),
    'an adversary sees the whole stack of uploads: leave block_size out.',
  ),
  'an adversary of a sum': (
    dict(adversary=lying, upload=additive()),
    'an adversary acts on single uploads, and this upload is decoded after the '
    'sum: use another upload.',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_makes_no_sense_together_is_one_sentence(name):
  parts, sentence = REFUSED[name]
  parts = {'rule': aggregators.mean(), **parts}
  with pytest.raises(Error, match=sentence) as error:
    built(**parts)
  assert str(error.value).endswith('.') and '. ' not in str(error.value)


def test_every_trait_is_enforced():
  # `always` is: a round of nobody, below.
  assert {*TRAITS, 'always'} == set(Traits._fields)


@pytest.mark.parametrize('always', [True, False])
def test_a_round_of_nobody_changes_something_where_the_rule_acts_always(always):
  one = lambda uploads, state, params, key: (
    Aggregate(tree.scale(params, 0 * state) | {'w': jnp.ones(2)}),
    state + 1,
  )
  rule = Aggregator(lambda *_: jnp.float32(0), one, Traits(always=always))
  loss = lambda base, p, x, key: LossSum(jnp.sum(p['w'] * x), *jnp.ones(2))
  algorithm = recipes.fed_avg(loss, tiny.sgd(), aggregator=rule)
  state = algorithm.init(tiny.KEY, {'w': jnp.zeros(2)})
  ones = jnp.ones((2, 1))
  nobody = Cohort(jnp.array([-1, -1]), ones, ones[:, 0], jnp.zeros(2, bool))
  state, _, _ = jax.jit(algorithm.round)(state, nobody)
  assert state.params['w'].tolist() == [float(always)] * 2
  assert float(state.aggregator) == float(always)
  assert int(state.round) == 1


def test_linear_rules_see_the_sum_alone():
  """For each rule that says so: messages may be added before they are decoded."""
  params, cohort = tiny.lora(), tiny.cohort()
  cohort = cohort._replace(valid=np.array([True, True, False]))
  linear = 0
  for name in aggregators.__all__:
    if name in ('as_stack', 'control_variates', 'from_rule', 'krum'):
      continue  # they take a rule or numbers, and are not linear
    rule = getattr(aggregators, name)()
    if not rule.traits.linear:
      continue
    linear += 1
    state, _, _ = tiny.run(built(rule), params, cohort)
    same, _, _ = tiny.run(built(rule, upload=additive()), params, cohort)
    tiny.close(same.params, state.params, 1e-5)
  assert linear


# -------------------------------------------------------------------- news --


def test_news_of_a_rule_reach_the_clients_of_the_next_round():
  """A client's update is what it hears; the rule then doubles the news."""

  def run(base, start, state, batches, masks, context):
    update = {'w': context.news['step'] * jnp.ones(3)}
    return ClientOutput(update, masks, metrics={'heard': context.news['step']})

  rule = aggregators.as_stack(aggregators.mean())

  def aggregate(uploads, state, params, key):
    return rule.aggregate(uploads, (), params, key)[0], 2 * state

  loud = rule._replace(
    init=lambda params, key: jnp.float32(5),
    aggregate=aggregate,
    broadcast=lambda state: {'step': state, 'hint': jnp.zeros(2, jnp.int8)},
  )
  algorithm = recipes.compose(LocalUpdate(lambda _: (), run), aggregator=loud)
  state = algorithm.init(tiny.KEY, {'w': jnp.zeros(3)})
  ones = jnp.ones((2, 1))
  ids = jnp.array([8, -1])
  cohort = Cohort(ids, ones, ones[:, 0], ids >= 0)
  step, values = jax.jit(algorithm.round), []
  for _ in range(3):
    state, _, info = step(state, cohort)
    values.append(float(info.metrics['local/heard']))
    # Three float32 of parameters; one of news, with two bytes.
    assert info.bytes_down.sum(1).tolist() == [3 * 4 + 4 + 2, 0]
  assert values == [5, 10, 20]
  assert state.params['w'].tolist() == [35] * 3
