"""Trains MiniLM to classify news by subject, with few subjects per client.

    scripts/fetch_minilm && scripts/fetch_bbcnews
    scripts/compare_minilm

or the federated run alone,

    python -m fedjax_llm.train --config configs/minilm_classification.py \
        --workdir runs/minilm/federated

2,225 articles of five subjects, split over 44 clients by Dirichlet(0.3): most
clients hold one or two subjects; 4 of the clients never train. A text is its
first 32 tokens, the headline and the beginning. LoRA on the attention of all
six layers, the head (pooler and classifier) trained whole. One or two minutes
a run on two idle cores; configs/minilm_classification.md has the numbers.
"""

import os

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 10
  config.checkpoint_every = 2
  config.task = dict(name='classification')

  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  config.data = dict(
    name='jsonl',
    path=f'{cache}/bbcnews/bbcnews.jsonl.gz',
    client_key=None,
    text_key='text',
    label_key='label',
  )
  config.partition = dict(
    name='dirichlet', num_clients=44, alpha=0.3, min_size=10
  )
  config.population = dict(max_length=32, heldout_fraction=0.25, new_clients=4)

  config.clients = dict(name='uniform', cohort_size=10)
  config.cohort = dict(num_steps=4, batch_size=8)

  path = os.path.expanduser(f'{cache}/all-MiniLM-L6-v2')
  config.model = dict(name='pretrained', path=path)
  config.adapter = dict(
    name='lora',
    rank=8,
    alpha=16.0,
    targets=('q_proj', 'v_proj'),
    modules_to_save=('pooler', 'classifier'),
  )
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=1e-3)

  config.evals = dict(
    every=10, batch_size=32, per_client=8, common=32, buckets=()
  )
  if smoke:  # the same code on Shakespeare's genres and a random model
    config.data = ml_collections.ConfigDict(dict(name='packaged'))
    config.partition.update(num_clients=10)
    config.population.update(max_clients=8, new_clients=2, max_length=32)
    config.clients.update(cohort_size=4)
    config.model = dict(name='random_encoder')
    config.evals.update(per_client=4, common=16)
  return config
