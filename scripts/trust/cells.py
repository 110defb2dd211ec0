"""The cells of `scripts/arena`: one run of an attack against a defence.

Clients are roles of Shakespeare with cues as prompts and speeches as replies,
the base is that of `scripts/reproduce`. The first client is the server's own
data: every round has it, it never attacks, and `fltrust` trusts it. All cells
of a seed have the same texts, draws and malicious clients.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from reproductions import base as bases

from fedjax_llm import evals, models, tree
from fedjax_llm.run import builders, config, experiment
from fedjax_llm.run import evaluators as run_evaluators
from fedjax_llm.run.sections import SPEC

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


class Room(NamedTuple):
  """The experiment of one seed and one poison, which many cells share."""

  built: experiment.Experiment
  examine: Callable[..., Mapping[str, Any]]
  loss_before: float
  first: Any  # the uploads of the first round, which no attack has changed


@functools.cache
def _programs(smoke: bool) -> tuple[Any, Any, Any]:
  """Returns what all rooms compile once: training, loss and likelihood."""
  built = _built(0, 1, {}, smoke)
  by_row = built.task.loss(built.loaded, per_row=True)
  mean = built.method()
  assert mean.train is not None
  return jax.jit(mean.train), by_row, evals.likelihood(by_row)


@functools.cache
def _adversary(section: str) -> Any:
  """Returns the compiled attack of a section, as JSON: one for all attackers.

  `(uploads, bad [N] bool, key) -> uploads`. The clients N ... 2 N - 1 are
  malicious, and for the attack a bad client k is client N + k.
  """
  act = builders.build(
    {**json.loads(section), 'clients': list(range(CLIENTS, 2 * CLIENTS))},
    SPEC.sections['adversary'],
    num_clients=2 * CLIENTS,
  )

  def attacked(uploads, bad, key):
    ids = jax.numpy.asarray(uploads.ids)
    marked = ids + CLIENTS * bad[ids]
    return act(uploads._replace(ids=marked), key)._replace(ids=ids)

  return jax.jit(attacked)


@functools.cache
def _server(rule: str, smoke: bool) -> tuple[Any, Any]:
  """Returns `init` and the compiled `aggregate` of a rule, as JSON."""
  conf = _conf(0, 1, {'aggregator': json.loads(rule)}, smoke)
  method = room(0, '{}', smoke).built.method(conf=conf)
  assert method.aggregate is not None
  return method.init, jax.jit(method.aggregate)


def _conf(
  seed: int, rounds: int, sections: Mapping[str, Any], smoke: bool
) -> Any:
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
    'cohort': {'num_steps': 4, 'batch_size': 2, 'weight_by': 'uniform'},
    'model': {'name': f'trust.cells:{"random" if smoke else "small"}'},
    'adapter': {'name': 'lora', 'rank': 4, 'targets': 'all-linear'},
    'local': {'name': 'adamw', 'learning_rate': 5e-3},
    'aggregator': {'name': 'uniform_mean'},
    'evals.per_client': 2,
    **sections,
  }
  words = ['--config', str(ROOT / 'configs/tiny.py'), '--workdir', 'unused']
  words += [f'--config.{name}={value!r}' for name, value in fields.items()]
  return config.parse(words, SPEC).config


@functools.cache
def _model(smoke: bool) -> models.LoadedModel:
  return (random if smoke else small)(0, ())


def _built(
  seed: int, rounds: int, sections: Mapping[str, Any], smoke: bool
) -> experiment.Experiment:
  conf = _conf(seed, rounds, sections, smoke)
  quiet = lambda _: None
  return experiment.build(conf, quiet, model=_model(smoke))


@functools.lru_cache(maxsize=16)
def room(seed: int, poison: str, smoke: bool) -> Room:
  """Returns the room of a seed and a section `poison`, as JSON."""
  section = json.loads(poison)
  sections = {'poison': section} if section else {}
  built = _built(seed, 1, sections, smoke)
  train, by_row, likelihood = _programs(smoke)
  method = built.method()
  evaluators: list[dict[str, Any]] = [{'name': 'likelihood'}]
  if section.get('name') == 'backdoor':
    evaluators.append({'name': 'attack_success', 'num_texts': 32})
  examine = run_evaluators.build(
    evaluators,
    built=built,
    algorithm=method,
    tests=built.tests(),
    private=False,
    loss=by_row,
    model=built.loaded.model,
    together=likelihood,
  )
  examine = functools.partial(examine, built.base)
  before = examine(built.initial, None, built.round_key)
  state = method.init(built.round_key, built.initial)
  first = train(state, _cohort(built, 0), built.base)[0]
  return Room(built, examine, before['evals/heldout/loss'], first)


def _cohort(built: experiment.Experiment, number: int) -> Any:
  """Returns the cohort of a round; the clients keep nothing."""
  newcomer = built.method().init_client(built.initial)
  states = tree.broadcast(newcomer, COHORT)
  return built.assemble(number)[1]._replace(states=states)


def run(
  attack: str,
  defence: str,
  fraction: float,
  seed: int,
  *,
  rounds: int,
  smoke: bool,
) -> dict[str, Any]:
  """Trains one cell and returns its figures.

  A round is its two halves: the program of the first is that of all cells, and
  the adversary and the rule act between them, as in `server.fed_opt`. Each
  attack and each rule is compiled once, whoever the attackers are.
  """
  bad = [] if attack == 'none' else malicious(fraction, seed)
  rules = defences(int(np.ceil(fraction * COHORT)))
  sections = {name: dict(part) for name, part in ATTACKS[attack].items()}
  poison = sections.pop('poison', {})
  if poison:
    poison['clients'] = bad
  built, examine, before, first = room(seed, json.dumps(poison), smoke)
  train = _programs(smoke)[0]
  adversary = lambda uploads, bad, key: uploads
  if sections:
    adversary = _adversary(json.dumps(sections['adversary']))
  init, aggregate = _server(json.dumps(rules[defence]), smoke)
  state = init(built.round_key, built.initial)
  of_mean = built.method().init(built.round_key, built.initial).aggregator
  is_bad = np.isin(np.arange(CLIENTS), bad)
  uploads = first
  for number in range(rounds):
    if number:
      uploads, _, _ = train(
        state._replace(aggregator=of_mean), _cohort(built, number), built.base
      )
    key = jax.random.fold_in(jax.random.fold_in(state.key, number), 2)
    state, _ = aggregate(state, adversary(uploads, is_bad, key), built.base)
  last = examine(state.params, None, built.round_key)
  figures = {
    'attack': attack,
    'defence': defence,
    'fraction': fraction,
    'seed': seed,
    'rounds': rounds,
    'attackers': bad,
    'loss_before': before,
    'loss': last['evals/heldout/loss'],
  }
  for name in ('success', 'unprompted'):
    if f'evals/attack/{name}' in last:
      figures[name] = last[f'evals/attack/{name}']
  return figures
