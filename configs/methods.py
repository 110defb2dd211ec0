"""Every named method on the tiny model, with what that method needs.

    python -m fedjax_llm.train --config configs/methods.py:fed_sb \
        --workdir runs/fed_sb

NAME, or NAME:smoke for seconds, is a recipe, or one of the methods that are an
adapter under federated averaging (FedTT, FeDeRA). The settings are those of
`configs/tiny.py`; `NEEDS` says what a method changes, and every other default
is the recipe's own, which is its paper's where that names one. Half a minute
each; a random model says that a method runs and learns, not which is better.
"""

from typing import Any

import ml_collections

from fedjax_llm import builders, recipes
from fedjax_llm.types import Error

# Clients of two sizes, in halves.
RANKS = dict(profiles=dict(name='ranks', choices=(2, 4)))
# Moments of eight rounds: the papers' rates are for hundreds.
SLOWLY = dict(algorithm=dict(server_learning_rate=0.003))

NEEDS = {
  # Local steps whose mathematics is that of plain SGD.
  'scaffold': dict(local=dict(name='sgd', learning_rate=1.0)),
  # The server's own optimizer.
  'fed_adagrad': SLOWLY,
  'fed_adam': SLOWLY,
  'fed_yogi': SLOWLY,
  'flasc': SLOWLY,
  # Mixed ranks.
  'flexlora': RANKS,
  'flora': RANKS,
  'hafl': RANKS,
  'het_lora': RANKS,
  'hlora': RANKS,
  'rbla': RANKS,
  'replication_padding': RANKS,
  'zero_padding': RANKS,
  'fed_hm': dict(  # whole weights: exact up to the smaller side
    adapter=dict(name='factorised', rank=32),
    profiles=dict(name='ranks', choices=(16, 32)),
  ),
  # Mixed depths.
  'fed_ra': dict(profiles=dict(name='layers', choices=(1, 2))),
  # Other factors.
  'fed_sb': dict(adapter=dict(name='lora_xs', rank=16, alpha=16.0)),
  'ravan': dict(adapter=dict(name='ravan', heads=4, rank=8)),
  'fed_tt_plus': dict(adapter=dict(name='tensor_train')),
  # Budgets of parameters, of 8,184.
  'fed_pipe': dict(profiles=dict(name='budgets', choices=(2000, 8000))),
  # Ten clients, all of them in every round.
  'fed_amole': dict(clients=dict(name='full'), population=dict(max_clients=12)),
  # Few labels and many texts: the genre of a speech.
  'lp_fl': dict(
    task=dict(name='classification'),
    partition=dict(name='dirichlet', num_clients=12, alpha=0.3, min_size=10),
    population=dict(labelled=0.25, max_length=32),
    model=dict(name='random_encoder'),
    adapter=dict(
      name='lora',
      rank=4,
      targets=('q_proj', 'v_proj'),
      modules_to_save=('pooler', 'classifier'),
    ),
  ),
  # Phases of a run, in its few rounds.
  'fd_lora': dict(algorithm=dict(sync_every=4)),
  'fed_dpa_f': dict(algorithm=dict(federated_rounds=4)),
  'slora': dict(algorithm=dict(first_rounds=2)),
  # The rank is the expanded one, twice that of a client.
  'perfit': dict(adapter=dict(rank=8)),
}
# Methods that are an adapter, averaged.
ADAPTERS = {
  'fed_tt': dict(adapter=dict(name='tensor_train')),
  'federa': dict(adapter=dict(name='federa', rank=4)),
}
NAMES = (*recipes.__all__, *ADAPTERS)


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
  config.algorithm = dict(name='fed_avg' if name in ADAPTERS else name)
  config.local = dict(name='adamw', learning_rate=1e-2)
  config.evals = dict(every=8, per_client=2, buckets=())

  for section, fields in {**NEEDS, **ADAPTERS}.get(name, {}).items():
    stands: Any = config.get(section)
    if 'name' not in fields:  # the section stays, with these fields
      stands.update(fields)
    elif section == 'adapter':
      config[section] = {'targets': 'all-linear', **fields}
    else:
      config[section] = dict(fields)
  algorithm: Any = config.algorithm
  for stage in ('federated_rounds', 'first_rounds'):
    if smoke and stage in algorithm:
      algorithm[stage] = 1  # a stage a round
  return config
