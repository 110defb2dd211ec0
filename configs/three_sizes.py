"""Phones, laptops and servers train one adapter of a tiny random model.

    python -m fedjax_llm.train --config configs/three_sizes.py \
        --workdir runs/three_sizes

Phones take zeroth-order steps (two forward passes), laptops train the upper
layer with one row of activations at a time, servers train LoRA in all layers.
`algorithm.laptop_layers`, `phone_learning_rate` and the shares in `profiles`
are to be changed with the model.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 20

  config.data = dict(name='packaged', dataset='shakespeare_mini')
  config.partition = dict(name='natural')
  config.population = dict(template='plain', max_length=128, new_clients=2)
  if smoke:
    config.population.update(max_clients=6)

  config.clients = dict(name='uniform', cohort_size=4 if smoke else 8)
  config.profiles = dict(name='devices', phones=0.5, laptops=0.25, servers=0.25)
  config.cohort = dict(
    num_steps=2 if smoke else 4, batch_size=1 if smoke else 2
  )
  config.block_size = 1  # a client computes the steps of its own kind alone

  config.model = dict(name='random', hidden_size=64, num_layers=2)
  config.adapter = dict(name='lora', rank=4, targets='all-linear')
  config.algorithm = dict(
    name='three_sizes', laptop_layers=1, phone_learning_rate=1e-2
  )
  config.local = dict(name='adamw', learning_rate=1e-2)

  config.evals = dict(every=10, per_client=2, buckets=())
  return config
