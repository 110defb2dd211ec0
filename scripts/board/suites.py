"""The suites of `scripts/leaderboard`: tasks, methods and their settings.

A task is a set of config fields on a config of `configs/`; a method changes
some of them. Within a task and seed all methods see the same clients, texts and
draws, and train on the same number of steps.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
BASELINE = 'fed_it'
ZERO = 'zero_shot'  # the base without training: no run of its own


class Task(NamedTuple):
  """A task: what it measures, its config, and the fields that it changes."""

  title: str
  kind: str  # 'accuracy' (of own held-out texts) or 'loss' (nats a token)
  config: str  # of `configs/`
  fields: Mapping[str, Any]
  records: str = ''  # the file of the task
  most: int = 2000  # records that are read, drawn once for all seeds


class Suite(NamedTuple):
  """Tasks by name, rounds of a run, and seeds."""

  tasks: Mapping[str, Task]
  rounds: int
  seeds: tuple[int, ...] = (0, 1, 2)


# ---------------------------------------------------------------- methods --

_MIXED = {'profiles': {'name': 'ranks', 'choices': [2, 4, 8]}}
METHODS: Mapping[str, Mapping[str, Any]] = {
  ZERO: {},
  'local_only': {},
  'fed_it': {},
  'ffa_lora': {},
  'rolora': {},
  'fedex_lora': {},
  'flexlora': _MIXED,
  'fed_sa': {},
  # Half of a client's steps train its private part.
  'ditto': {'algorithm.private_steps': 'half'},
  'fed_prompt': {
    'adapter': {'name': 'soft_prompt'},
    'local.learning_rate': 1e-2,
  },
  # Biases; norms in a network without biases.
  'fed_bf': {'adapter': {'name': 'bitfit'}, 'local.learning_rate': 1e-2},
}


def changes(name: str, task: Task) -> dict[str, Any]:
  """Returns the fields by which a method's run differs from FedIT's."""
  fields = dict(METHODS[name])
  fields['algorithm.name'] = name
  if fields.get('algorithm.private_steps') == 'half':
    fields['algorithm.private_steps'] = task.fields['cohort.num_steps'] // 2
  labelled = task.kind == 'accuracy'
  if name == 'fed_bf' and not labelled:  # llama has no biases
    fields['adapter'] = {'name': 'norms'}
    fields['algorithm.name'] = 'fed_avg'
  elif 'adapter' in fields and labelled:
    head = ('pooler', 'classifier')
    fields['adapter'] = {**fields['adapter'], 'modules_to_save': head}
  return fields


# ------------------------------------------------------------------ tasks --

_LABELLED: dict[str, Any] = {
  'partition': {
    'name': 'dirichlet',
    'num_clients': 8,
    'alpha': 0.3,
    'min_size': 24,
  },
  'population.max_length': 24,
  'population.new_clients': 0,
  'clients.cohort_size': 4,
  'cohort.num_steps': 4,
  'cohort.batch_size': 8,
  'local.learning_rate': 2e-3,
  'evals.per_client': 12,
  'evals.common': 0,
  'evals.batch_size': 32,
}
_WRITTEN: dict[str, Any] = {
  'population.template': 'plain',
  'population.max_length': 48,
  'population.new_clients': 0,
  'clients.cohort_size': 4,
  'cohort.num_steps': 4,
  'cohort.batch_size': 1,
  'local.learning_rate': 2e-3,
  'evals.per_client': 4,
  'evals.samples': 0,
}


def _labelled(title: str, records: str, **fields: Any) -> Task:
  return Task(
    title,
    'accuracy',
    'minilm_classification.py',
    {**_LABELLED, **fields},
    records,
  )


def _written(
  title: str, records: str, client_key: str | None, **fields: Any
) -> Task:
  data = {
    'name': 'jsonl',
    'client_key': client_key,
    'prompt_key': 'prompt',
    'response_key': 'response',
  }
  return Task(
    title,
    'loss',
    'quickstart.py',
    {**_WRITTEN, **fields, 'data': data},
    records,
  )


_MORE = {
  'partition': {**_LABELLED['partition'], 'num_clients': 40, 'min_size': 16},
  'clients.cohort_size': 10,
  'cohort.num_steps': 8,
  'evals.per_client': 16,
}
_LONG = {'clients.cohort_size': 8, 'evals.per_client': 16}
_EQUAL = {
  'partition': {'name': 'iid', 'num_clients': 8},
  'population.max_length': 128,
}
_DOC2DIAL = (
  'Doc2Dial: replies about the documents of four agencies, the clients'
)

SUITES: Mapping[str, Suite] = {
  'small': Suite(
    {
      'newsgroups': _labelled('20 Newsgroups, 20 groups', 'newsgroups'),
      'reuters_r52': _labelled('Reuters R52, 52 skewed topics', 'reuters_r52'),
      'doc2dial': _written(_DOC2DIAL, 'doc2dial', 'client'),
    },
    rounds=4,
  ),
  'medium': Suite(
    {
      'newsgroups': _labelled('20 Newsgroups', 'newsgroups', **_MORE)._replace(
        most=20_000
      ),
      'reuters_r8': _labelled('Reuters R8', 'reuters_r8', **_MORE)._replace(
        most=20_000
      ),
      'reuters_r52': _labelled('Reuters R52', 'reuters_r52', **_MORE)._replace(
        most=20_000
      ),
      'doc2dial': _written(_DOC2DIAL, 'doc2dial', 'client', **_LONG)._replace(
        most=20_000
      ),
      'mmlu_282': _written(
        'Worked examples of MMLU, a subject a client',
        'mmlu_282',
        'client',
        **{**_LONG, 'population.max_length': 256},
      ),
      'gsm8k_100': _written('GSM8K, a sample', 'gsm8k_100', None, **_EQUAL),
    },
    rounds=20,
  ),
}
