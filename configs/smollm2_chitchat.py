"""Trains SmolLM2-135M on conversations of 100 real people, with two baselines.

    scripts/fetch_smollm2 && scripts/fetch_chitchat
    scripts/compare_chitchat

or one of the three runs,

    python -m fedjax_llm.train --config configs/smollm2_chitchat.py \
        --workdir runs/chitchat/federated

The clients are 110 people of the chitchat set with at least 40 usable replies,
drawn by a keyed permutation; 100 of them train (38 to 10,938 replies each), 10
never do. All three runs see the same number of token places: rounds x 20
clients x 4 rows of 128, packed.
"""

import os

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 8
  config.block_size = 4
  config.checkpoint_every = 4

  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  config.data = dict(
    name='jsonl',
    path=f'{cache}/chitchat/chitchat.jsonl.gz',
    client_key='client',
    prompt_key='instruction',
    response_key='response',
  )
  config.partition = dict(name='natural')
  config.population = dict(
    template='chat',
    max_length=128,
    min_examples=40,
    max_clients=110,
    new_clients=10,
  )

  config.clients = dict(name='uniform', cohort_size=20)
  config.cohort = dict(
    num_steps=4, batch_size=1, packing=True, weight_by='tokens'
  )

  path = os.path.expanduser(f'{cache}/SmolLM2-135M-Instruct')
  config.model = dict(name='pretrained', path=path)
  config.adapter = dict(name='lora', rank=8, alpha=16.0)
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=2e-3)

  config.evals = dict(every=8, per_client=2, common=16, buckets=(64, 96))
  if smoke:  # the same code on Shakespeare's roles and a random model
    config.data = ml_collections.ConfigDict(dict(name='packaged'))
    config.population.update(template='plain', max_clients=8, new_clients=2)
    config.clients.update(cohort_size=4)
    config.model = dict(name='random')
  return config
