"""Four workers pre-train a small model from random weights by DiLoCo.

    python -m fedjax_llm.train --config configs/pretrain_diloco.py \
        --workdir runs/pretrain

Every weight is trained (`adapter.name=dense` on all modules): embeddings,
layers, norms and the head start at random values. Each worker holds a fifth of
the lines of Shakespeare's roles, dealt at random (the last fifth is never
trained on), takes 16 steps of AdamW in a round, keeps its moments, and sends
the whole change of its weights; the server steps with Nesterov momentum
(Douillard et al. 2023, arXiv 2311.08105). Photon's server (arXiv 2411.02908) is
the same with

    --config.algorithm.server_learning_rate=1.0 --config.algorithm.momentum=0.0

The result is a whole model, which `python -m fedjax_llm.export --to merged`
writes. `streaming_diloco` with `algorithm.num_fragments=4` sends one layer in
four a round. Clients' weights are a batch here, so a larger model wants
`block_size=1`.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 24

  config.data = dict(name='packaged', dataset='shakespeare_mini')
  config.partition = dict(name='iid', num_clients=5)
  config.population = dict(template='plain', max_length=128, new_clients=1)

  config.clients = dict(name='full')
  config.cohort = dict(
    num_steps=2 if smoke else 16, batch_size=2 if smoke else 8
  )

  config.model = dict(
    name='random',
    hidden_size=32 if smoke else 128,
    intermediate_size=64 if smoke else 256,
    num_layers=2 if smoke else 4,
  )
  config.adapter = dict(name='dense', modules='.*')
  config.algorithm = dict(name='diloco')
  config.local = dict(name='adamw', learning_rate=2e-3, weight_decay=0.1)

  config.evals = dict(every=8, per_client=2, buckets=())
  return config
