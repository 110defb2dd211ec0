"""Trains a random two-layer model on Shakespeare's roles, without downloads.

    python -m fedjax_llm.train --config configs/tiny.py --workdir runs/tiny

Takes seconds. The initial loss is about that of a uniform guess (ln 259 = 5.6
nats a byte), and a low-rank change of random weights learns little: this config
is for trying the program, not for results.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 8

  config.data = dict(name='packaged', dataset='shakespeare_mini')
  config.partition = dict(name='natural')
  config.population = dict(template='plain', max_length=128, new_clients=2)
  if smoke:
    config.population.update(max_clients=6)

  config.clients = dict(name='uniform', cohort_size=4 if smoke else 8)
  config.cohort = dict(num_steps=2 if smoke else 4, batch_size=2)

  config.model = dict(name='random', hidden_size=64, num_layers=2)
  config.adapter = dict(name='lora', rank=4, targets='all-linear')
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=1e-2)

  config.evals = dict(every=4, per_client=2, buckets=())
  return config
