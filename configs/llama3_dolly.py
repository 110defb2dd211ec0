"""Trains Llama-3.2-1B on Dolly's instructions, one category per client.

    huggingface-cli login    # the weights require accepting a licence
    python -m fedjax_llm.train --config configs/llama3_dolly.py \
        --workdir runs/dolly

15,011 instructions written by people (databricks-dolly-15k) in 8 categories,
from brainstorming to summarization, split over 80 clients with one category
each: 72 train, 8 never do. FedAvg on LoRA factors (FedIT) of the query and
value projections, in bfloat16.

Needs an accelerator with 16 GB or more: 2.5 GB of weights, and the activations
of `block_size` clients at a time; increase it if there is memory. It has not
been run with the real weights yet, so there are no expected numbers. The
`:smoke` form runs the same code on a random model and packaged data.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 50
  config.block_size = 2 if smoke else 4
  config.checkpoint_every = 1 if smoke else 5

  config.data = dict(
    name='hf',
    path='databricks/databricks-dolly-15k',
    prompt_key='instruction',
    context_key='context',
    response_key='response',
    label_key='category',
  )
  config.partition = dict(name='one_label', num_clients=80)
  config.population = dict(template='chat', max_length=512, new_clients=8)

  config.clients = dict(name='uniform', cohort_size=8)
  config.cohort = dict(
    num_steps=10, batch_size=4, packing=True, weight_by='tokens'
  )

  config.model = dict(
    name='pretrained',
    path='meta-llama/Llama-3.2-1B-Instruct',
    dtype='bfloat16',
    compute_dtype='bfloat16',
    remat='full',
  )
  config.adapter = dict(name='lora', rank=16, alpha=32.0)
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=2e-4, clip_norm=1.0)

  config.evals = dict(every=10, per_client=4, buckets=(128, 256))
  if smoke:  # the categories are genres of Shakespeare's plays
    config.data = ml_collections.ConfigDict(dict(name='packaged'))
    config.partition.update(num_clients=8)
    config.population.update(template='plain', max_length=96, new_clients=2)
    config.clients.update(cohort_size=4)
    config.cohort.update(num_steps=2, batch_size=2)
    config.model = ml_collections.ConfigDict(
      dict(
        name='random',
        dtype='bfloat16',
        compute_dtype='bfloat16',
        remat='full',
      )
    )
  return config
