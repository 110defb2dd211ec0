"""Numbers of a config: what no setting can be is named before anything runs."""

import jax.numpy as jnp
import pytest

from fedjax_llm import adapters, data, models
from fedjax_llm.adapters import targets
from fedjax_llm.data import tokenizers
from fedjax_llm.local import optimizers
from fedjax_llm.run import builders, config
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'learning_rate': -0.1}, r'local: the learning rate is -0.1 at step 0'),
    ({'learning_rate': float('nan')}, 'local: the learning rate is nan'),
    ({'learning_rate': float('inf')}, 'local: the learning rate is inf'),
    ({'b1': 1.5}, r'local\.b1 is 1.5, but must be a number from 0 to 1'),
    ({'b2': -0.1}, r'local\.b2 is -0.1, but must be a number from 0 to 1'),
    ({'eps': -1e-8}, r'local\.eps is -1e-08, but must be a number of at least'),
    ({'weight_decay': -1.0}, r'local\.weight_decay is -1.0, but must be a num'),
    ({'weight_decay': float('nan')}, r'local\.weight_decay is nan, but must'),
    ({'mask': 'x'}, r"local\.mask is 'x', but must be none, a tree of"),
    ({'mu_dtype': 'x'}, 'local: adamw cannot be used like this: data type'),
    (
      {'schedule': {'name': 'constant_schedule', 'value': -1.0}},
      r'local\.schedule: the learning rate is -1 at step 0',
    ),
    (
      {
        'schedule': {
          'name': 'linear_schedule',
          'init_value': 1.0,
          'end_value': -1.0,
          'transition_steps': 100,
        }
      },
      r'local\.schedule: the learning rate is -1 at step 100',
    ),
    (
      {
        'schedule': {
          'name': 'cosine_onecycle_schedule',
          'peak_value': 0.1,
          'transition_steps': 10,
          'div_factor': 0,
        }
      },
      r'local\.schedule: float division by zero',
    ),
  ],
)
def test_settings_of_optax_have_ranges(settings, message):
  with pytest.raises(Error, match=message):
    optimizers.optimizer('adamw', **settings)


@pytest.mark.parametrize('name', optimizers.names())
def test_every_optimizer_takes_a_step_with_its_defaults(name):
  assert optimizers.optimizer(name).name == name


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 2**32, -(2**40)])
@pytest.mark.parametrize(
  'field',
  [
    'adapter.alpha',
    'cohort.num_steps',
    'population.new_clients',
    'evals.every',
  ],
)
def test_numbers_of_a_config_are_finite_and_have_32_bits(field, value):
  tiny = config.load('configs/tiny.py:smoke')
  with pytest.raises(Error, match=rf'--config\.{field} (is|must be) '):
    config.override(tiny, [(field, value)], SPEC)


def test_a_seed_may_have_64_bits():
  tiny = config.load('configs/tiny.py:smoke')
  found, _ = config.override(tiny, [('seed', 2**40)], SPEC)
  assert found['seed'] == 2**40


def test_numbers_inside_of_lists_and_dicts_are_looked_at():
  with pytest.raises(Error, match='x is nan, but must be a finite number'):
    builders.check_numbers([1, (2.0, float('nan'))], 'x')
  builders.check_numbers({'a': [1, 'b', None, True]}, 'x')


def test_what_is_no_template_and_no_loop_turn_is_named():
  record = data.Record(prompt='a', response='b')
  with pytest.raises(Error, match=r'template: there is no \{\}; choose from'):
    data.encode(record, tokenizers.bytes(), {})  # type: ignore
  with pytest.raises(Error, match=r'model\.unroll is -1, but must be at least'):
    models.random(unroll=-1)


def test_a_target_that_begins_with_a_mark_is_left_out():
  kernel = {'kernel': jnp.ones((2, 2))}
  base = {'layers': {'q_proj': kernel, 'o_proj': kernel, 'up_proj': kernel}}
  names = lambda *wanted: [path[-1] for path in targets.find(base, wanted)]
  assert names('all-linear', '!o_proj') == ['q_proj', 'up_proj']
  assert names('!(o|q)_proj', 'all-linear') == ['up_proj']
  for wanted, message in [
    (('q_proj', '!v_proj'), "'!v_proj' matches no weight"),
    (('q_proj', '!q_proj'), 'leaves nothing of'),
    (('!q_proj',), 'leaves nothing of'),
  ]:
    with pytest.raises(Error, match=rf'adapter\.targets.*{message}'):
      names(*wanted)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('execution', 'x:y', "must be 'shard_map' or 'pmap', not 'x:y'"),
    ('adapter.targets', {'q_proj': 1}, 'must be str or Sequence'),
    ('adapter.layers', {}, 'must be int or str or Sequence'),
    ('evals.evaluators', {}, 'must be Sequence'),
    ('evals.buckets', {}, 'must be tuple'),
    ('local.b1', True, 'must be .*, not True'),
    ('local.eps', False, 'must be .*, not False'),
  ],
)
def test_values_of_another_type_are_named(field, value, message):
  tiny = config.load('configs/tiny.py:smoke')
  with pytest.raises(Error, match=rf'--config\.{field} {message}'):
    config.override(tiny, [(field, value)], SPEC)


def test_what_makes_an_adapter_of_nothing_is_named():
  with pytest.raises(Error, match=r"adapter\.modules_to_save is ''"):
    adapters.lora(modules_to_save='')
  for build in (adapters.lora, adapters.rslora, adapters.dora):
    with pytest.raises(Error, match=r'adapter\.alpha gives the scale 0; it'):
      build(alpha=0.0)


@pytest.mark.parametrize('dtype', ['float', 'x', '\ud800', 3])
def test_a_dtype_that_is_none_is_named(dtype):
  with pytest.raises(Error, match=r'dtype=.* is not one of float32'):
    models.random(dtype=dtype)
