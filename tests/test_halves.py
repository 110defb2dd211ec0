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
  builders,
  config,
  experiment,
  local,
  models,
  recipes,
  sections,
  tree,
)
from fedjax_llm.types import (
  Cohort,
  LossSum,
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
