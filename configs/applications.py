"""Fine-tunes a model in one of five fields: `configs/applications.py:NAME`.

    python -m fedjax_llm.train --config configs/applications.py:law \
        --workdir runs/law

| NAME             | data set             | client                | learns     |
|------------------|----------------------|-----------------------|------------|
| `finance`        | financial_phrasebank | sentiments, Dirichlet | sentiment  |
| `medicine`       | head_qa              | one of six fields     | the answer |
| `code`           | code_search_net      | programming language  | functions  |
| `law`            | cuad                 | contract              | clauses    |
| `recommendation` | a file of yours      | user                  | next item  |

The data sets are downloaded from the hub; `--config.data.path=` names a file or
folder of the same fields, such as those of `scripts/make_application_data`.
`configs/applications.md` describes each field. `:smoke`, or `:law-smoke`, runs
the same code on a random model and packaged text.
"""

import os
from typing import Any

import ml_collections

NAMES = ('finance', 'medicine', 'code', 'law', 'recommendation')
CACHE = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  name, _, form = arg.partition('-')
  if name == 'smoke':
    name, form = '', 'smoke'
  name = name or 'finance'
  if name not in NAMES or form not in ('', 'smoke'):
    raise ValueError(
      f'configs/applications.py has no {arg!r}; there are {", ".join(NAMES)}, '
      'each also with -smoke.'
    )
  smoke = form == 'smoke'
  config = ml_collections.ConfigDict()
  config.num_rounds = 2 if smoke else 20
  config.checkpoint_every = 2 if smoke else 5
  config.clients = dict(name='uniform', cohort_size=4)
  config.cohort = dict(num_steps=4 if smoke else 10, batch_size=8)
  config.algorithm = dict(name='fed_avg')
  if name == 'finance':
    _classify(config, smoke)
  else:
    _generate(config, name, smoke)
  if smoke:  # Shakespeare's roles and genres take the place of the data set
    config.data = ml_collections.ConfigDict(dict(name='packaged'))
    less: Any = config
    less.population.update(max_clients=8, new_clients=2, max_length=32)
    less.evals.update(every=10, per_client=4, common=16)
  return config


def _classify(config: ml_collections.ConfigDict, smoke: bool) -> None:
  """Sentiment with an encoder: accuracy by client, seen and unseen."""
  config.task = dict(name='classification')
  config.data = dict(name='hub', dataset='financial_phrasebank')
  config.partition = dict(
    name='dirichlet', num_clients=10 if smoke else 20, alpha=0.5, min_size=8
  )
  config.population = dict(max_length=64, new_clients=2)
  path = os.path.expanduser(f'{CACHE}/all-MiniLM-L6-v2')
  config.model = dict(name='pretrained', path=path)
  if smoke:
    config.model = dict(name='random_encoder')
  config.adapter = dict(
    name='lora',
    rank=8,
    alpha=16.0,
    targets=('q_proj', 'v_proj'),
    modules_to_save=('pooler', 'classifier'),
  )
  config.local = dict(name='adamw', learning_rate=1e-3)
  config.evals = dict(
    every=5,
    batch_size=32,
    per_client=16,
    buckets=(),
    evaluators=[dict(name='likelihood'), dict(name='classes')],
  )


def _generate(
  config: ml_collections.ConfigDict, name: str, smoke: bool
) -> None:
  """Replies of a decoder: held-out loss and accuracy of the reply's tokens."""
  config.data = {
    'medicine': dict(name='hub', dataset='head_qa'),
    'code': dict(name='hub', dataset='code_search_net', num_records=60_000),
    'law': dict(name='hub', dataset='cuad'),
    'recommendation': dict(
      name='jsonl',
      path=f'{CACHE}/applications/recommendation.jsonl',
      client_key='user',
      prompt_key='history',
      response_key='next',
    ),
  }[name]
  config.partition = dict(name='natural')
  config.population = dict(
    template='plain' if smoke or name == 'recommendation' else 'chat',
    max_length={'law': 1024, 'code': 512}.get(name, 256),
    new_clients=1 if name in ('medicine', 'code') else 0.1,
  )
  path = os.path.expanduser(f'{CACHE}/SmolLM2-135M-Instruct')
  config.model = dict(name='pretrained', path=path)
  if smoke:
    config.model = dict(name='random')
  config.adapter = dict(name='lora', rank=8, alpha=16.0)
  config.local = dict(name='adamw', learning_rate=1e-3)
  # Greedy replies against the recorded ones, beside held-out loss.
  score, most = {
    'medicine': ('word_f1', 32),
    'code': ('chrf', 64),
    'law': ('word_f1', 64),
    'recommendation': ('exact_match', 16),
  }[name]
  replies = dict(name='generated', score=score, max_new_tokens=most, limit=64)
  evaluators = [dict(name='likelihood'), replies]
  config.evals = dict(every=5, per_client=8, common=32, evaluators=evaluators)
