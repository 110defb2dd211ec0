"""Trains SmolLM2-135M to answer cues in the style of Shakespeare's roles.

    scripts/quickstart

or, with the weights in the cache (`scripts/fetch_smollm2`),

    python -m fedjax_llm.train --config configs/quickstart.py \
        --workdir runs/quickstart

32 roles, one of each play: 28 are clients that train, 4 never train. FedAvg on
LoRA factors (FedIT) of the query and value projections.
"""

import os

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 8
  config.block_size = 4

  config.data = dict(name='packaged', dataset='shakespeare_mini')
  config.partition = dict(name='natural')
  config.population = dict(template='chat', max_length=96, new_clients=4)

  config.clients = dict(name='uniform', cohort_size=8)
  config.cohort = dict(num_steps=4, batch_size=1, weight_by='tokens')

  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  path = os.path.expanduser(f'{cache}/SmolLM2-135M-Instruct')
  config.model = dict(name='pretrained', path=path)
  config.adapter = dict(name='lora', rank=8, alpha=16.0)
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=2e-3)

  config.evals = dict(every=8, per_client=2, common=0, buckets=(64,))
  if smoke:  # the same code on a random model
    config.population.update(template='plain', max_clients=8)
    config.clients.update(cohort_size=4)
    config.model = dict(name='random')
  return config
