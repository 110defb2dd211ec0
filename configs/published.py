"""Trains by the set-ups of FlowerTune and OpenFedLLM.

    C=configs/published.py:flowertune_finance
    python -m fedjax_llm.plan --config $C
    python -m fedjax_llm.train --config $C --workdir runs/flowertune_finance

| NAME                 | data set           | clients, a round | model      |
|----------------------|--------------------|------------------|------------|
| `flowertune_general` | alpaca_gpt4        | 20, 2            | Mistral-7B |
| `flowertune_finance` | fingpt_sentiment   | 50, 5            | Mistral-7B |
| `flowertune_medical` | medical_flashcards | 20, 2            | Mistral-7B |
| `flowertune_code`    | code_alpaca        | 10, 2            | Mistral-7B |
| `openfedllm_sft`     | alpaca_gpt4        | 20, 2            | Llama-2-7B |
| `openfedllm_dpo`     | ultrafeedback      | 5, 2             | Llama-2-7B |

FlowerTune: the templates of `flwr new` of Flower 1.20 (4 bits, LoRA r 32, alpha
64, 200 rounds of 10 steps of 16 x 512 tokens, AdamW, cosine from 5e-5 to 1e-6).
OpenFedLLM: `training_scripts/run_sft.sh` and `run_dpo.sh` at commit 9ee5d04 (8
bits, the same shape, 5e-5 or 5e-4 for DPO). Records are dealt at random. What
differs: the rate also falls within a round, dropout of the adapters is left
out, and DPO starts from Llama-2-7B instead of a model tuned from it. The
weights need an accelerator and an accepted licence; nothing of this has been
run.
"""

from typing import Any

import ml_collections

_MISTRAL, _LLAMA = 'mistralai/Mistral-7B-v0.3', 'meta-llama/Llama-2-7b-hf'
# Name: data set, clients, clients a round, rate at the start, model, bits.
SETUPS = {
  'flowertune_general': ('alpaca_gpt4', 20, 2, 5e-5, _MISTRAL, 'nf4'),
  'flowertune_finance': ('fingpt_sentiment', 50, 5, 5e-5, _MISTRAL, 'nf4'),
  'flowertune_medical': ('medical_flashcards', 20, 2, 5e-5, _MISTRAL, 'nf4'),
  'flowertune_code': ('code_alpaca', 10, 2, 5e-5, _MISTRAL, 'nf4'),
  'openfedllm_sft': ('alpaca_gpt4', 20, 2, 5e-5, _LLAMA, 'int8'),
  'openfedllm_dpo': ('ultrafeedback', 5, 2, 5e-4, _LLAMA, 'int8'),
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  name, _, form = arg.partition('-')
  if name == 'smoke':
    name, form = '', 'smoke'
  name = name or 'flowertune_general'
  if name not in SETUPS or form not in ('', 'smoke'):
    raise ValueError(
      f'configs/published.py has no {arg!r}; there are {", ".join(SETUPS)}, '
      'each also with -smoke.'
    )
  smoke = form == 'smoke'
  dataset, clients, cohort, rate, path, bits = SETUPS[name]
  preference = name == 'openfedllm_dpo'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 200
  config.checkpoint_every = 2 if smoke else 10
  config.block_size = 1
  if preference:
    config.task = dict(name='dpo', beta=0.1)

  config.data = dict(name='hub', dataset=dataset)
  config.partition = dict(name='iid', num_clients=clients)
  config.population = dict(template='alpaca', max_length=512, new_clients=0)

  config.clients = dict(name='uniform', cohort_size=cohort)
  config.cohort = dict(num_steps=10, batch_size=16, weight_by='examples')

  config.model = dict(
    name='pretrained',
    path=path,
    dtype='bfloat16',
    compute_dtype='bfloat16',
    quantisation=bits,
    remat='full',
  )
  config.adapter = dict(name='lora', rank=32, alpha=64.0)
  config.algorithm = dict(name='fed_dpo' if preference else 'fed_avg')
  config.local = dict(
    name='adamw',
    schedule=dict(
      name='cosine_decay_schedule',
      init_value=rate,
      decay_steps=2000,
      alpha=1e-6 / rate,
    ),
  )
  config.evals = dict(every=20, per_client=4)
  if smoke:  # the same code on a random model and packaged text
    source = 'contrasted' if preference else 'packaged'
    config.data = ml_collections.ConfigDict(dict(name=source))
    less: Any = config
    less.partition.update(num_clients=4)
    less.population.update(template='plain', max_length=64)
    less.cohort.update(num_steps=2, batch_size=2)
    less.adapter.update(rank=4, alpha=8.0)
    config.local = ml_collections.ConfigDict(
      dict(name='adamw', learning_rate=1e-2)
    )
    config.model = ml_collections.ConfigDict(dict(name='random'))
  return config
