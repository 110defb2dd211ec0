"""The cells of `scripts/compare_peft`: a model, a kind of tuning, a seed.

`settings` returns the config of a cell, `Bench` trains one kind with any seed
and learning rate by one compiled program.
"""

import datetime
import functools
import os
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import scopes, tree
from fedjax_llm.run import config, experiment, metrics
from fedjax_llm.run.sections import SPEC
from fedjax_llm.sweep.groups import put
from fedjax_llm.types import Shared

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
TUNING = 1_000  # the seed of the search for learning rates, used in no result
HEAD = ('classifier',)


class Kind(NamedTuple):
  """A kind of tuning: its adapter's section and the learning rates tried."""

  adapter: Mapping[str, Any]
  rates: Sequence[float]  # of AdamW at the clients, increasing


# The classifier is new, so every kind trains it as well.
ENCODER = {
  'full': Kind(
    dict(name='layers', which=(0, 1, 2, 3, 4, 5), modules_to_save=HEAD),
    (1e-4, 3e-4, 1e-3),
  ),
  'head': Kind(dict(name='heads'), (1e-3, 3e-3, 1e-2)),
  'bias': Kind(dict(name='bitfit', modules_to_save=HEAD), (3e-3, 1e-2, 3e-2)),
  'LoRA': Kind(
    dict(
      name='lora', rank=8, alpha=16.0, targets=('q_proj', 'v_proj'),
      modules_to_save=HEAD,
    ),
    (1e-3, 3e-3, 1e-2),
  ),
  '(IA)3': Kind(dict(name='ia3', modules_to_save=HEAD), (3e-3, 1e-2, 3e-2)),
  'bottleneck': Kind(
    dict(name='bottleneck', size=16, modules_to_save=HEAD), (1e-3, 3e-3, 1e-2)
  ),
  'prefix': Kind(
    dict(name='prefix', length=16, scale=0.1, modules_to_save=HEAD),
    (3e-3, 1e-2, 3e-2),
  ),
  'soft prompt': Kind(
    dict(
      name='soft_prompt', length=16, init='vocabulary', modules_to_save=HEAD
    ),
    (3e-3, 1e-2, 3e-2),
  ),
}  # fmt: skip
# The model has no biases (the scales of its norms stand in for them), and its
# output matrix is the embedding, so there is no head to train alone.
DECODER = {
  'full': Kind(dict(name='layers', which=tuple(range(30))), (3e-5, 1e-4, 3e-4)),
  'norms': Kind(dict(name='norms'), (3e-3, 1e-2, 3e-2)),
  'LoRA': Kind(dict(name='lora', rank=8, alpha=16.0), (1e-3, 3e-3, 1e-2)),
  '(IA)3': Kind(dict(name='ia3'), (3e-3, 1e-2, 3e-2)),
  'bottleneck': Kind(dict(name='bottleneck', size=16), (3e-4, 1e-3, 3e-3)),
  'prefix': Kind(
    dict(name='prefix', length=8, scale=0.1), (3e-3, 1e-2, 3e-2)
  ),
  'soft prompt': Kind(
    dict(name='soft_prompt', length=8, init='vocabulary'), (3e-3, 1e-2, 3e-2)
  ),
}  # fmt: skip
MODELS = {'minilm': ENCODER, 'smollm2': DECODER}
CONFIGS = {
  'minilm': 'configs/minilm_classification.py',
  'smollm2': 'configs/quickstart.py',
}
# What all kinds of a model share.
ALIKE = {
  'minilm': {
    'clients.cohort_size': 6,
    'cohort.num_steps': 3,
    'cohort.batch_size': 4,
    'block_size': 6,
    'evals.per_client': 2,
    'evals.common': 0,
  },
  'smollm2': {
    'population.max_length': 64,
    'population.max_clients': 12,
    'clients.cohort_size': 2,
    'cohort.num_steps': 2,
    'cohort.batch_size': 1,
    'cohort.packing': True,
    'block_size': 2,
    'evals.per_client': 1,
    'evals.samples': 0,
    'evals.buckets': (),
  },
}


def settings(model: str, kind: str, seed: int, smoke: bool) -> dict[str, Any]:
  """Returns the fields of a cell, as they follow `--config.`.

  Every client counts the same. Full tuning of the decoder trains one client
  after another: each needs 2.4 GB for its change, gradient and moments.
  """
  fields: dict[str, Any] = {**ALIKE[model], 'cohort.weight_by': 'uniform'}
  adapter = dict(MODELS[model][kind].adapter)
  if smoke:
    fields |= {'block_size': 2, 'clients.cohort_size': 2}
    fields['evals.per_client'] = 1
    if adapter['name'] == 'layers':
      adapter['which'] = (0, 1)
  elif (model, kind) == ('smollm2', 'full'):
    fields['block_size'] = 1
  return fields | {'seed': seed, 'adapter': adapter}


def conf_of(model: str, kind: str, seed: int, smoke: bool) -> Any:
  """Returns the config of a cell, checked."""
  file = str(ROOT / CONFIGS[model]) + (':smoke' if smoke else '')
  fields = settings(model, kind, seed, smoke)
  words = [f'--config.{name}={value}' for name, value in fields.items()]
  return config.parse(['--config', file, '--workdir', '.', *words], SPEC).config


class Bench:
  """Trains one kind of tuning; seeds and rates share the compiled programs."""

  def __init__(self, model: str, kind: str, smoke: bool = False, loaded=None):
    self.model, self.kind, self.smoke = model, kind, smoke
    self.loaded = loaded
    self.built: dict[int, Any] = {}
    first = self.of(TUNING)
    self.loaded, self.lead = first.loaded, first
    self.likelihood = first.likelihood()

    def round(rate, state, cohort, base):
      conf = put(first.conf, {'local.learning_rate': rate})
      method = first.method(first.settings.block_size, conf=conf)
      return method.round(state, cohort, base)

    # One client at a time (`full`) keeps the served parameters only once.
    self.round = jax.jit(round, donate_argnums=1)

  def of(self, seed: int) -> Any:
    if seed not in self.built:
      self.built[seed] = experiment.build(
        conf_of(self.model, self.kind, seed, self.smoke),
        lambda text: None,
        model=self.loaded,
      )
    return self.built[seed]

  @functools.cached_property
  def num_params(self) -> int:
    """Returns how many numbers are trained and sent."""
    labels = scopes.everything().labels(self.lead.initial)
    shared = tree.select(self.lead.initial, labels, Shared)
    return sum(x.size for x in jax.tree.leaves(shared))

  def train(
    self, seed: int, rate: float, rounds: int, tests: Sequence[int]
  ) -> dict[str, Any]:
    """Trains; returns the curve at the rounds of `tests`, bytes and seconds.

    A point is {round, tokens, bytes, loss, accuracy, worst}: learned tokens or
    labels, and the bytes of all clients in both directions. Training stops
    where a loss is not finite.
    """
    built = self.of(seed)
    method = built.method(built.settings.block_size)
    examine = built.examiner(method, together=self.likelihood)
    state = method.init(built.round_key, jax.tree.map(np.array, built.initial))
    newcomer = method.init_client(state.params)
    sent = tokens = 0
    curve, seconds, tested = [], [], []

    def point(number):
      began = time.monotonic()
      result = examine(built.base, state.params, None, built.round_key)
      tested.append(time.monotonic() - began)
      accuracies = built.task.metrics.accuracies
      names = ('accuracy', 'client_accuracy_worst_10')
      more = [result[f'evals/heldout/{n}'] for n in names if accuracies]
      curve.append(
        dict(
          round=number, tokens=tokens, bytes=sent,
          loss=result['evals/heldout/loss'],
          **dict(zip(('accuracy', 'worst'), more)),
        )
      )  # fmt: skip

    for number in range(rounds + 1):
      if number:
        _, cohort = built.assemble(number - 1)
        states = tree.broadcast(newcomer, len(cohort.weight))
        began = time.monotonic()
        state, _, info = self.round(
          np.float32(rate), state, cohort._replace(states=states), built.base
        )
        record = metrics.summarise(info)  # it waits for the devices
        seconds.append(time.monotonic() - began)
        sent += record['uploads/bytes'] + record['downloads/bytes']
        tokens += record['local/tokens']
      if number in tests:
        point(number)
        if not np.isfinite(curve[-1]['loss']):
          break
    return {
      'curve': curve,
      'bytes_a_round': sent / max(len(seconds), 1),
      # The first round of a kind compiles.
      'seconds_a_round': float(np.median(seconds[1:] or seconds)),
      'seconds_a_test': float(np.median(tested[1:] or tested)),
    }


def machine() -> dict[str, Any]:
  """Returns the date, the machine and the version of jax."""
  return {
    'date': datetime.date.today().isoformat(),
    'machine': f'{platform.machine()}, {os.cpu_count()} shared cores, '
    f'{jax.devices()[0].platform}',
    'load': round(os.getloadavg()[0], 1),
    'jax': jax.__version__,
  }
