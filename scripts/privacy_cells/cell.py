"""The config of one cell, MODEL:TUNING:EPSILON:SEED:ROUNDS, for `train`.

--config scripts/privacy_cells/cell.py:small:ffa:3:0:12
"""

import os
import pathlib
import sys
from typing import NamedTuple

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
DELTA, CLIP = 1e-3, 0.5
# The scales of norms bear less noise than factors that begin at zero.
CLIPS = {('smollm2', 'bitfit'): 0.1}


class Size(NamedTuple):
  """The shape of a cell: its people and their work in a round."""

  clients: int
  rate: float  # of a client's chance to take part
  rows: int  # a sample exceeds them with a probability below 1e-9
  steps: int
  length: int  # tokens of a reply


SIZES = {
  'smollm2': Size(128, 0.125, 48, 2, 96),
  'small': Size(500, 0.04, 56, 4, 64),
  'smoke': Size(8, 0.5, 8, 4, 64),
}


def get_config(arg: str) -> dict:
  model, tuning, epsilon, seed, rounds = arg.split(':')
  adapter, method, rate = TUNINGS[tuning]
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  cache = os.path.expanduser(cache)
  smoke, large, size = model == 'smoke', model == 'smollm2', SIZES[model]
  config = dict(
    num_rounds=int(rounds),
    seed=int(seed),
    block_size=8,
    checkpoint_every=int(rounds),
    data=dict(name=replies.chitchat),
    partition=dict(name='natural'),
    population=dict(
      template='chat' if large else 'plain',
      max_length=size.length,
      min_examples=20,
      long_replies='cut',
      max_clients=size.clients,
      new_clients=0,
    ),
    clients=dict(name='poisson', cohort_size=size.rows, rate=size.rate),
    cohort=dict(num_steps=size.steps, batch_size=1, weight_by='uniform'),
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
    config['population'] |= dict(min_examples=2)
  if epsilon != 'none':
    config['privacy'] = dict(
      clip=CLIPS.get((model, tuning), CLIP), delta=DELTA, epsilon=float(epsilon)
    )
  return config
