"""Trains both towers of a tiny CLIP on clients that lack pictures or texts.

    python -m fedjax_llm.train --config configs/modalities.py \
        --workdir runs/modalities

Drawn shapes in four styles, a style a client: one client has pictures with
texts, one only pictures, one only texts, and the last both again. All classify
what they have by the names of the shapes. A client trains and sends the towers
that it has data for, and each tower is the mean over the clients that trained
it.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 20

  config.task = dict(name='images_or_texts', template='a drawing of a {}.')
  config.data = dict(
    name='shapes_or_words',
    num=96 if smoke else 480,
    shows=('both', 'picture', 'text', 'both'),
  )
  config.partition = dict(name='natural')
  config.population = dict(heldout_fraction=0.25, max_length=64)

  config.clients = dict(name='full')
  config.cohort = dict(num_steps=2 if smoke else 4, batch_size=8)

  config.model = dict(name='random_clip')
  config.adapter = dict(
    name='lora',
    rank=4,
    targets=('vision/.*/(q|v)_proj', 'text/.*/(q|v)_proj'),
  )
  config.algorithm = dict(name='fedjax_llm.recipes.images.towers:by_tower')
  config.local = dict(name='adamw', learning_rate=1e-2)
  config.evals = dict(every=2 if smoke else 5, per_client=8, buckets=())
  return config
