"""Every method of `configs/methods.py` is swept, trained, replayed, exported.

The programs are real, and their folders are. Only the compiled round is not:
it is traced, and returns the state that it was given. Methods on the same texts
and adapter share them.
"""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fedjax_llm import export, sweep
from fedjax_llm.devices import sharding
from fedjax_llm.replay import program as replay
from fedjax_llm.run import (
  config,
  experiment,
  preferences,
  rebuild,
  sections,
  tasks,
  training,
)
from fedjax_llm.sweep import population
from fedjax_llm.types import LossSum

PATH = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
NAMES = runpy.run_path(str(PATH))['NAMES']
# Their loss needs the statistics of nodes, or a network without some layers.
OBSERVED = (
  *('fed_amole', 'fed_biot', 'fed_l2p', 'fed_rs', 'fed_sp', 'offsite_tuning'),
  *('sgpt',),
)
# Their local training is that of their task's loss.
TASKS = ('fed_avg_grpo', 'fed_mkt')
KINDS = {None: 'texts', 'classification': 'labels', 'dpo': 'pairs'}
SMALL = (
  *('num_rounds=1', 'cohort.num_steps=1', 'compilation_cache=none'),
  *('population.max_clients=4', 'population.new_clients=0'),
  *('evals.per_client=0', 'evals.common=0', 'evals.samples=0'),
)


def sum_of_squares(base, params, batch, key):
  """Returns a loss that is traced in no time."""
  del base, key
  count = jnp.sum(batch.segments > 0).astype(jnp.float32)
  floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
  return LossSum(count * sum(jnp.sum(x**2) for x in floats), count, count)


def texts():
  return tasks.causal_lm()._replace(loss=lambda *_, **__: sum_of_squares)


def labels(**more):
  task = tasks.classification(**more)
  return task._replace(loss=lambda *_, **__: sum_of_squares)


def standing(round_fn, num=None, traced=None):
  """Returns a round that is traced and changes nothing but its number.

  With `num` the function is that of a population, with an axis of members.
  `traced` keeps the shapes of a round: seeds of a sweep share them.
  """
  traced = {} if traced is None else traced

  def shapes_of(*given):
    leaves, structure = jax.tree.flatten(given)
    key = (structure, *map(jax.typeof, leaves))
    if key not in traced:
      traced[key] = jax.eval_shape(round_fn, *given)
    return traced[key]

  def result(shapes, state):
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert jax.tree.all(jax.tree.map(same, shapes[0], state))
    info = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes[-1])
    everybody = np.ones(info.reported.shape, bool)
    info = info._replace(reported=everybody, finite=everybody)
    return state._replace(round=state.round + 1), info

  def one(state, cohort, base):
    state, info = result(shapes_of(state, cohort, base), state)
    return state, cohort.states, info

  def several(values, states, cohorts, kind, base):
    return result(shapes_of(values, states, cohorts, kind, base), states)

  return several if num else one


def pairs():
  task = preferences.dpo()

  def loss(base, params, batch, key):
    return sum_of_squares(base, params, batch.chosen, key)

  return task._replace(loss=lambda *_, **__: loss, prepare=None)


BUILD, BUILT = experiment.build, {}
METHOD = ('algorithm', 'local', 'upload', 'aggregator', 'server')


def shared_build(conf, say=print, *, model=None):
  """Returns `experiment.build`, computed once for the sections it reads."""
  read = config.resolved(conf, sections.SPEC)
  read = {k: v for k, v in read.items() if k not in METHOD}
  key = json.dumps(read, sort_keys=True)
  if key not in BUILT:
    BUILT[key] = BUILD(conf, say, model=model)
  return BUILT[key]._replace(conf=conf)


@pytest.fixture
def traced(monkeypatch):
  """No round is compiled; returns the shapes of those that were traced."""
  monkeypatch.setattr(experiment, 'build', shared_build)
  program = population.program
  monkeypatch.setattr(
    population, 'program', lambda *args: standing(program(*args), num=2)
  )
  shapes = {}
  monkeypatch.setattr(
    sharding, 'compiled', lambda fn, mesh: standing(fn, traced=shapes)
  )
  return shapes


def parsed(name, folder):
  argv = ['--config', f'{PATH}:{name}:smoke', '--workdir', str(folder)]
  conf = config.parse(
    [*argv, *(f'--config.{field}' for field in SMALL)], sections.SPEC
  ).config
  if conf['clients']['name'] not in ('full', 'compass'):
    conf['clients']['cohort_size'] = 2
  if conf['adapter'].get('targets') == 'all-linear':
    conf['adapter']['targets'] = ('q_proj', 'v_proj')
  if name == 'fed_amole':  # as many experts as four clients can hold
    conf['algorithm']['num_experts'] = 8
  if name not in (*OBSERVED, *TASKS):
    task = conf.get('task') or {}
    if kind := KINDS.get(task.get('name')):  # others train by their own loss
      conf['task'] = {**task, 'name': f'{__name__}:{kind}'}
  return config.override(conf, [], sections.SPEC)[0]


@pytest.mark.parametrize('name', NAMES)
def test_a_method_is_swept_trained_replayed_and_exported(
  name, tmp_path, traced
):
  conf, said = parsed(name, tmp_path), []
  result = sweep.run(
    *(conf, {}),
    seeds=[0, 1],
    workdir=tmp_path / 'sweep',
    metric='local/loss',
    say=said.append,
  )
  assert result.rows[0].value is not None, said
  folder = tmp_path / 'sweep' / 'runs' / 'seed=0'
  if not (folder / 'checkpoints').is_dir():  # trained by one program
    folder = tmp_path / 'run'
    training.train(config.Arguments(conf, str(folder), str(PATH)))
  traced.clear()  # the round of the rebuilt method is traced as well
  words = ['--workdir', folder, '--round', 1, rebuild.TRUST]
  assert 'equal: every number' in runs.done(replay, words)
  words = ['--workdir', folder, rebuild.TRUST, '--out', tmp_path / 'out']
  status, out, err = runs.run(export, [*words, '--to', 'merged'])
  if status:  # what stands beside the base leaves as an adapter
    assert 'serve it beside the base' in err.splitlines()[-1]
    status, out, err = runs.run(export, [*words, '--to', 'peft'])
  if status:
    assert 'PEFT' in err.splitlines()[-1]
  else:
    assert str(tmp_path / 'out') in out
