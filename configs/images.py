"""Trains LoRA on DINOv2-small to tell the kinds of emoji of three vendors.

    scripts/fetch_emoji
    python -m fedjax_llm.train --config configs/images.py --workdir runs/images

1,852 things, each drawn by Google, Twitter and Microsoft (Fluent 3D), of nine
categories. The pictures of all vendors are dealt to 30 clients by
Dirichlet(0.3) over the categories. The smoke form trains LoRA on both towers of
a tiny random CLIP, whose classes are texts, on drawn shapes in four styles, a
style a client.
"""

import os

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 20
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'

  if smoke:
    config.task = dict(name='zero_shot', template='a drawing of a {}.')
    config.data = dict(name='shapes', num=96)
    config.partition = dict(name='natural')
    config.model = dict(name='random_clip')
    targets: tuple[str, ...] = ('vision/.*/(q|v)_proj', 'text/.*/(q|v)_proj')
    head: tuple[str, ...] = ()
  else:
    config.task = dict(name='image_classification')
    config.data = dict(
      name='images', path=f'{cache}/emoji/emoji_56.npz', label_key='category'
    )
    config.partition = dict(
      name='dirichlet', num_clients=30, alpha=0.3, min_size=20
    )
    path = os.path.expanduser(f'{cache}/dinov2-small')
    config.model = dict(name='pretrained', path=path)
    targets, head = ('q_proj', 'v_proj'), ('classifier',)

  config.population = dict(heldout_fraction=0.25)
  config.clients = dict(name='uniform', cohort_size=2 if smoke else 10)
  config.cohort = dict(num_steps=2 if smoke else 4, batch_size=8)
  config.adapter = dict(
    name='lora', rank=4, targets=targets, modules_to_save=head
  )
  config.algorithm = dict(name='fed_avg')
  config.local = dict(name='adamw', learning_rate=1e-3)
  config.evals = dict(every=2 if smoke else 5, per_client=8, buckets=())
  return config
