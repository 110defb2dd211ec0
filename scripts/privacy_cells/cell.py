"""The config of one cell, MODEL:TUNING:EPSILON:SEED:ROUNDS, for `train`.

--config scripts/privacy_cells/cell.py:small:ffa:3:0:12
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from privacy_cells import replies  # beside this file
from trust import cells

# An adapter, its method, and the rate of AdamW at the clients.
TUNINGS = {
  'lora': (dict(name='lora', rank=8, alpha=16.0), 'fed_avg', 2e-3),
  'ffa': (dict(name='lora', rank=8, alpha=16.0), 'ffa_lora', 2e-3),
  # Models of the Llama family have no biases: the scales of their norms.
  'bitfit': (dict(name='norms'), 'fed_avg', 5e-3),
  'prompt': (dict(name='soft_prompt', length=8), 'fed_prompt', 2e-2),
}
CLIENTS, RATE, ROWS = 500, 0.04, 56  # a sample exceeds the rows by 3e-12
DELTA, CLIP = 1e-3, 0.5


def get_config(arg: str) -> dict:
  model, tuning, epsilon, seed, rounds = arg.split(':')
  adapter, method, rate = TUNINGS[tuning]
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  cache = os.path.expanduser(cache)
  smoke, large = model == 'smoke', model == 'smollm2'
  length = 128 if large else 64
  config = dict(
    num_rounds=int(rounds),
    seed=int(seed),
    block_size=8,
    checkpoint_every=int(rounds),
    data=dict(name=replies.chitchat),
    partition=dict(name='natural'),
    population=dict(
      template='chat' if large else 'plain',
      max_length=length,
      min_examples=20,
      long_replies='cut',
      max_clients=CLIENTS,
      new_clients=0,
    ),
    clients=dict(name='poisson', cohort_size=ROWS, rate=RATE),
    cohort=dict(num_steps=4, batch_size=1, weight_by='uniform'),
    model=dict(name='pretrained', path=f'{cache}/SmolLM2-135M-Instruct'),
    adapter=adapter,
    algorithm=dict(name=method),
    local=dict(name='adamw', learning_rate=rate),
    evals=dict(every=1000, per_client=1, samples=0, buckets=(64,)),
  )
  if not large:  # a decoder of 1.0 million parameters on bytes
    config['model'] = dict(name=cells.random if smoke else cells.small)
  if smoke:
    config['data'] = dict(name='packaged')
    config['population'] |= dict(max_clients=8, min_examples=2)
    config['clients'] |= dict(cohort_size=8, rate=0.5)
  if epsilon != 'none':
    config['privacy'] = dict(clip=CLIP, delta=DELTA, epsilon=float(epsilon))
  return config
