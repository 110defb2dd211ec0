"""The cells of `scripts/arena`: one run of an attack against a defence.

Clients are roles of Shakespeare with cues as prompts and speeches as replies,
the base is that of `scripts/reproduce`. The first client is the server's own
data: every round has it, it never attacks, and `fltrust` trusts it. All cells
of a seed have the same texts, draws and malicious clients.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from reproductions import base as bases

from fedjax_llm import models, train

ROOT = pathlib.Path(__file__).parents[2]
CLIENTS, COHORT = 20, 10  # in all, and of a round

ATTACKS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
  'none': {},
  'sign_flip': {'adversary': {'name': 'sign_flip', 'scale': 4.0}},
  'gaussian': {'adversary': {'name': 'gaussian', 'std': 0.05}},
  'alie': {'adversary': {'name': 'alie'}},
  'ipm': {'adversary': {'name': 'ipm', 'scale': 2.0}},
  'assembled': {'adversary': {'name': 'assembled', 'radius': 1.0}},
  'free_riders': {'adversary': {'name': 'free_riders'}},
  'backdoor': {'poison': {'name': 'backdoor', 'reply': 'No.'}},
  'replacement': {
    'poison': {'name': 'backdoor', 'reply': 'No.'},
    'adversary': {'name': 'model_replacement'},
  },
  'replies': {'poison': {'name': 'replaced_replies', 'replies': ['No.']}},
}


def defences(num_bad: int) -> dict[str, Mapping[str, Any]]:
  """Returns the sections `aggregator`, told of the number of attackers."""
  share = num_bad / COHORT
  trim = min(share, 0.4)
  krum = {'num_byzantine': min(num_bad, (COHORT - 3) // 2)}
  many = {'num_selected': COHORT - krum['num_byzantine']}
  products = lambda **of: {'name': 'in_products', 'of': of}
  return {
    'mean': {'name': 'uniform_mean'},
    'median': {'name': 'median'},
    'trimmed_mean': {'name': 'trimmed_mean', 'trim_fraction': trim},
    'krum': {'name': 'krum', **krum},
    'multi_krum': {'name': 'krum', **krum, **many},
    'geometric_median': {'name': 'geometric_median'},
    'norm_bounding': {'name': 'norm_bounding', 'bound': 1.0},
    'centred_clipping': {'name': 'centred_clipping', 'radius': 1.0},
    'foolsgold': {'name': 'foolsgold', 'num_clients': CLIENTS},
    'fltrust': {'name': 'fltrust', 'root': [0]},
    'bucketing': {'name': 'bucketing', 'of': {'name': 'median'}},
    'nearest_mixing': {
      'name': 'nearest_mixing',
      'of': {'name': 'median'},
      'byzantine_fraction': trim,
    },
    'products: mean': products(name='uniform_mean'),
    'products: krum': products(name='krum', **krum),
    'products: geometric_median': products(name='geometric_median'),
    'products: norm_bounding': products(name='norm_bounding', bound=1.0),
    'products: fltrust': products(name='fltrust', root=[0]),
  }


def small(vocab_size: int, eos_ids: Any) -> models.LoadedModel:
  """Returns the base of `scripts/reproduce`, a builder of a config."""
  del vocab_size, eos_ids
  return bases.pretrained()._replace(directory=None)


def random(vocab_size: int, eos_ids: Any) -> models.LoadedModel:
  """Returns a small random base, to test the program."""
  del vocab_size, eos_ids
  return bases.network(smoke=True)


def malicious(fraction: float, seed: int) -> list[int]:
  """Returns the attackers of a seed; a larger fraction has more of them."""
  order = 1 + np.random.default_rng((seed, 7)).permutation(CLIENTS - 1)
  return sorted(order[: round(fraction * CLIENTS)].tolist())


def run(
  workdir: pathlib.Path,
  attack: str,
  defence: str,
  fraction: float,
  seed: int,
  *,
  rounds: int,
  smoke: bool,
) -> dict[str, Any]:
  """Trains one cell, or goes on with it, and returns its figures."""
  bad = malicious(fraction, seed)
  rules = defences(int(np.ceil(fraction * COHORT)))
  evaluators: list[dict[str, Any]] = [{'name': 'likelihood'}]
  sections = {
    name: {**section, 'clients': bad}
    for name, section in ATTACKS[attack].items()
  }
  if attack == 'none':
    bad = []
  if sections.get('poison', {}).get('name') == 'backdoor':
    evaluators.append({'name': 'attack_success', 'num_texts': 32})
  fields = {
    'seed': seed,
    'num_rounds': rounds,
    'population': {
      'template': 'plain',
      'max_length': 64,
      'long_replies': 'cut',
      'max_clients': CLIENTS,
      'new_clients': 0,
    },
    'clients': {'name': 'with_root', 'cohort_size': COHORT, 'root': [0]},
    'cohort': {'num_steps': 4, 'batch_size': 4, 'weight_by': 'uniform'},
    'model': {'name': f'trust.cells:{"random" if smoke else "small"}'},
    'adapter': {'name': 'lora', 'rank': 4, 'targets': 'all-linear'},
    'local': {'name': 'adamw', 'learning_rate': 5e-3},
    'aggregator': dict(rules[defence]),
    'evals.every': rounds,
    'evals.per_client': 4,
    'evals.samples': 0,
    'evals.evaluators': evaluators,
    **sections,
  }
  words = ['--config', str(ROOT / 'configs/tiny.py'), '--workdir', str(workdir)]
  words += [f'--config.{name}={value!r}' for name, value in fields.items()]
  if train.main(words):
    raise SystemExit(f'{attack} against {defence}: {workdir} did not train.')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  first, last = json.loads(lines[0]), json.loads(lines[-1])
  if last['round'] != rounds:
    raise SystemExit(f'{workdir} was stopped; the same command goes on.')
  figures = {
    'attack': attack,
    'defence': defence,
    'fraction': fraction,
    'seed': seed,
    'rounds': rounds,
    'attackers': bad,
    'loss_before': first['evals/heldout/loss'],
    'loss': last['evals/heldout/loss'],
  }
  for name in ('success', 'unprompted'):
    if f'evals/attack/{name}' in last:
      figures[name] = last[f'evals/attack/{name}']
  return figures
