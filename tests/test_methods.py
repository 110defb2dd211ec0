"""`configs/methods.py`: every recipe has a config that fits it."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm import config, experiment, sections
from fedjax_llm.types import Error, LossSum

PATH = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
METHODS = runpy.run_path(str(PATH))
each = pytest.mark.parametrize('name', METHODS['NAMES'])
TOLD_BY_NETWORKS = ('fed_amole',)  # their loss needs what nodes tell


def parsed(name, *more):
  given = ['--config', f'{PATH}:{name}', '--workdir', 'none']
  return config.parse([*given, *more], sections.SPEC).config


def sum_of_squares(base, params, batch, key):
  """A loss that is cheap to trace: what is tried is all but the network."""
  del base, key
  count = jnp.sum(batch.segments > 0).astype(jnp.float32)
  floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
  return LossSum(count * sum(jnp.sum(x * x) for x in floats), count, count)


@each
def test_a_round_of_every_method_can_be_traced(name):
  conf = parsed(f'{name}:smoke')
  built = experiment.build(conf, say=lambda sentence: None)
  if name not in TOLD_BY_NETWORKS:
    task = built.task._replace(loss=lambda *_, **__: sum_of_squares)
    built = built._replace(task=task)
  algorithm = built.method()
  state = jax.eval_shape(algorithm.init, built.round_key, built.initial)
  newcomer = jax.eval_shape(algorithm.init_client, state.params)
  _, cohort = built.assemble(0)
  K = len(cohort.ids)
  stacked = lambda x: jax.ShapeDtypeStruct((K, *x.shape), x.dtype)
  cohort = cohort._replace(states=jax.tree.map(stacked, newcomer))
  new, states, told = jax.eval_shape(algorithm.round, state, cohort, built.base)
  alike = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
  assert jax.tree.all(jax.tree.map(alike, new, state))
  assert jax.tree.all(jax.tree.map(alike, states, cohort.states))
  assert told.reported.shape == (K,)


@each
def test_the_long_form_is_the_smoke_form_with_more_of_it(name):
  long, smoke = parsed(name), parsed(f'{name}:smoke')
  assert long['num_rounds'] > smoke['num_rounds']
  for section in ('adapter', 'local', 'model'):
    assert long[section] == smoke[section]
  assert long['algorithm'].keys() == smoke['algorithm'].keys()


@pytest.mark.parametrize('arg', ['fed_sab', 'fed_sb:smoky', 'smoke:fed_sb'])
def test_an_unknown_method_is_one_sentence(arg):
  with pytest.raises(Error) as told:
    parsed(arg)
  assert str(told.value).count('. ') == 0
  if arg == 'fed_sab':
    assert "nearest is 'fed_sb'" in str(told.value)


def test_stages_of_a_run_fit_into_its_rounds():
  for name in ('fed_dpa_f', 'slora'):
    for form in ('', ':smoke'):
      conf = parsed(f'{name}{form}')
      stages = {'federated_rounds', 'first_rounds'} & set(conf['algorithm'])
      assert stages
      for stage in stages:
        assert conf['algorithm'][stage] < conf['num_rounds']
