"""Runs a named method on the tiny model, with the settings that it needs.

    python -m fedjax_llm.train --config configs/methods.py:fed_sb \
        --workdir runs/fed_sb

The argument is NAME of a recipe, or NAME:smoke for a run of seconds. The
settings are those of `configs/tiny.py`; `NEEDS` in a recipe's module lists the
changes, and all other defaults are the recipe's, taken from its paper where
that has them. Half a minute each. A random model shows that a method runs and
learns, not which method is better.
"""

import inspect
from typing import Any

import ml_collections

from fedjax_llm import adapters, recipes
from fedjax_llm.run import builders
from fedjax_llm.types import Error

NAMES = recipes.__all__


def get_config(arg: str = 'fed_avg') -> ml_collections.ConfigDict:
  name, _, form = arg.partition(':')
  if arg == 'smoke':
    name, form = 'fed_avg', arg
  if name not in NAMES or form not in ('', 'smoke'):
    near = builders.nearest(name, NAMES)
    raise Error(
      f'configs/methods.py:{arg} is neither NAME nor NAME:smoke of a method '
      f'{near}.'
    )
  smoke = form == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 8

  config.data = dict(name='packaged', dataset='shakespeare_mini')
  config.partition = dict(name='natural')
  config.population = dict(template='plain', max_length=128, new_clients=2)
  if smoke:
    config.population.update(max_clients=6)

  config.clients = dict(name='uniform', cohort_size=4 if smoke else 8)
  config.cohort = dict(num_steps=4, batch_size=2)

  config.model = dict(name='random', hidden_size=64, num_layers=2)
  config.adapter = dict(name='lora', rank=4, targets='all-linear')
  config.algorithm = dict(name=name)
  config.local = dict(name='adamw', learning_rate=1e-2)
  config.evals = dict(every=8, per_client=2, buckets=())

  for section, fields in recipes.NEEDS[name].items():
    stands: Any = config.get(section)
    if 'name' not in fields and stands is not None:  # kept, with these fields
      stands.update(fields)
    elif section == 'adapter':
      builder = getattr(adapters, fields['name'])
      takes = 'targets' in inspect.signature(builder).parameters
      default = {'targets': 'all-linear'} if takes else {}
      config[section] = {**default, **fields}
    else:
      config[section] = dict(fields)
  algorithm: Any = config.algorithm
  for stage in ('federated_rounds', 'first_rounds'):
    if smoke and stage in algorithm:
      algorithm[stage] = 1  # one round for each stage
  return config
